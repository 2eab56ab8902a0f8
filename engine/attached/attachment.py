"""attach: experts on a model that is there already, switched in place or routed to the rows of a batch."""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from freemerge.attached.experts import ExpertSet
from freemerge.attached.in_place import Changed, Room, Versions, put_all, restore_all
from freemerge.attached.lock import WeightsLock, uninterrupted
from freemerge.attached.opening import open_experts
from freemerge.attached.places import Place, find_places, tied
from freemerge.checkpoint.checksum import checksum
from freemerge.checkpoint.dtypes import NAMES
from freemerge.checkpoint.torch_arrays import flat_bytes, from_torch
from freemerge.errors import CheckpointError, InputError, listed
from freemerge.kernels.array import dtype_of
from freemerge.parts import Part

SAMPLE = 64 << 20  # bytes of a model that are always compared with its checksums
# What an attached model has beside its own; plain attributes of the instance, so that no state dict knows of them
ATTRIBUTES = ("use_expert", "routed", "experts", "expert", "detach_experts")


def attach(model: Any, experts: Any, *, verify: bool | None = None) -> Any:
    """Give a model the experts that were merged with its weights, to switch or to route.

        freemerge.attach(model, "merged")
        model.use_expert("math")                      # in place; use_expert(None) restores the backbone bit for bit
        with model.routed(["math", "code", None]):    # a batch whose rows use different experts
            model(**batch)

    The model has then these attributes more, and no module, parameter or buffer: its state dict keeps plain names.

        use_expert(name | None)   puts an expert in the place of the weights, or takes it out
        routed(assignment)        a context in which each row of a batch uses its own expert (see Attachment.routed)
        experts                   names of the experts
        expert                    the one in place, or None
        detach_experts()          takes the expert out, and these attributes away

    Args:
        model: any torch nn.Module with the merged weights, in any float dtype, on the CPU or a CUDA GPU.
        experts: the folder of the merged model, its folder of experts, one expert's file, the folder of a LoRA adapter
            as PEFT saves it, or an expert in memory (of what merge_state_dicts leaves as `.experts`); a list of such,
            or a mapping that names them.
        verify: which of the model's tensors are compared, byte by byte, with the checksums of the merged model's
            freemerge.json: all, and their dtypes (True), none (False), or the smallest of those that experts change,
            64 MiB at most, where the model has them in the dtype of the merge.

    Returns:
        `model`.

    Raises:
        CheckpointError: the experts' files are damaged, or were made for another backbone; adapters do not fit.
        InputError: the model has no place for what the experts change, or has experts already. Nothing was changed.
    """
    _check_free(model)
    found = open_experts(experts, model)
    places = found.places(model)
    if verify is not False:
        check_backbone(model, found, places, everything=bool(verify))
    if same := tied(places):
        found, places = found.renamed(same), {name: place for name, place in places.items() if name not in same}
    Attachment(model, found, places).install()
    return model


def _check_free(model: Any) -> None:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        raise InputError(f"experts are attached to a torch nn.Module, not to a {type(model).__name__}")
    if isinstance(getattr(getattr(model, "use_expert", None), "__self__", None), Attachment):
        raise InputError("this model has experts attached already; call its detach_experts() first")
    taken = [name for name in ATTRIBUTES if hasattr(model, name)]
    if taken:
        raise InputError(
            f"{type(model).__name__} has {', '.join(taken)} of its own; attach the experts to the module that holds it"
        )


def check_backbone(model: Any, found: ExpertSet, places: Mapping[str, Place], *, everything: bool) -> None:
    """Raise CheckpointError where the model's tensors are not, byte for byte, those of the backbone's manifest.

    Args:
        places: of the tensors that experts change; unless `everything`, a sample of these is looked at.
    """
    if found.manifest is None:
        if everything:
            raise InputError(f"verify: there is no freemerge.json beside {found.label} to compare the model with")
        return
    facts = found.manifest["tensors"]
    if everything:
        places = find_places(model, {name: tuple(f["shape"]) for name, f in facts.items()}, "the backbone")
    else:
        places = _sample({name: place for name, place in places.items() if name in facts}, facts)
    problems = []
    for name, place in places.items():
        tensor = place.tensor.detach()
        dtype = NAMES[dtype_of(tensor)]
        if dtype != facts[name]["dtype"]:
            problems.append(f"{name}: {dtype} in the model, {facts[name]['dtype']} in the backbone")
        elif checksum(flat_bytes(from_torch(tensor.cpu()))) != facts[name]["checksum"]:
            problems.append(f"{name}: other numbers than the backbone's")
    if problems:
        remedy = "Load the model from the merged folder; with verify=False, experts are attached to what is there."
        raise CheckpointError(listed(problems, remedy, outcome="nothing was changed"))


def _sample(places: Mapping[str, Place], facts: Mapping[str, Any]) -> dict[str, Place]:
    """The smallest tensors that may be compared, SAMPLE bytes of them at most, but one."""
    found, left = {}, SAMPLE
    for name, place in sorted(places.items(), key=lambda item: item[1].tensor.nbytes):
        tensor = place.tensor
        if NAMES[dtype_of(tensor)] == facts[name]["dtype"] and (not found or tensor.nbytes <= left):
            found[name] = place
            left -= tensor.nbytes
    return found


