"""Real classification tasks from what lies on any machine with freemerge's test environment: the source files of the
standard library and of installed packages.

    raises    an error message                                        which exception it is raised with
    package   the first paragraph of a docstring, its names removed   which package it is from
    type      the description of a parameter                          int, float, bool, str, array or callable
    section   a paragraph of a docstring                              Parameters, Returns, Raises, Notes, ...
    topic     the first paragraph of a docstring                      what part of the standard library is about
    file      some lines of a file                                    code in Python or C++, text, JSON, a style sheet

A hash of a text says whether it is one to train on (five of eight), to choose parameters by (one) or to test on (two):
the same on every machine, and no text is two of these.
"""

import ast
import os
import re
import sysconfig
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("numpy", "scipy", "sklearn", "torch", "sympy", "networkx", "matplotlib", "transformers")
EXCEPTIONS = ("ValueError", "TypeError", "RuntimeError", "NotImplementedError", "ImportError", "AttributeError")
SECTIONS = ("Parameters", "Returns", "Raises", "Notes", "See Also", "Examples")
TYPES = {
    "int": r"int(eger)?\b",
    "float": r"(float|scalar|number)\b",
    "bool": r"bool(ean)?\b",
    "str": r"(str(ing)?\b|\{['\"])",
    "array": r"(array|ndarray|\(?sparse|tensor)",
    "callable": r"(callable|function)\b",
}
TOPICS = {
    "network": r"(http|urllib|email|smtplib|ftplib|imaplib|poplib|socket|socketserver|ssl|xmlrpc|ipaddress|wsgiref)",
    "concurrency": r"(asyncio|threading|multiprocessing|concurrent|queue|sched|subprocess|signal|selectors)",
    "files": r"(os|pathlib|posixpath|ntpath|shutil|tempfile|glob|fileinput|zipfile|tarfile|gzip|bz2|lzma|io|_pyio)",
    "language": r"(ast|inspect|dis|tokenize|importlib|pkgutil|types|typing|abc|functools|dataclasses|enum|code)",
    "testing": r"(unittest|doctest|pdb|bdb|trace|traceback|profile|pstats|timeit|logging|warnings)",
    "text": r"(re|json|csv|xml|html|string|textwrap|difflib|configparser|plistlib|codecs|locale|gettext|argparse)",
    "numbers": r"(decimal|fractions|statistics|random|datetime|_pydatetime|calendar|heapq|bisect|numbers|collections)",
}
SUFFIXES = {".py": "Python", ".h": "C++", ".pyi": "type stub", ".txt": "text", ".md": "text", ".json": "JSON"}
SUFFIXES |= {".css": "style sheet", ".mplstyle": "style sheet", ".f90": "Fortran"}
CHARACTERS = 300  # of a text
SITE, STANDARD = Path(find_spec("numpy").origin).parents[1], Path(sysconfig.get_path("stdlib"))


@dataclass(frozen=True)
class Split:
    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class TextTask:
    """A task: `labels` index `classes`."""

    name: str
    classes: list[str]
    train: Split
    validation: Split
    test: Split


def load_tasks(*, files: int = 100, per_class: int = 400) -> list[TextTask]:
    """The tasks.

    Args:
        files: Python files read of each package.
        per_class: texts of a class, at most.
    """
    sources = [*_package_files(files), *_standard_files()]
    read = [(owner, *_read(path)) for owner, path in sources]
    docstrings = [(owner, text) for owner, texts, _ in read for text in texts]
    found = {
        "raises": [pair for _, _, raised in read for pair in raised],
        "package": [(_anonymous(_first(text)), owner) for owner, text in docstrings if owner in PACKAGES],
        "type": [pair for _, text in docstrings for pair in _types(text)],
        "section": [pair for _, text in docstrings for pair in _sections(text)],
        "topic": [(_first(text), owner) for owner, text in docstrings if owner in TOPICS],
        "file": list(_chunks(2 * files)),
    }
    return [_task(name, pairs, per_class) for name, pairs in found.items()]


