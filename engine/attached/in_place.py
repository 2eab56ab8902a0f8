"""An expert in the place of a model's weights, with what it takes to restore them bit for bit."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from freemerge.attached.places import Place
from freemerge.checkpoint.torch_arrays import from_torch, placed_like
from freemerge.kernels.apply_sparse_rows import apply_sparse_rows
from freemerge.kernels.array import Array, is_tensor
from freemerge.kernels.put_entries import put_entries
from freemerge.parts import Part, Rows


@dataclass(frozen=True)
class Changed:
    """A tensor of the model that a part was put into, and what it held before.

    Args:
        part: where the tensor lay.
        kept: a torch tensor: the entries of sparse rows, or the whole tensor for a part that touches all of it.
        before: Versions.of the tensor at that time. after: its count of writes with the part in it.
    """

    place: Place
    part: Part
    kept: Any
    before: int | None = None
    after: int | None = None

    def restore(self, versions: "Versions") -> None:
        tensor = self.place.tensor
        untouched = writes(tensor) == self.after
        kept = self.kept.to(tensor.device, tensor.dtype)  # the model may have been moved meanwhile
        if isinstance(self.part, Rows):
            with memory_of(tensor) as array:
                put_entries(array, moved(self.part, tensor), as_array(kept))
        else:
            with written(tensor):
                tensor.detach().copy_(kept)
        if untouched:
            versions.restored(tensor, self.before)


class Versions:
    """Which numbers a tensor holds, by autograd's count of writes to it: equal after a switch there and back."""

    def __init__(self):
        self._restored: dict[int, tuple[int | None, int | None]] = {}

    def of(self, tensor: Any) -> int | None:
        """None for an inference tensor, whose writes nobody counts."""
        now, before = self._restored.get(tensor.data_ptr(), (None, None))
        return before if writes(tensor) == now else writes(tensor)

    def restored(self, tensor: Any, before: int | None) -> None:
        """It holds again what it held as `before`."""
        self._restored[tensor.data_ptr()] = writes(tensor), before


class Room:
    """Memory for the entries one expert replaces; it outlives a switch, as fresh pages take as long as one."""

    def __init__(self):
        self._blocks: dict[tuple, Any] = {}
        self._used: dict[tuple, int] = {}

    def clear(self, wanted: Iterable[tuple[Any, int]]) -> None:
        """Make room for (tensor, count) entries; what was taken before is no longer needed."""
        torch, sizes = sys.modules["torch"], Counter()
        for tensor, count in wanted:
            sizes[tensor.device, tensor.dtype] += count
        for key in [key for key, block in self._blocks.items() if block.numel() < sizes[key] or key not in sizes]:
            del self._blocks[key]
        for (device, dtype), size in sizes.items():
            if (device, dtype) not in self._blocks:
                self._blocks[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        self._used = dict.fromkeys(sizes, 0)

    def take(self, count: int, tensor) -> Any:
        """[count] for entries of `tensor`."""
        key = tensor.device, tensor.dtype
        first = self._used[key]
        self._used[key] += count
        return self._blocks[key][first : first + count]


def put(place: Place, part: Part, scale: float, room: Room, versions: Versions) -> Changed:
    """Write round( tensor + scale * part ) to the model's tensor; of sparse rows, only the entries are touched.

    Args:
        part: where the tensor lies.
    """
    tensor = place.tensor
    before = versions.of(tensor)
    if isinstance(part, Rows):
        kept = room.take(part.count, tensor)
        with memory_of(tensor) as array:
            apply_sparse_rows(array, part, scale, start=part.start, out=array, kept=as_array(kept))
    else:
        kept = tensor.detach().clone()
        with memory_of(tensor) as array:
            part.apply(array, scale, out=array)
    return Changed(place, part, kept, before, writes(tensor))


def put_all(parts: Sequence[tuple[Place, Part, float]], room: Room, versions: Versions) -> list[Changed]:
    """Put all of them; where one fails, none."""
    room.clear((place.tensor, part.count) for place, part, _ in parts if isinstance(part, Rows))
    done: list[Changed] = []
    try:
        for place, part, scale in parts:
            done.append(put(place, part, scale, room, versions))
    except BaseException:
        restore_all(done, versions)
        raise
    return done


def restore_all(changed: Iterable[Changed], versions: Versions) -> None:
    """May be called again where it failed half-way."""
    for item in changed:
        item.restore(versions)


@contextmanager
def memory_of(tensor) -> Iterator[Array]:
    """The tensor's numbers as ops take them; what is written there is in the tensor at the end."""
    plain = tensor.detach()
    with written(tensor):
        if plain.is_contiguous() and not plain.is_neg():
            yield as_array(plain)
        else:
            copy = plain.resolve_neg().clone(memory_format=sys.modules["torch"].contiguous_format)
            yield as_array(copy)
            plain.copy_(copy)


def writes(tensor: Any) -> int | None:
    """Autograd's count, which it does not keep for inference tensors."""
    return None if tensor.is_inference() else tensor._version


@contextmanager
def written(tensor) -> Iterator[None]:
    """Has autograd notice what is written past it: a graph that saved an old value then says so."""
    yield
    if not tensor.is_inference():
        sys.modules["torch"].autograd.graph.increment_version(tensor)


def on_host(tensor) -> bool:
    return tensor.device.type == "cpu"


def as_array(tensor) -> Array:
    """What ops take: on the CPU a NumPy array that shares the tensor's memory."""
    return from_torch(tensor) if on_host(tensor) else tensor


def moved(part: Part, tensor) -> Part:
    """The part where `tensor` lies; what comes from a file and is wanted on the CPU stays a view of the file."""
    if on_host(tensor):
        return part.moved(as_host)
    return part.moved(lambda array: placed_like(array, tensor))


def as_host(array: Array) -> Array:
    return from_torch(array.cpu()) if is_tensor(array) else array
