"""load: a merged model, running, with its experts attached."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from freemerge.attached.attachment import attach
from freemerge.attached.opening import open_experts
from freemerge.checkpoint.reader import Checkpoint, open_checkpoint
from freemerge.checkpoint.torch_arrays import to_torch
from freemerge.errors import CheckpointError, InputError, UnavailableError, listed


def load(
    merged: str | os.PathLike,
    *,
    device: Any = None,
    dtype: Any = None,
    model_class: Any = None,
    experts: Any = None,
    verify: bool | None = None,
    **options: Any,
) -> Any:
    """The model of a merged folder, ready to run, with its experts attached (see `attach`).

        model = freemerge.load("merged", device="cuda")
        model.use_expert("math")

    Args:
        merged: what `freemerge merge` wrote with a method that leaves experts; with `experts`, any model.
        device: where the model goes, e.g. "cuda:1"; the CPU unless given.
        dtype: of its weights, a torch dtype or its name; that of the checkpoint unless given. Experts are then added
            to weights of this dtype.
        model_class: a transformers class, or anything with `from_pretrained`; else a callable that makes the module,
            whose state dict the checkpoint's tensors go into. The class that config.json names, unless given.
        experts: what is attached, see `attach`: adapters, or a list of the folder itself and adapters; the experts of
            the folder unless given.
        verify: how many of the loaded tensors are compared with the checksums written at the merge, see `attach`.
        options: passed on to `from_pretrained`, or to the callable.

    Raises:
        CheckpointError: the folder, its weights or its experts are damaged or do not belong together.
        InputError: no class is known; or the model has no place for what the experts change.
        UnavailableError: torch or transformers is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UnavailableError(f"load: {error}; pip install torch") from None
    merged = Path(merged)
    if not merged.is_dir():
        raise InputError(f"{merged} is not a folder of a merged model")
    dtype = _float_dtype(torch, dtype)
    # adapters fit a model or not, others are looked at before it is loaded
    found = open_experts(merged, None) if experts is None else experts
    make = model_class or _named_class(merged)
    if hasattr(make, "from_pretrained"):
        model = make.from_pretrained(merged, **({"dtype": dtype or "auto"} | options))
    else:
        model = _filled(make, merged, dtype, options)
    model = model.to(device) if device is not None else model
    return attach(model.eval(), found, verify=verify)


def _float_dtype(torch: Any, dtype: Any) -> Any:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(f"dtype {dtype!r}: a float type of torch, or its name, such as 'bfloat16'")
    return found


def _named_class(merged: Path) -> Any:
    """The transformers class of config.json's `architectures`."""
    with open_checkpoint(merged) as checkpoint:
        names = (checkpoint.config or {}).get("architectures") or []
    if not names:
        raise InputError(f"{merged}: config.json names no class; give model_class")
    try:
        import transformers
    except ImportError as error:
        raise UnavailableError(f"load: {error}; pip install transformers, or give model_class") from None
    found = getattr(transformers, names[0], None)
    if found is None:
        raise InputError(f"{merged}: transformers {transformers.__version__} has no {names[0]}; give model_class")
    return found


def _filled(make: Callable[..., Any], merged: Path, dtype: Any, options: dict) -> Any:
    model = make(**options)
    with open_checkpoint(merged) as checkpoint:
        _check_filled(model, checkpoint)
        tensors = {name: to_torch(checkpoint.read(name).copy()) for name in checkpoint.tensors}
    if dtype is None:  # as in the checkpoint, whatever the module was made in
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in tensors and tensor.is_floating_point():
                tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(tensors, strict=False)
    return model if dtype is None else model.to(dtype)


def _check_filled(model: Any, checkpoint: Checkpoint) -> None:
    wanted, found = model.state_dict(), checkpoint.tensors
    ties = _tied_names(wanted)
    problems = [f"{name}: missing from the checkpoint" for name in wanted if not ties[name] & found.keys()]
    problems += [f"{name}: not in a {type(model).__name__}" for name in found if name not in wanted]
    problems += [
        f"{name}: {list(found[name].shape)} in the checkpoint, {list(wanted[name].shape)} in the model"
        for name in wanted.keys() & found.keys()
        if tuple(found[name].shape) != tuple(wanted[name].shape)
    ]
    if problems:
        raise CheckpointError(
            listed(problems, "Give the model_class of this checkpoint.", outcome="nothing was loaded")
        )


def _tied_names(state_dict: dict) -> dict[str, set[str]]:
    groups: dict[Any, set[str]] = {}
    key = {name: (t.data_ptr(), tuple(t.shape)) if t.numel() else name for name, t in state_dict.items()}
    for name in state_dict:
        groups.setdefault(key[name], set()).add(name)
    return {name: groups[key[name]] for name in state_dict}
