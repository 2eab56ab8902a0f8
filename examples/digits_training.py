"""The training half of the demo: a small vision transformer, tasks on scikit-learn's handwritten digits, and experts.

Parameters carry the names and shapes of a Hugging Face ViT, and checkpoints are written and read by huggingface_hub.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from heads import linear_head
from huggingface_hub import load_torch_model, save_torch_state_dict
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

CONFIG = {
    "architectures": ["ViTModel"],
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:  # [B, N, width]
        query, key, value = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def under(**children: nn.Module) -> nn.Module:
    """A module that only lends its children the names of the Hugging Face layout."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, eps: float):
        super().__init__()
        self.attention = under(attention=SelfAttention(width, heads), output=under(dense=nn.Linear(width, width)))
        self.intermediate = under(dense=nn.Linear(width, hidden))
        self.output = under(dense=nn.Linear(hidden, width))
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention.output.dense(self.attention.attention(self.layernorm_before(x)))
        return x + self.output.dense(F.gelu(self.intermediate.dense(self.layernorm_after(x))))


class Encoder(nn.Module):
    """Images [B, 8, 8] of 0 to 1 -> features [B, width], read from a class token in front of the patches."""

    def __init__(self, config: dict = CONFIG):
        super().__init__()
        width, patch, eps = config["hidden_size"], config["patch_size"], config["layer_norm_eps"]
        patches = (config["image_size"] // patch) ** 2
        self.embeddings = under(
            patch_embeddings=under(projection=nn.Conv2d(config["num_channels"], width, patch, patch))
        )
        self.embeddings.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.embeddings.position_embeddings = nn.Parameter(torch.randn(1, 1 + patches, width) * 0.02)
        self.encoder = under(
            layer=nn.ModuleList(
                Layer(width, config["intermediate_size"], config["num_attention_heads"], eps)
                for _ in range(config["num_hidden_layers"])
            )
        )
        self.layernorm = nn.LayerNorm(width, eps)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embeddings.patch_embeddings.projection(images[:, None]).flatten(2).transpose(1, 2)
        x = (
            torch.cat([self.embeddings.cls_token.expand(len(images), -1, -1), tokens], dim=1)
            + self.embeddings.position_embeddings
        )
        for layer in self.encoder.layer:
            x = layer(x)
        return self.layernorm(x)[:, 0]


# ---- data and tasks ----


@dataclass(frozen=True)
class Digits:
    """Images [N, 8, 8] of 0 to 1 and labels [N] of 0 to 9; the test images are never trained on, by anyone."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls) -> "Digits":
        images, labels = load_digits(return_X_y=True)
        images = torch.tensor(images / 16, dtype=torch.float32).unflatten(1, (8, 8))
        halves = train_test_split(images, torch.tensor(labels), test_size=500, random_state=0, stratify=labels)
        return cls(train=(halves[0], halves[2]), test=(halves[1], halves[3]))


def parity(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return images, labels % 2


def below_five(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return images, (labels < 5).long()


def rotation(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which way up: a quarter turn, none, two or three, drawn for each image."""
    turns = torch.randint(4, (len(images),), generator=generator)
    return torch.stack([image.rot90(turn) for image, turn in zip(images, turns.tolist(), strict=True)]), turns


def inverted(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of the ten digits, white and black exchanged."""
    return 1 - images, labels


Task = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
TASKS: dict[str, Task] = {task.__name__: task for task in (parity, below_five, rotation, inverted)}


# ---- training ----


def train_base(images: Tensor, *, steps: int, seed: int = 0) -> Encoder:
    """Learn without labels: hide half of an image's patches and fill them in from the features of the rest."""
    torch.manual_seed(seed)
    encoder, decoder = Encoder(), nn.Linear(CONFIG["hidden_size"], 64)
    patches = CONFIG["image_size"] // CONFIG["patch_size"]

    def loss(generator: torch.Generator) -> Tensor:
        batch = images[torch.randint(len(images), (64,), generator=generator)]
        seen = torch.rand((len(batch), 1, patches, patches), generator=generator) < 0.5
        visible = batch * F.interpolate(seen.float(), scale_factor=CONFIG["patch_size"])[:, 0]
        return F.mse_loss(decoder(encoder(visible)), batch.flatten(1))

    parameters = [*encoder.parameters(), *decoder.parameters()]
    _minimise(loss, torch.optim.AdamW(parameters, 2e-3), steps, seed)
    return encoder


@torch.no_grad()
def fit_head(base: Encoder, task: Task, images: Tensor, labels: Tensor) -> nn.Linear:
    """A linear classifier of the base's features for `task`."""
    inputs, targets = task(images, labels, torch.Generator().manual_seed(0))
    return linear_head(base(inputs), targets)


def fine_tune(
    base: Encoder, head: nn.Linear, task: Task, images: Tensor, labels: Tensor, *, steps: int, seed: int = 0
) -> Encoder:
    """A copy of `base` with all of its weights trained on `task`."""
    encoder = deepcopy(base)

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(images), (64,), generator=generator)
        inputs, targets = task(images[chosen], labels[chosen], generator)
        return F.cross_entropy(head(encoder(inputs)), targets)

    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    _minimise(loss, optimizer, steps, seed, schedule)
    return encoder


def _minimise(
    loss: Callable[[torch.Generator], Tensor], optimizer: torch.optim.Optimizer, steps: int, seed: int, schedule=None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(generator).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


@torch.no_grad()
def accuracy(encoder: Encoder, head: nn.Linear, task: Task, images: Tensor, labels: Tensor) -> float:
    """Percent right."""
    inputs, targets = task(images, labels, torch.Generator().manual_seed(1))
    return 100 * (head(encoder(inputs)).argmax(1) == targets).float().mean().item()


# ---- checkpoints ----


def save_encoder(encoder: Encoder, folder: Path, *, max_shard_size: str = "5GB") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(encoder.state_dict(), folder, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))


def load_encoder(folder: Path) -> Encoder:
    encoder = Encoder()
    load_torch_model(encoder, folder)
    return encoder
