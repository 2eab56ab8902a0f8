"""Byte sizes as people write and read them."""

import re

from freemerge.errors import InputError

_UNITS = {
    "": 1,
    **{letter + "b": 1000**power for power, letter in enumerate(["", "k", "m", "g", "t"])},
    **{letter: 1000**power for power, letter in enumerate("kmgt", 1)},
    **{letter + "ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}


def parse_size(size: str | int | float, what: str = "size") -> int:
    """Bytes of "2GiB", "5GB", "500 MB", "5G" or a plain number; GB is 1000^3 bytes, GiB 1024^3.

    Raises:
        InputError: not a positive size of this form.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)(?:e(\d+))?\s*([a-z]*)\s*", str(size).lower())
    if not match or match[3] not in _UNITS:
        raise InputError(f"{what} {size}: not a size; write it like 2GiB, 500MB or 1000000")
    nbytes = int(float(f"{match[1]}e{match[2] or 0}") * _UNITS[match[3]])
    if nbytes < 1:
        raise InputError(f"{what} {size}: has to be at least one byte")
    return nbytes


def readable_size(nbytes: float) -> str:
    """1536 -> '1.5 KiB': three digits or so, for people."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    unit = units.pop(0)
    while abs(nbytes) >= 1024 and units:
        nbytes, unit = nbytes / 1024, units.pop(0)
    return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"
