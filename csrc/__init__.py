"""C++ sources, shipped as data: the CUDA files among them are compiled where they run."""
