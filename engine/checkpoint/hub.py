"""Models by their name on the Hugging Face hub, through huggingface_hub and its cache."""

from pathlib import Path

from freemerge.checkpoint.files import SIDE_FILES
from freemerge.errors import CheckpointError, UnavailableError, listed

SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
PICKLED = ("*.bin", "*.bin.index.json")
# Second copies of the weights in other layouts: tens of gigabytes that nobody would read.
IGNORED = ("*/*", "consolidated*", "*.fp16.*", "training_args.bin", "optimizer.bin", "scheduler.bin")


def download(name: str, revision: str | None, *, allow_pickle: bool) -> Path:
    """The directory of a snapshot of `name`: weights, config, tokenizer. What the cache has is not fetched again.

    Raises:
        CheckpointError: neither the hub nor the cache has it.
        UnavailableError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UnavailableError(
            f"{name} would be fetched with huggingface_hub, which is not installed ({error})"
        ) from None

    def fetch(weights):
        patterns = [*weights, *SIDE_FILES, "adapter_config.json", "README.md"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=list(IGNORED)))

    try:
        snapshot = fetch(SAFETENSORS)
        if allow_pickle and not any(snapshot.glob("*.safetensors")):
            snapshot = fetch(PICKLED)
    except Exception as error:  # from no network to no such repository: its own, httpx's and the system's errors
        raise CheckpointError(_explain(name, revision, error)) from None
    return snapshot


def _explain(name: str, revision: str | None, error: Exception) -> str:
    at = f" at revision {revision}" if revision else ""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    problem = f"{name}: no such local directory, and not found on the hub{at} or in its cache ({reason})"
    remedy = "Check the name; without a network (or with HF_HUB_OFFLINE=1) fetch it first where there is one: "
    return listed([problem], f"{remedy}hf download {name}{f' --revision {revision}' if revision else ''}")
