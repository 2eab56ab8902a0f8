"""GPU versions of ops: on a GPU where there is one, elsewhere in Triton's interpreter and a CUDA emulator."""
