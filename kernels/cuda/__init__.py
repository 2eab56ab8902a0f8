"""GPU versions of ops in CUDA C++ (csrc/cuda), compiled at first use: one module an op, called like its reference."""
