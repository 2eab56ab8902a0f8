"""A checkpoint seen under other names: some tensors of open checkpoints, presented as one more checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from freemerge.checkpoint.tokenizer import Tokenizer
from freemerge.kernels.array import Array


class CheckpointView:
    """The same attributes and methods as reader.Checkpoint.

    Args:
        checkpoint: the one whose label, files and side files this one has.
        places: for each name the checkpoint it is read from and its name there.
        config: in place of the checkpoint's.
    """

    def __init__(self, checkpoint, places: Mapping[str, tuple[object, str]], config: dict | None = None):
        self._checkpoint, self._places = checkpoint, dict(sorted(places.items()))
        self.label, self.path, self.files = checkpoint.label, checkpoint.path, checkpoint.files
        self.labels = checkpoint.labels
        self.is_planned = getattr(checkpoint, "is_planned", False)
        self.config = checkpoint.config if config is None else config
        self.tensors = {name: source.tensors[old] for name, (source, old) in self._places.items()}
        names = {(id(source), old): name for name, (source, old) in self._places.items()}
        homes = {name: names.get((id(source), source.tied.get(old))) for name, (source, old) in self._places.items()}
        self.tied = {name: home for name, home in homes.items() if home is not None}

    def read(self, name: str) -> Array:
        source, old = self._places[name]
        return source.read(old)

    def read_run(self, name: str, begin: int, end: int) -> Array:
        source, old = self._places[name]
        return source.read_run(old, begin, end)

    def nbytes_made(self, name: str) -> int:
        source, old = self._places[name]
        return source.nbytes_made(old)

    def prefetch(self, name: str, begin: int = 0, end: int | None = None) -> None:
        source, old = self._places[name]
        source.prefetch(old, begin, end)

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        source, old = self._places[name]
        source.release(old, begin, end)

    def fingerprint(self) -> dict:
        return self._checkpoint.fingerprint()

    def check_unchanged(self) -> None:
        self._checkpoint.check_unchanged()

    def side_files(self) -> list[Path]:
        return self._checkpoint.side_files()

    def tokenizer(self) -> Tokenizer | None:
        return self._checkpoint.tokenizer()

    def chat_template(self) -> str | None:
        return self._checkpoint.chat_template()

    def license(self) -> str | None:
        return self._checkpoint.license()
