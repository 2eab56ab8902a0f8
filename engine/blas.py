"""The threads of NumPy's linear algebra: few while several workers use it at once."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

# OpenBLAS as in NumPy's wheels, as numbered by distributions
PREFIXES = [("scipy_openblas", "64_"), ("scipy_openblas", ""), ("openblas", "64_"), ("openblas", "")]


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Let each call of OpenBLAS, in the whole process, use at most `count` threads; another BLAS is left alone.

    OpenBLAS threads wait by spinning. With more of them than cores, as when several workers call it, a decomposition
    takes ten times as long (27 s instead of 2.8 s for eight matrices on two cores).
    """
    functions = _openblas()
    if functions is None:
        yield
        return
    get, put = functions
    before = get()
    put(min(count, before))
    try:
        yield
    finally:
        put(before)


def _openblas():
    try:  # a symbol is looked for in the libraries that the module needs, too
        library = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    except (AttributeError, OSError):
        return None
    for prefix, suffix in PREFIXES:
        names = [f"{prefix}_{verb}_num_threads{suffix}" for verb in ("get", "set")]
        if all(hasattr(library, name) for name in names):
            return [getattr(library, name) for name in names]
    return None
