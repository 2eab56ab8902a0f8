"""mergekit, from PyPI, in an environment of its own: it pins what freemerge does not."""

import subprocess
import venv
from pathlib import Path

VERSION = "0.1.5"
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
# Its quickest settings on a CPU. The tokenizer, which the synthetic model has none of, is left out.
OPTIONS = ["--lazy-unpickle", "--async-write", "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]


def install(directory: Path) -> Path:
    """The path of mergekit-yaml, installed below `directory` if it is not there yet."""
    command = directory / "bin" / "mergekit-yaml"
    if not command.exists():
        venv.create(directory, with_pip=True)
        pip = [directory / "bin" / "python", "-m", "pip", "install", "-q", "-c", CONSTRAINTS, f"mergekit=={VERSION}"]
        subprocess.run(pip, check=True)
    return command


def command(mergekit_yaml: Path, recipe: Path, out: Path) -> list:
    return [mergekit_yaml, recipe, out, *OPTIONS]
