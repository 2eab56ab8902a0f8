"""Which version of an op runs here: a look-up by name that tells the truth."""

import os
from collections.abc import Callable

from freemerge.errors import UnavailableError
from freemerge.kernels.array import Array

try:
    from freemerge.kernels import _cpu
except (
    ImportError
) as error:  # an installation without its compiled module: everything works, slowly; `freemerge info` says why
    _cpu, missing = None, str(error)
else:
    missing = None


def implementation(op: str, array: Array) -> Callable | None:
    """The fastest version of `op` for arrays like this one, or None where the op has to run its reference.

    FREEMERGE_IMPL=reference asks for None everywhere, FREEMERGE_IMPL=cpu for the compiled version or an error.
    """
    wish = os.environ.get("FREEMERGE_IMPL", "auto")
    if wish == "reference":
        return None
    if wish not in ("auto", "cpu"):
        raise UnavailableError(f"FREEMERGE_IMPL={wish}: there is auto, cpu and reference")
    found = getattr(_cpu, op, None)
    if found is None and wish == "cpu":
        raise UnavailableError(
            f"FREEMERGE_IMPL=cpu: {op} has no compiled version here ({missing or 'not written yet'})"
        )
    return found


def set_threads(count: int) -> None:
    """Let compiled ops use `count` threads; 0 means one for each core this process may use."""
    if _cpu is not None:
        _cpu.set_threads(count)


def threads() -> int:
    return _cpu.threads() if _cpu is not None else 1
