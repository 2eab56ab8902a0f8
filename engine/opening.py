"""The checkpoints that the stages of a recipe read."""

from collections.abc import Sequence
from contextlib import ExitStack

from freemerge import methods
from freemerge.checkpoint.reader import Checkpoint, open_adapter, open_checkpoint
from freemerge.checkpoint.source import split_adapters
from freemerge.documents import Stage
from freemerge.errors import CheckpointError, gathered


def inputs(stages: Sequence[Stage]) -> list[str]:
    """The models of all stages that none of them makes."""
    made = {stage.name for stage in stages}
    return list(dict.fromkeys(model for stage in stages for model in stage.recipe.models if model not in made))


def parts(stages: Sequence[Stage]) -> list[str]:
    """The same, models and the adapters on them apart."""
    return [part for model, adapters in map(split_adapters, inputs(stages)) for part in (model, *adapters)]


def _beneath(model: str, stages: Sequence[Stage]) -> str | None:
    """What an adapter alone may go on: the base of the first stage that it is merged in, if that is there already."""
    there = inputs(stages)
    bases = (stage.recipe.base for stage in stages if model in stage.recipe.models)
    return next((base for base in bases if base in there and base != model), None)


def open_all(stages: Sequence[Stage], allow_pickle: bool, stack: ExitStack) -> dict[str, Checkpoint]:
    """The models that no stage makes; all that cannot be opened in one error."""
    opened: dict[str, Checkpoint] = {}
    errors = []
    bare = any(methods.get(stage.recipe.method).merges_adapters for stage in stages)
    for model in inputs(stages):
        try:
            if bare:
                checkpoint = open_adapter(model, allow_pickle=allow_pickle)
            else:
                checkpoint = open_checkpoint(model, allow_pickle=allow_pickle, base=_beneath(model, stages))
            opened[model] = stack.enter_context(checkpoint)
        except CheckpointError as error:
            errors.append(error)
    if errors:
        raise CheckpointError(gathered(errors))
    return opened