class Attachment:
    """What stands behind the attributes of a model with experts."""

    def __init__(self, model: Any, found: ExpertSet, places: dict[str, Place]):
        self.model, self.found, self.places = model, found, places
        self._lock = WeightsLock()
        self._in_place: list[Changed] = []
        self._room, self.versions = Room(), Versions()
        self.derived, self._routing = _routing(self)
        self._hooks: list = []

    def install(self) -> None:
        model = self.model
        model.use_expert, model.routed, model.detach_experts = self.use_expert, self.routed, self.detach_experts
        model.experts, model.expert = tuple(self.found.experts), None
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]

    def use_expert(self, name: str | None) -> None:
        """Put an expert in the place of the weights, or with None restore the backbone bit for bit.

        Waits for forwards of the model that other threads are running, and holds back new ones. Where anything fails,
        the weights are what they were before.

        Raises:
            InputError: no such expert; or called inside a forward or `routed` of the same thread.
        """
        if name is not None:
            self.found.find(name)
        with self._lock.writing(), uninterrupted():
            if name == self.model.expert:
                return
            self._synchronize()
            before = self.model.expert
            try:
                restore_all(self._in_place, self.versions)
                self._put(name)
            except BaseException:
                restore_all(self._in_place, self.versions)
                self._put(before)
                raise
            finally:
                self._synchronize()

    def _put(self, name: str | None) -> None:
        """On the backbone."""
        self._in_place, self.model.expert = [], None
        if name is not None:
            expert = self.found.experts[name]
            parts = [(self.places[t], self.part(name, t), expert.scale(t)) for t in expert.tensors]
            self._in_place = put_all(parts, self._room, self.versions)
            self.model.expert = name

    def part(self, expert: str, tensor: str) -> Part:
        return self.found.part(expert, tensor, self.places[tensor].tensor)

    @contextmanager
    def routed(self, assignment: Any, *, copies: int = 1) -> Iterator[None]:
        """A context in which forwards of the model (of this thread) use experts row by row; weights stay untouched.

            with model.routed(["math", "code", None]):            # the third row: the backbone alone
                model(**batch)
            with model.routed(router), torch.inference_mode():    # router(batch) -> assignment
                model.generate(**batch)
            with model.routed(Gates()):                           # of `smile`: in each layer, each token picks its own
                model.generate(**batch)

        Results equal those of each row run with its expert in place, within rounding. Experts cannot be switched
        meanwhile: other threads wait.

        Args:
            assignment: for each row an expert's name or index, None (-1), or a mapping of names to weights; or weights
                [rows, experts]; or, for each token of each row, lists of lists or [rows, tokens, experts]; or a
                callable (a router of freemerge.routers) that answers one of these for a batch, a dict of what the
                forward is called with (of a generation, for its first step). A single name or None holds for all rows.
                freemerge.routers.Gates leaves it to the gates of the linear layers.
            copies: how many rows the model makes of each (num_beams, num_return_sequences).

        Raises:
            InputError: an unknown expert, a NaN, or (at the forward) another number of rows; an expert is in place;
                gates that are missing or do not fit.
        """
        with self._lock.reading():
            if self.model.expert is not None:
                raise InputError(f"expert {self.model.expert!r} is in place; call use_expert(None) before routing")
            if hasattr(assignment, "bind"):  # a router of freemerge.routers, which a model makes into a callable
                assignment = assignment.bind(self.model)
            with self._routing.run(assignment, copies):
                yield

    def detach_experts(self) -> None:
        """Restore the backbone and take everything away that attach added."""
        self.use_expert(None)
        for hook in self._hooks:
            hook.remove()
        for name in ATTRIBUTES:
            delattr(self.model, name)

    @property
    def in_forward(self) -> bool:
        return self._lock.in_forward

    def _before_forward(self, module, args, kwargs) -> None:
        self._lock.begin_forward(sys._getframe(1))
        self._routing.begin_forward(args, kwargs)

    def _after_forward(self, module, args, output) -> None:
        self._lock.end_forward()

    def _synchronize(self) -> None:
        """Streams of other threads have ended their forwards before, and see the new weights after."""
        for device in {place.tensor.device for place in self.places.values()}:
            if device.type == "cuda":
                sys.modules["torch"].cuda.synchronize(device)

    def __deepcopy__(self, memo: dict) -> "Attachment":
        """Of a copied model: its own weights, lock and state; the experts, which nobody writes, are shared."""
        twin = memo[id(self)] = Attachment.__new__(Attachment)
        twin.model, twin.found = copy.deepcopy(self.model, memo), self.found
        twin.places = {name: _copied(place, memo) for name, place in self.places.items()}
        twin._lock = WeightsLock()
        twin._in_place = [Changed(_copied(c.place, memo), c.part, c.kept.clone()) for c in self._in_place]
        twin._room, twin.versions = Room(), Versions()
        twin.derived, twin._routing = _routing(twin)
        twin._hooks = copy.deepcopy(self._hooks, memo)
        return twin

    def __reduce_ex__(self, protocol: int) -> Sequence:
        raise InputError("a model with experts attached cannot be pickled; call its detach_experts() first")


def _routing(attachment: Attachment) -> tuple[Any, Any]:
    # these import torch
    from freemerge.attached.derived import Derived
    from freemerge.attached.routing import Routing

    return Derived(attachment), Routing(attachment)


def _copied(place: Place, memo: dict) -> Place:
    return Place(place.name, tuple((copy.deepcopy(module, memo), name) for module, name in place.owners))
