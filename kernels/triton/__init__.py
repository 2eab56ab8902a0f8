"""GPU versions of ops in Triton: one module an op, its launcher named like it and called like its reference."""
