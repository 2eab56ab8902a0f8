"""The threads of OpenBLAS: fewer for a while."""

import contextlib

import pytest

from freemerge import blas
from freemerge.blas import blas_threads


def test_threads_are_limited_and_given_back():
    functions = blas._openblas()
    if functions is None:
        pytest.skip("NumPy uses another BLAS here")
    get, _ = functions
    before = get()
    with contextlib.suppress(KeyError), blas_threads(1):
        assert get() == 1
        raise KeyError
    assert get() == before
    with blas_threads(before + 5):
        assert get() == before


def test_another_blas_is_left_alone(monkeypatch):
    monkeypatch.setattr(blas, "PREFIXES", [("no_such_blas", "")])
    with blas_threads(1):
        pass
    assert blas._openblas() is None
