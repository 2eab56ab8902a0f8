"""Ops called from many threads, as a GPU's workers do."""

import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from freemerge.kernels import dispatch


class Device(NamedTuple):
    type: str
    index: int


@pytest.fixture
def tensor(monkeypatch):
    """What dispatch looks at of a CUDA tensor."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_compiled", set())
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(device=lambda _: nullcontext())))
    return SimpleNamespace(device=Device("cuda", 0), dtype="bfloat16")


def most_at_once(tensor, monkeypatch, threads, patience):
    """How many of the threads were in an op at the same time, all having been given the time to."""
    inside, most = 0, 0
    changed = threading.Condition()

    def op(array):
        nonlocal inside, most
        with changed:
            inside += 1
            most = max(most, inside)
            changed.notify_all()
            changed.wait_for(lambda: most == threads, timeout=patience)
            inside -= 1

    monkeypatch.setattr(dispatch, "gpu_version", lambda name: op)
    crew = [threading.Thread(target=lambda: dispatch.implementation("op", tensor)(tensor)) for _ in range(threads)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    return most


def test_the_first_call_of_a_kind_is_alone(tensor, monkeypatch):
    assert most_at_once(tensor, monkeypatch, 3, patience=0.1) == 1
    assert most_at_once(tensor, monkeypatch, 3, patience=10) == 3


def test_a_first_call_that_fails_lets_the_next_try(tensor, monkeypatch):
    def fails(array):
        raise RuntimeError("no")

    monkeypatch.setattr(dispatch, "gpu_version", lambda name: fails)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            dispatch.implementation("op", tensor)(tensor)
    assert not dispatch._compiled