def _task(name: str, pairs: list[tuple[str, str]], per_class: int) -> TextTask:
    label_of: dict[str, str] = {}
    for text, label in pairs:
        label_of.setdefault(" ".join(text.split())[:CHARACTERS], label)
    by_class: dict[str, list[str]] = defaultdict(list)
    for text in sorted(label_of, key=_hash):
        if len(text) > 20 and len(by_class[label_of[text]]) < per_class:
            by_class[label_of[text]].append(text)
    classes = sorted(label for label, texts in by_class.items() if len(texts) >= per_class / 8)
    train, validation, test = (Split([], []) for _ in range(3))
    for label, name_of_class in enumerate(classes):
        for text in by_class[name_of_class]:
            split = (test, test, validation, *[train] * 5)[_hash("split" + text) % 8]
            split.texts.append(text)
            split.labels.append(label)
    return TextTask(name, classes, train, validation, test)


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


# ---- where texts come from


def _package_files(count: int) -> Iterator[tuple[str, Path]]:
    """(package, file), `count` of each, spread over it; tests left out."""
    for package in PACKAGES:
        paths = sorted(path for path in (SITE / package).rglob("*.py") if "test" not in str(path.relative_to(SITE)))
        yield from ((package, path) for path in paths[:: max(1, len(paths) // count)])


def _standard_files() -> Iterator[tuple[str, Path]]:
    """(topic, file) of the standard library."""
    for path in sorted(STANDARD.glob("*")):
        topics = [topic for topic, pattern in TOPICS.items() if re.fullmatch(pattern, path.stem)]
        for topic in topics:
            files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
            yield from ((topic, file) for file in files if file.suffix == ".py" and "test" not in file.parts)


def _read(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The docstrings of a file, and (message, exception) of what it raises."""
    docstrings, raised = [], []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
            docstrings.append(text)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            name, message = getattr(node.exc.func, "id", None), _text_of(node.exc.args[0])
            if name in EXCEPTIONS and message:
                raised.append((message, name))
    return docstrings, raised


def _first(docstring: str) -> str:
    return docstring.partition("\n\n")[0]


def _anonymous(text: str) -> str:
    """Without what would give the package away by its name."""
    return re.sub(rf"(?i)\b({'|'.join(PACKAGES)}|scikit-learn|np|plt|nx|pytorch|hugging ?face)\b", "it", text)


def _text_of(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    return None


def _sections(docstring: str) -> Iterator[tuple[str, str]]:
    """Paragraphs of a docstring in numpydoc's form, with the section they stand in."""
    parts = re.split(r"^(\w[\w ]+)\n-{3,}\n", docstring, flags=re.MULTILINE)
    for section, body in zip(parts[1::2], parts[2::2], strict=True):
        if section in SECTIONS:
            yield from ((paragraph, section) for paragraph in body.split("\n\n")[:3])


def _types(docstring: str) -> Iterator[tuple[str, str]]:
    for described, text in re.findall(r"^\w+ : (.+)\n((?:    .+\n?)+)", docstring, re.MULTILINE):
        kinds = [kind for kind, pattern in TYPES.items() if re.match(pattern, described)]
        if len(kinds) == 1:
            yield text, kinds[0]


def _chunks(files: int) -> Iterator[tuple[str, str]]:
    """Runs of lines from files of every kind; a few of each file."""
    paths: dict[str, list[Path]] = {suffix: [] for suffix in SUFFIXES}
    for folder, _, names in os.walk(SITE):
        for name in names:
            if (suffix := os.path.splitext(name)[1]) in paths:
                paths[suffix].append(Path(folder, name))
    for suffix, kind in SUFFIXES.items():
        for path in sorted(paths[suffix], key=lambda path: (_hash(path.name), path))[:files]:
            lines = path.read_text("utf-8", errors="replace").splitlines()[:2000]
            for start in range(len(lines) // 3, len(lines), max(8, len(lines) // 3)):
                yield "\n".join(lines[start : start + 8]), kind


if __name__ == "__main__":
    for task in load_tasks():
        counts = Counter(task.train.labels)
        print(f"{task.name}: {len(task.train.texts)} to learn from, {len(task.test.texts)} to test on")
        for label, name in enumerate(task.classes):
            example = next(text for text, its in zip(task.test.texts, task.test.labels, strict=True) if its == label)
            print(f"    {counts[label]:4} {name:20} {example[:90]}")
