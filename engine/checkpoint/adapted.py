"""A checkpoint with LoRA adapters, applied as it is read: the same attributes and methods as reader.Checkpoint."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from freemerge.checkpoint.adapter import Adapter
from freemerge.checkpoint.low_rank import Change, Changed
from freemerge.checkpoint.tokenizer import Tokenizer
from freemerge.errors import CheckpointError, gathered
from freemerge.kernels.array import Array, store


class AdaptedCheckpoint:
    """An open base with the adapters that `adapters` names applied to it, in order; nothing is written anywhere.

    What no adapter changes is read as the base gives it, a view of the mapped file. What one changes is computed in
    each reading, in float32 (float64 where the base is), and rounded once, to the base's dtype.

    Args:
        base: an open checkpoint of files. It is closed with this one.
        adapters: open ones.

    Raises:
        CheckpointError: naming all tensors of the adapters that do not fit the base.
    """

    def __init__(self, base, adapters: Sequence[Adapter]):
        self.base, self._adapters = base, list(adapters)
        self.labels = (*base.labels, *(adapter.label for adapter in adapters))
        self.label = "+".join(self.labels)
        self.path, self.config, self.tied = base.path, base.config, base.tied
        self.files = (*base.files, *(file for adapter in adapters for file in adapter.checkpoint.files))
        self._changes: dict[str, Change] = {}
        errors = []
        for adapter in adapters:
            try:
                for name, change in adapter.changes(base).items():
                    self._changes[name] = self._changes.get(name, Change()).then(change)
            except CheckpointError as error:
                errors.append(error)
        if errors:
            raise CheckpointError(gathered(errors))
        self.tensors = {
            name: replace(info, offset=0) if name in self._changes else info for name, info in base.tensors.items()
        }
        self._norms: dict[str, dict[int, Array]] = {name: {} for name in self._changes}

    def read(self, name: str) -> Array:
        """The tensor in its shape and dtype; in memory of its own where an adapter changes it."""
        if self._changed(name) is None:
            return self.base.read(name)
        return self.read_run(name, 0, self.tensors[name].numel).reshape(self.tensors[name].shape)

    def read_run(self, name: str, begin: int, end: int) -> Array:
        """Elements [begin, end) in order; no more than these, and what stands in their rows, is computed."""
        change, info = self._changed(name), self.tensors[name]
        if change is None:
            return self.base.read_run(name, begin, end)
        home = self.tied.get(name, name)
        start = change.read() if change.read else self.base.read(home)
        if not change.updates and start.dtype == info.dtype:
            return start.reshape(-1)[begin:end]
        if change.updates and end > begin:
            found = Changed(start, change.updates, info.dtype, self._norms[home]).elements(begin, end)
        else:
            store(start.reshape(-1)[begin:end].astype(np.float64), found := np.empty(end - begin, info.dtype))
        found.flags.writeable = False
        return found

    def nbytes_made(self, name: str) -> int:
        """Bytes of memory that `read` takes."""
        return 0 if self._changed(name) is None else self.tensors[name].nbytes

    def _changed(self, name: str) -> Change | None:
        return self._changes.get(self.tied.get(name, name))

    def prefetch(self, name: str, begin: int = 0, end: int | None = None) -> None:
        self.base.prefetch(name, begin, end)

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        self.base.release(name, begin, end)

    def fingerprint(self) -> dict:
        """The base's, and under "1/", "2/", ... those of the adapters."""
        found = self.base.fingerprint()
        for number, adapter in enumerate(self._adapters, 1):
            found |= {f"adapter {number}/{file}": facts for file, facts in adapter.fingerprint().items()}
        return found

    def check_unchanged(self) -> None:
        for part in (self.base, *self._adapters):
            part.check_unchanged()

    def side_files(self) -> list[Path]:
        """The base's."""
        return self.base.side_files()

    def tokenizer(self) -> Tokenizer | None:
        """The base's."""
        return self.base.tokenizer()

    def chat_template(self) -> str | None:
        """The base's."""
        return self.base.chat_template()

    def license(self) -> str | None:
        """What base and adapters state, where that differs all of it."""
        stated = [self.base.license(), *(adapter.checkpoint.license() for adapter in self._adapters)]
        found = list(dict.fromkeys(license or "none stated" for license in stated))
        return stated[0] if len(found) == 1 else ", ".join(found)

    def close(self) -> None:
        self.base.close()
        for adapter in self._adapters:
            adapter.checkpoint.close()

    def __enter__(self) -> "AdaptedCheckpoint":
        return self

    def __exit__(self, *_) -> None:
        self.close()
