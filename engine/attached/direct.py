"""Which modules take the weights of a child without calling it, so that no hook of the child would see them used."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

# Of a tensor; asking for these is no use of its numbers
_FACTS = frozenset({"dtype", "device", "shape", "ndim", "size", "dim", "numel", "data_ptr", "requires_grad", "is_cuda"})
# Methods that no forward calls
_SETUP = ("__init__", "_init", "init_", "reset_", "tie_", "_tie", "set_", "resize_", "_resize", "extra_repr", "prune_")
_SETUP += ("get_position_embeddings",)
# Classes that have children of no use of their own, or that call them where they have hooks (torch's fast path)
_OTHERS = ("torch.nn.modules.module", "torch.nn.modules.transformer", "transformers.modeling_utils")

Path = tuple[str, ...]


def taken_directly(module: Any) -> dict[Path, bool]:
    """Paths of the children whose tensors `module` may take itself: ("out_proj",).

    By the source of its class; and children that cannot be called, such as an nn.ParameterList.

    True where it always does, as it never calls the child, or may do both at once (an embedding that is the head, too);
    else it may in some of its calls, or never.
    """
    chains, found = _chains(type(module)), _uncallable(module)
    for chain in chains:
        child = module
        for i, name in enumerate(chain):
            if i and (name in child._parameters or name in child._buffers):
                if chain[i + 1 : i + 2] not in [(fact,) for fact in _FACTS]:
                    found[chain[:i]] = chain[:i] not in chains or isinstance(child, nn.Embedding)
                break
            child = child._modules.get(name)
            if child is None:
                break
    return found


def _uncallable(module: Any) -> dict[Path, bool]:
    """Paths of the children without a forward, and of theirs."""
    found = {}
    for name, child in module.named_children():
        if type(child).forward is nn.Module.forward and type(module).forward is not nn.Module.forward:
            found |= {(name,): True} | {(name, *path): True for path in _lists_in(child)}
    return found


def _lists_in(module: Any) -> Iterator[Path]:
    for name, child in module.named_children():
        if type(child).forward is nn.Module.forward:
            yield from [(name,), *((name, *path) for path in _lists_in(child))]


@cache
def _chains(kind: type) -> frozenset[Path]:
    """Whatever its methods read of `self`: ("conv1d", "weight", "squeeze")."""
    found: set[Path] = set()
    for each in kind.__mro__:
        if each.__module__ in _OTHERS:
            break
        for name, method in vars(each).items():
            if inspect.isfunction(method) and getattr(kind, name) is method and not name.startswith(_SETUP):
                found |= _read_by(method)
    return frozenset(found)


def _read_by(method: Any) -> set[Path]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method))))
    except (OSError, SyntaxError, TypeError):  # there is no source
        return set()
    owner = next(iter(inspect.signature(method).parameters), "self")
    passed_by = {id(node) for parent in ast.walk(tree) for node in _passed_by(parent)}
    used = (node for node in ast.walk(tree) if id(node) not in passed_by)
    return {_chain(node, owner) for node in used if isinstance(getattr(node, "ctx", None), ast.Load)} - {()}


def _chain(node: ast.AST, owner: str) -> Path:
    """The names that follow `owner`, which is self."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == owner else ()


def _passed_by(node: ast.AST) -> list[ast.AST]:
    """Parts of an expression that are but the way to it, or whose numbers it does not use."""
    if isinstance(node, ast.Attribute):
        return [node.value]
    if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        return [node.left]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
        return node.args
    return []
