"""Merging tensors in memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

from freemerge import devices, methods, resident
from freemerge.accelerator import is_out_of_memory
from freemerge.checkpoint.memory import MemoryCheckpoint
from freemerge.errors import InputError, UnavailableError
from freemerge.experts.extract import Extraction
from freemerge.experts.memory import ExpertsInMemory, MemoryExpert, apply_experts
from freemerge.kernels import dispatch
from freemerge.placement import check_together, lies_on_gpu
from freemerge.plan import make_plan
from freemerge.recipe import Recipe
from freemerge.sinks import MemorySink
from freemerge.stream import Stream


class MergedStateDict(dict):
    """Merged tensors by name; `experts` are those a method like free leaves beside them, `shared` what they share."""

    experts: tuple[MemoryExpert, ...] = ()
    shared: Mapping[str, Mapping[str, Any]] = MappingProxyType({})

    def with_experts(self, weights: Mapping[str, float]) -> dict[str, Any]:
        """This model plus the sum of weight * expert, with one rounding: a new state dict.

            merged.with_experts({"math": 0.7, "code": 0.3})

        Args:
            weights: of experts by name, a router's probabilities, say.

        Raises:
            InputError: there is no such expert; or several are given, of which one replaces entries.
        """
        known = {expert.name: expert for expert in self.experts}
        if missing := sorted(set(weights) - set(known)):
            raise InputError(f"no expert {', '.join(map(repr, missing))}; there are: {', '.join(known) or 'none'}")
        return apply_experts(self, [(known[name], float(weight)) for name, weight in weights.items()])


def merge_state_dicts(
    method: str,
    base: Mapping[str, Any] | None,
    experts: Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]],
    *,
    dtype: str | None = None,
    device: str = "cpu",
    threads: int = 0,
    check_finite: bool = True,
    **parameters: Any,
) -> MergedStateDict:
    """Merge tensors in memory.

        merged = freemerge.merge_state_dicts("fr", base_state_dict, [math_state_dict, code_state_dict], scaling=0.4)

    Args:
        method: name of a method.
        base: name -> NumPy array or torch tensor, on the CPU or a CUDA GPU, of any dtype a checkpoint may have; None
            for a method without a base. Tensors are merged on the device they lie on; a model may lie on several, as
            long as its experts' tensors lie with the base's.
        experts: state dicts like `base`, in order, or by name. Nothing given is changed or kept.
        device: where arrays in host memory are merged, as for `merge`; the result is in host memory too. Tensors on a
            GPU are merged there whatever this says.
        dtype, threads, check_finite, parameters: as for `merge`.

    Returns:
        A dict of new tensors of the kind given, on the device of the base's, sorted by name. For a method that writes
        experts, `.experts` holds them, each with `.apply(state_dict)`.

    Raises:
        InputError: tensors do not fit together, all problems at once; or a GPU's memory ran out.
    """
    named = (
        dict(experts) if isinstance(experts, Mapping) else {f"expert{t}": expert for t, expert in enumerate(experts)}
    )
    recipe = Recipe.from_flags(
        method, "base" if base is not None else None, {n: n for n in named}, parameters, dtype=dtype
    )
    accelerators = devices.find_for([methods.get(method)], device)
    open_dict = partial(MemoryCheckpoint, device=accelerators[0].device if accelerators else None)
    found = [open_dict(state_dict, name) for name, state_dict in named.items()]
    reference = open_dict(base, "base") if base is not None else found[0] if found else open_dict({}, "base")
    plan = make_plan(recipe, methods.get(recipe.method), reference, found, shard_size=1 << 62)
    dispatch.set_threads(threads)
    check_together(plan)
    beside = ExpertsInMemory()
    with _out_of_memory_explained():
        sink = MemorySink(plan)
        extraction = Extraction(plan, sink, beside) if plan.leaves_experts else None
        run = {"extraction": extraction, "check_finite": check_finite}
        if lies_on_gpu(plan):
            resident.run(plan, sink, **run)
        else:
            Stream(plan, sink, max_memory=1 << 62, accelerators=accelerators, **run).run()
    merged = MergedStateDict((name, reference.like_input(name, sink.tensors[name])) for name in reference.tensors)
    merged.experts, merged.shared = tuple(beside.experts.values()), beside.shared
    return merged


@contextmanager
def _out_of_memory_explained() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UnavailableError(
            "the GPU's memory ran out: inputs, result and a tensor's work have to fit there together; free some, or "
            'pass the tensors on the CPU and device="cuda", which streams them through the GPU'
        ) from error
