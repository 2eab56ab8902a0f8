"""A LoRA adapter as a checkpoint of its own tensors: the same attributes and methods as reader.Checkpoint."""

from pathlib import Path
from typing import Any

from freemerge.checkpoint.adapter import CONFIG, Adapter
from freemerge.checkpoint.low_rank import Change
from freemerge.errors import CheckpointError, listed
from freemerge.kernels.array import Array
from freemerge.lora_names import part_of, saved_name

WEIGHTS = "adapter_model.safetensors"


class BareAdapter:
    """The tensors of an open adapter, not applied to anything, by the names PEFT saves them under.

    Attributes:
        adapter_config: adapter_config.json.
        weights_file: what a result with these tensors is called.
        library: what loads it.

    Raises:
        CheckpointError: the file holds several adapters.
    """

    weights_file, library = WEIGHTS, "peft"

    def __init__(self, adapter: Adapter):
        checkpoint = adapter.checkpoint
        self.label, self.labels = adapter.label, (adapter.label,)
        self.path, self.files = checkpoint.path, checkpoint.files
        self.tied: dict[str, str] = {}
        self.config = None
        self.adapter_config: dict[str, Any] = adapter.config
        self._adapter, self._checkpoint = adapter, checkpoint
        self._keys = {saved_name(key): key for key in checkpoint.tensors}
        if len(self._keys) < len(checkpoint.tensors):
            names = {part.adapter for part in map(part_of, checkpoint.tensors) if part}
            problem = f"{self.label}: holds several adapters ({', '.join(sorted(names))})"
            raise CheckpointError(listed([problem], "Save each on its own."))
        self.tensors = {name: checkpoint.tensors[key] for name, key in sorted(self._keys.items())}

    def rank_and_scaling(self, module: str) -> tuple[int, float]:
        """As of the Adapter."""
        return self._adapter.rank_and_scaling(module)

    def changes(self, base) -> dict[str, Change]:
        """As of the Adapter."""
        return self._adapter.changes(base)

    def read(self, name: str) -> Array:
        return self._checkpoint.read(self._keys[name])

    def read_run(self, name: str, begin: int, end: int) -> Array:
        return self._checkpoint.read_run(self._keys[name], begin, end)

    def nbytes_made(self, name: str) -> int:
        return 0

    def prefetch(self, name: str, begin: int = 0, end: int | None = None) -> None:
        self._checkpoint.prefetch(self._keys[name], begin, end)

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        self._checkpoint.release(self._keys[name], begin, end)

    def fingerprint(self) -> dict:
        return self._adapter.fingerprint()

    def check_unchanged(self) -> None:
        self._adapter.check_unchanged()

    def side_files(self) -> list[Path]:
        """Its configuration, and the tokenizer's files beside it."""
        return [self.path / CONFIG, *self._checkpoint.side_files()]

    def license(self) -> str | None:
        return self._checkpoint.license()

    def close(self) -> None:
        self._checkpoint.close()

    def __enter__(self) -> "BareAdapter":
        return self

    def __exit__(self, *_) -> None:
        self.close()
