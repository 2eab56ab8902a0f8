"""A module run again for the rows of each expert, with that expert's weights: right for any module, if not the fastest.

What runs is a twin that shares everything with the module but the tensors put in, so that other threads may run the
module meanwhile.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

from freemerge.errors import InputError

Tensors = Mapping[tuple[str, ...], Any]


def twin_of(module: Any, tensors: Tensors) -> Any:
    """`module` with other tensors in it.

    Args:
        tensors: by path from the module: ("weight",), or ("out_proj", "weight") for one of a child.
    """
    twin = copy.copy(module)
    twin._parameters, twin._buffers, twin._modules = (
        dict(module._parameters),
        dict(module._buffers),
        dict(module._modules),
    )
    inner: dict[str, dict] = {}
    for (name, *rest), tensor in tensors.items():
        if rest:
            inner.setdefault(name, {})[tuple(rest)] = tensor
        else:
            (twin._parameters if name in twin._parameters else twin._buffers)[name] = tensor
    for name, own in inner.items():
        twin._modules[name] = twin_of(module._modules[name], own)
    return twin


def run(twin: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Its forward, past the hooks of the module itself."""
    torch = sys.modules["torch"]
    why = "its forward was replaced on the instance (by accelerate, say)" if "forward" in vars(twin) else None
    if any(isinstance(value, torch.Tensor) for value in vars(twin).values()) and twin._forward_pre_hooks:
        why = "a hook makes its weights before each call (torch.nn.utils.weight_norm; parametrizations do so, too)"
    if why:
        raise InputError(f"a {type(twin).__name__} of whose own tensors experts touch some cannot be routed: {why}")
    return type(twin).forward(twin, *args, **kwargs)


def select(given: Any, rows: Any, n: int) -> Any:
    """The given arguments with these rows of every tensor that has `n` in its first dimension."""
    return _map(lambda t: t[rows] if t.ndim and t.shape[0] == n else t, given)


def put_rows(output: Any, part: Any, rows: Any, n: int, where: str) -> Any:
    """`output` with the given rows of each of its tensors replaced by those of `part`, which has them alone.

    Raises:
        InputError: it holds what has no rows.
    """

    def put(whole: Any, some: Any) -> Any:
        if whole is None or isinstance(whole, (bool, int, float, str)):
            return whole
        torch = sys.modules["torch"]
        if not isinstance(whole, torch.Tensor) or not whole.ndim or whole.shape[0] not in (n, 1):
            what = list(whole.shape) if isinstance(whole, torch.Tensor) else f"a {type(whole).__name__}"
            raise InputError(
                f"{where} answers {what}, of which rows cannot be told apart; its own tensors cannot be routed"
            )
        if whole.shape[0] == 1 < n:
            whole = whole.expand(n, *whole.shape[1:])
        # of one row for all: the part's row is that of each of its rows
        some = some.expand(len(rows), *some.shape[1:]) if some.shape[0] == 1 else some
        if some.shape[1:] != whole.shape[1:]:
            raise InputError(f"{where} answers {list(whole.shape)} for all rows, {list(some.shape)} for {len(rows)}")
        return whole.index_copy(0, rows, some.to(whole.dtype))

    return _map(put, output, part)


def first_tensor(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Among the arguments; None where there is none."""
    torch = sys.modules["torch"]
    return next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.ndim), None)


def check_stateless(args: tuple, kwargs: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a cache among the arguments, to which running again would add once more."""
    if any(hasattr(leaf, "get_seq_length") for leaf in (*args, *kwargs.values())):
        raise InputError(
            f"{where} keeps a cache, and experts touch tensors of its own: it cannot be routed with one; "
            "pass use_cache=False"
        )


def _map(function: Callable, tree: Any, *others: Any) -> Any:
    from torch.utils import _pytree

    leaves, spec = _pytree.tree_flatten(tree)
    more = [_pytree.tree_flatten(other)[0] for other in others]
    torch = sys.modules["torch"]
    if others:
        return _pytree.tree_unflatten([function(*items) for items in zip(leaves, *more, strict=True)], spec)
    return _pytree.tree_unflatten([function(t) if isinstance(t, torch.Tensor) else t for t in leaves], spec)
