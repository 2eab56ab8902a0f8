"""freemerge: merge fine-tuned checkpoints of one base model at the speed of reading and writing the bytes."""

import importlib

# Resolved on first use: `import freemerge` costs nothing, and torch stays out until something needs it.
_HOME = {
    "merge": "freemerge.api",
    "merge_state_dicts": "freemerge.state_dicts",
    "Session": "freemerge.session",
    "attach": "freemerge.attached.attachment",
    "load": "freemerge.attached.load",
    "FreemergeError": "freemerge.errors",
}

__all__ = ["__version__", *_HOME]
__version__ = "0.2.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'freemerge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return sorted(__all__)
