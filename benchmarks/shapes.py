"""Shapes of tensors of real models, by the model and the tensor's role."""

SHAPES = {
    "clip-vit-b-32 mlp": (3072, 768),
    "llama-1b attention": (2048, 2048),
    "llama-1b mlp": (2048, 5632),
    "llama-8b mlp": (4096, 14336),
}
SMALL = "llama-1b attention"  # where references and peers are timed too

# What the high-pass filter meets in real models, square and oblong, both ways round
FILTERED = [
    (2048, 2048),
    (768, 3072),
    (3072, 768),
    (256, 2048),
    (2048, 5632),
    (5632, 2048),
    (4096, 4096),
    (4096, 11008),
    (4096, 14336),
]
