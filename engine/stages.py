"""Recipes of several documents: results that others are made from, planned before they are there, kept beside `out`.

parent/.OUT.stages/lock        held by the running merge
                   NAME        a stage's result, complete
                   NAME.made   the fingerprint of the plan it was made by
"""

import shutil
from pathlib import Path

from freemerge.checkpoint.header import TensorInfo
from freemerge.checkpoint.lock import Lock
from freemerge.checkpoint.tokenizer import Tokenizer, read_chat_template
from freemerge.checkpoint.workdir import check_out
from freemerge.checkpoint.writer import write_file
from freemerge.errors import InputError, OutputError
from freemerge.plan import Plan


class PlannedCheckpoint:
    """The headers and the configuration of a plan's result: all of it that is known before it is made."""

    is_planned = True

    def __init__(self, plan: Plan, label: str):
        self.label, self.labels, self.path, self.files = label, (label,), None, ()
        self.config = plan.base.config if plan.config is None else plan.config
        tensors = {task.name: TensorInfo(task.dtype, task.shape, 0, None) for task in plan.tasks}
        self.tensors = dict(sorted(tensors.items()))
        self.tied = {task.name: task.match.same_as for task in plan.tasks if task.match.same_as}
        self._plan = plan

    def tokenizer(self) -> Tokenizer | None:
        vocabulary = self._plan.vocabulary
        return vocabulary.tokenizer if vocabulary else self._plan.base.tokenizer()

    def chat_template(self) -> str | None:
        plan = self._plan
        if plan.chat_template is not None:
            return plan.chat_template
        return read_chat_template(plan.vocabulary.tokenizer.folder) if plan.vocabulary else plan.base.chat_template()

    def nbytes_made(self, name: str) -> int:
        """Bytes of memory that reading a tensor will take: none."""
        return 0


class StageFolder:
    """Where the results of stages wait for the last one. Leaving a `with` block removes them.

    They stay for --resume where something else than an input stopped the merge.

    Args:
        out: of the last stage.
        overwrite, resume: as for WorkDir.

    Raises:
        OutputError: another merge into `out` is running, `out` exists, or stages of an unfinished run are in the way.
    """

    def __init__(self, out: Path, *, overwrite: bool, resume: bool):
        out = out.resolve()
        check_out(out, overwrite)
        self._folder = out.parent / f".{out.name}.stages"
        self._lock = Lock(self._folder / "lock", out)
        if self._made() and not resume and not overwrite:
            self._lock.release()
            raise OutputError(
                f"{self._folder} holds the stages of an unfinished run; --resume continues it, --overwrite discards it"
            )
        if not resume:
            self._clear()

    def place(self, name: str) -> Path:
        return self._folder / name

    def holds(self, name: str, fingerprint: str) -> bool:
        """Whether the stage was made by this very plan; if not, there is nothing in its place."""
        note = self._folder / f"{name}.made"
        if note.exists() and note.read_text() == fingerprint and self.place(name).is_dir():
            return True
        note.unlink(missing_ok=True)
        shutil.rmtree(self.place(name), ignore_errors=True)
        return False

    def note(self, name: str, fingerprint: str) -> None:
        write_file(self._folder / f"{name}.made", fingerprint.encode())

    def _made(self) -> list[Path]:
        return list(self._folder.glob("*.made"))

    def _clear(self) -> None:
        """Remove everything but the lock; the notes first, so that no resumed run believes in what is half gone."""
        for note in self._made():
            note.unlink()
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def __enter__(self) -> "StageFolder":
        return self

    def __exit__(self, kind, *_) -> None:
        begun = any(path.is_dir() for path in self._folder.iterdir())
        if kind is None or issubclass(kind, InputError) or not begun:
            self._clear()
            self._lock.path.unlink(missing_ok=True)
            self._folder.rmdir()
        self._lock.release()
