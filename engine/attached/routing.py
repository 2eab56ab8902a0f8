"""`with model.routed(...)`: hooks on the modules that own what experts change, for as long as somebody routes."""

import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from freemerge.attached.active import STATES, Active
from freemerge.attached.assignment import Assignment, read_assignment
from freemerge.attached.direct import taken_directly
from freemerge.attached.gated import GatedLayers
from freemerge.attached.gates import Gates
from freemerge.attached.position_bias import EMBEDDING, PositionBiasRoute, computes_bias
from freemerge.attached.replay_route import ReplayRoute
from freemerge.attached.route import ALONE, Hook, Route
from freemerge.attached.routes import route_for
from freemerge.errors import InputError, listed

BATCHES = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "decoder_input_ids")


class Routing:
    """The routes of a model with experts, and how many use them."""

    def __init__(self, attachment: Any):
        self._attachment = attachment
        self._routes: list[tuple[Any, Route]] | None = None
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
        _check_not_compiled(self._attachment.model)
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
        if state is None or state.replaying:
            return
        _check_not_called_by_compiled()
        if state.gates is not None:
            return
        batch = _named(self._attachment.model, args, kwargs)
        state.begin(batch)
        if state.router is not None and not (state.work and _goes_on(batch)):
            found = self._ask(state, batch)
            # the router may have seen the copies already, each a row
            state.route(replace(found, copies=1) if len(found.weights) == _rows(batch) else found)
        rows = _rows(batch)
        if rows is not None:
            state.work.assignment.check_batch(rows)

    def _begin_encoder(self, encoder: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Called by itself, as `generate` does at first, before there are copies."""
        state = STATES.get().get(id(self._attachment))
        if state is None or state.replaying or state.gates is not None or self._attachment.in_forward:
            return
        batch = _named(encoder, args, kwargs)
        state.begin(batch)
        if state.router is not None:
            state.route(self._ask(state, batch))
        rows, assignment = _rows(batch), state.work.assignment
        if rows == len(assignment.weights):
            state.encode(Assignment(assignment.weights))
        elif rows is not None:
            assignment.check_batch(rows)

    def _end_encoder(self, *_: Any) -> None:
        state = STATES.get().get(id(self._attachment))
        if state is not None and not self._attachment.in_forward:
            state.encode(None)

    def _ask(self, state: Active, batch: Mapping[str, Any]) -> Assignment:
        # the router may run the model for features: those of the backbone
        others = {key: other for key, other in STATES.get().items() if key != id(self._attachment)}
        token = STATES.set(others)
        try:
            return self._read(state.router(batch), state.copies)
        finally:
            STATES.reset(token)

    def _read(self, given: Any, copies: int) -> Assignment:
        found = read_assignment(given, tuple(self._attachment.found.experts), copies)
        if (found.groups != found.groups[:1]).any():
            used = [
                e for e, uses in zip(self._attachment.found.experts.values(), found.groups.any(0), strict=True) if uses
            ]
            shared = {name for expert in used for name in expert.tensors} & self._for_all_rows()
            if shared:
                problems = [f"{name}: one answer for the whole batch" for name in sorted(shared)]
                raise InputError(listed(problems, "Run such experts one after the other.", outcome="nothing was run"))
        return found

    def _gated(self, gates: Gates) -> GatedLayers:
        routes = self.routes
        with self._alone:
            if gates.top_k not in self._gates:
                self._gates[gates.top_k] = GatedLayers(self._attachment, routes, gates)
            return self._gates[gates.top_k]

    def _for_all_rows(self) -> set[str]:
        """Tensors that make one answer for all rows of a batch, in a way that is not known."""
        routes = [route for _, route in self.routes if not isinstance(route, PositionBiasRoute)]
        return {name for route in routes for name in route.names.values() if EMBEDDING in name}

    @property
    def routes(self) -> list[tuple[Any, Route]]:
        with self._alone:
            if self._routes is None:
                self._routes = make_routes(self._attachment)
            return self._routes

    def _enter(self) -> None:
        routes = self.routes
        with self._alone:
            if self._users == 0:
                self._hooks = [route.install(module) for module, route in routes]
                encoder = _encoder(self._attachment.model)
                if encoder is not None:
                    self._hooks += [
                        encoder.register_forward_pre_hook(Hook(self._begin_encoder), with_kwargs=True),
                        encoder.register_forward_hook(Hook(self._end_encoder), always_call=True),
                    ]
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
    taken = {id(module): taken_directly(module) for module in model.modules()}
    inside = {
        id(module.get_submodule(".".join(path))): (module, path)
        for module in model.modules()
        for path, always in taken[id(module)].items()
        if always
    }
    inside |= {id(getattr(m, EMBEDDING)): (m, (EMBEDDING,)) for m in model.modules() if computes_bias(m)}
    names: dict[int, dict] = {}
    for name, place in attachment.places.items():
        for module, attribute in place.owners:
            owner, path = inside.get(id(module), (module, ()))
            names.setdefault(id(owner), {})[(*path, attribute)] = name
    routes: dict[int, Route] = {}
    for path, module in reversed(list(model.named_modules())):  # children first
        own = names.get(id(module), {})
        children = {child: id(module.get_submodule(".".join(child))) for child in taken[id(module)]}
        maybe = {child: routes[key] for child, key in children.items() if key in routes}
        if own and isinstance(module, nn.RNNBase):
            raise InputError(
                f"{path or 'the model'}: the states of a {type(module).__name__} have rows second; {ALONE}"
            )
        if own or maybe:
            label = f"{path or 'the model'} ({type(module).__name__})"
            routes[id(module)] = _route(attachment, module, label, own, maybe)
    return [(module, routes[id(module)]) for module in model.modules() if id(module) in routes]


def _route(attachment: Any, module: Any, label: str, own: Mapping, taken: Mapping) -> Route:
    if taken:
        return ReplayRoute(attachment, label, own, taken)
    if computes_bias(module) and {path[0] for path in own} == {EMBEDDING}:
        return PositionBiasRoute(attachment, label, own)
    return route_for(attachment, module, label, own)


_COMPILED = (
    "routing works by hooks of the modules, which compiled code passes by: route the model that was given to "
    "torch.compile, or a copy that is not compiled; use_expert works for both"
)


def _check_not_compiled(model: Any) -> None:
    """Raises InputError where a module of the model is compiled in itself."""
    for path, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
            raise InputError(f"{path or 'the model'} is compiled: {_COMPILED}")


def _check_not_called_by_compiled() -> None:
    """Raises InputError where a frame of torch.compile's is on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper":
            raise InputError(f"the model is called through torch.compile: {_COMPILED}")
        frame = frame.f_back


def _encoder(model: Any) -> Any:
    """Of an encoder-decoder of transformers, whose `generate` calls it past the model; else None."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        return model.get_encoder()
    return None


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
    """Whether this is a later step of a generation, whose rows were routed at the first, or by the encoder."""
    if batch.get("encoder_outputs") is not None:
        return True
    cache = batch.get("past_key_values")
    if cache is None:
        return False
    return bool(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else True
