"""`with model.routed(...)`: hooks on the modules that own what experts change, for as long as somebody routes."""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from freemerge.attached.active import STATES, Active
from freemerge.attached.assignment import Assignment, read_assignment
from freemerge.attached.gated import GatedLayers
from freemerge.attached.gates import Gates
from freemerge.attached.routes import Route, route_for
from freemerge.errors import InputError, listed

BATCHES = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "decoder_input_ids")
# Modules that answer once for all rows of a batch, like T5's position bias [1, heads, queries, keys]
FOR_ALL_ROWS = ("relative_attention_bias",)


class Routing:
    """The routes of a model with experts, and how many use them."""

    def __init__(self, attachment: Any):
        self._attachment = attachment
        self._routes: list[tuple[Any, Route]] = []
        self._gates: dict[int | None, GatedLayers] = {}
        self._hooks: list = []
        self._users = 0
        self._alone = threading.Lock()

    @contextmanager
    def run(self, assignment: Any, copies: int) -> Iterator[None]:
        """Forwards in this context (of this thread, and of what inherits its context variables) are routed."""
        if isinstance(assignment, Gates):
            state = Active(None, gates=self._gated(assignment))
        elif callable(assignment):
            state = Active(None, router=assignment, copies=copies)
        else:
            state = Active(self._read(assignment, copies))
        self._enter()
        token = STATES.set({**STATES.get(), id(self._attachment): state})
        try:
            yield
        finally:
            STATES.reset(token)
            self._leave()

    def begin_forward(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Of the whole model: ask the router, and compare the number of rows. Raises InputError."""
        state = STATES.get().get(id(self._attachment))
        if state is None or state.replaying is not None or state.gates is not None:
            return
        batch = _named(self._attachment.model, args, kwargs)
        if state.router is not None and not (state.work and _goes_on(batch)):
            state.route(self._ask(state, batch))
        rows = _rows(batch)
        if rows is not None:
            state.work.assignment.check_batch(rows)

    def _ask(self, state: Active, batch: Mapping[str, Any]) -> Assignment:
        # the router may run the model for features: those of the backbone
        others = {key: other for key, other in STATES.get().items() if key != id(self._attachment)}
        token = STATES.set(others)
        try:
            return self._read(state.router(batch), state.copies)
        finally:
            STATES.reset(token)

    def _read(self, given: Any, copies: int) -> Assignment:
        experts = self._attachment.found.experts
        found = read_assignment(given, tuple(experts), copies)
        if (found.groups != found.groups[:1]).any():
            used = [expert for expert, uses in zip(experts.values(), found.groups.any(axis=0), strict=True) if uses]
            names = {name for expert in used for name in expert.tensors}
            problems = [
                f"{n}: one answer for the whole batch" for n in sorted(names) if any(k in n for k in FOR_ALL_ROWS)
            ]
            if problems:
                raise InputError(listed(problems, "Run such experts one after the other.", outcome="nothing was run"))
        return found

    def _gated(self, gates: Gates) -> GatedLayers:
        with self._alone:
            self._make_routes()
            if gates.top_k not in self._gates:
                self._gates[gates.top_k] = GatedLayers(self._attachment, self._routes, gates)
            return self._gates[gates.top_k]

    def _make_routes(self) -> None:
        if not self._routes:
            self._routes = make_routes(self._attachment)

    def _enter(self) -> None:
        with self._alone:
            self._make_routes()
            if self._users == 0:
                self._hooks = [m.register_forward_hook(route, with_kwargs=True) for m, route in self._routes]
            self._users += 1

    def _leave(self) -> None:
        with self._alone:
            self._users -= 1
            if self._users == 0:
                for hook in self._hooks:
                    hook.remove()
                self._hooks = []


def make_routes(attachment: Any) -> list[tuple[Any, Route]]:
    """For each module that owns a tensor an expert changes, how it is routed.

    Raises:
        InputError: the model takes batches in another dimension than the first.
    """
    model = attachment.model
    second = [f"{path}: a {type(m).__name__} with batch_first=False" for path, m in model.named_modules() if _second(m)]
    if second:
        raise InputError(
            listed(second, "Rows are routed in the first dimension; use use_expert here.", outcome="nothing was run")
        )
    paths = {id(module): path for path, module in model.named_modules()}
    inside = {
        id(child): (module, tuple(path.split(".")))
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)  # which takes its projection's weights without calling it
        for path, child in module.named_modules()
        if path
    }
    names: dict[int, tuple[Any, dict]] = {}
    for name, place in attachment.places.items():
        for module, attribute in place.owners:
            owner, path = inside.get(id(module), (module, ()))
            names.setdefault(id(owner), (owner, {}))[1][(*path, attribute)] = name
    return [
        (module, route_for(attachment, module, f"{paths[key] or 'the model'} ({type(module).__name__})", own))
        for key, (module, own) in names.items()
    ]


def _second(module: Any) -> bool:
    return isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and not module.batch_first


def _named(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a forward was called with, by the names of its parameters."""
    try:
        bound = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs)
    except TypeError:
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    found = dict(list(bound.arguments.items())[1:])
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL:
            found |= {str(i): value for i, value in enumerate(found.pop(name, ()))}
    return found


def _rows(batch: Mapping[str, Any]) -> int | None:
    named = [batch[name] for name in BATCHES if batch.get(name) is not None]
    return next((v.shape[0] for v in (*named, *batch.values()) if getattr(v, "ndim", 0) and hasattr(v, "shape")), None)


def _goes_on(batch: Mapping[str, Any]) -> bool:
    """Whether this is a later step of a generation, whose rows were routed at the first."""
    cache = batch.get("past_key_values")
    if cache is None:
        return False
    return bool(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else True
