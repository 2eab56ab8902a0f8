"""Everything freemerge raises on purpose.

FreemergeError                    exit code 1
|- InputError                     exit code 2: what was given cannot be merged; nothing was written
|  |- RecipeError                 the recipe says something that makes no sense
|  |- CheckpointError             a file is not what it claims to be
|  |- PlanError                   recipe and checkpoints do not fit together
|  |- ShapeError (ValueError)     arrays of an op do not fit together
|  |- UnavailableError            a device, package or version that is not here was asked for
|- OutputError                    the result could not be written; the old state is untouched
|- ChangedInputError              an input changed or vanished while it was read
"""

from collections.abc import Iterable, Sequence


class FreemergeError(Exception):
    """Base of all errors freemerge raises on purpose; `exit_code` is the command line's."""

    exit_code = 1


class InputError(FreemergeError):
    exit_code = 2


class RecipeError(InputError):
    pass


class CheckpointError(InputError):
    pass


class PlanError(InputError):
    pass


class ShapeError(InputError, ValueError):
    pass


class UnavailableError(InputError):
    pass


class OutputError(FreemergeError):
    pass


class ChangedInputError(FreemergeError):
    pass


class Problems(str):
    """The text of an error that has them listed; they stay apart for an error that gathers several such."""

    listed: tuple[str, ...]
    remedy: str


def listed(problems: Iterable[str], remedy: str, outcome: str = "nothing was written") -> Problems:
    """The text of an error that names every problem at once, one to a line, and says what to do."""
    problems = tuple(problems)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    text = Problems("\n".join([f"{count}, {outcome}", *(f"  {problem}" for problem in problems), remedy]))
    text.listed, text.remedy = problems, remedy
    return text


def gathered(errors: Sequence[FreemergeError], outcome: str = "nothing was written") -> Problems:
    """One text for several errors: the problems of all of them, and each remedy once."""
    texts = [error.args[0] for error in errors]
    problems = [problem for text in texts for problem in (text.listed if isinstance(text, Problems) else [text])]
    remedies = dict.fromkeys(text.remedy for text in texts if isinstance(text, Problems))
    return listed(problems, "\n".join(remedies), outcome)
