"""put_entries in Triton: the entries alone are looked at (_entries.py)."""

import torch

from freemerge.kernels.triton._entries import give_entries


def put_entries(array: torch.Tensor, offsets: torch.Tensor, columns: torch.Tensor, entries: torch.Tensor) -> None:
    give_entries(array, offsets, columns, entries)
