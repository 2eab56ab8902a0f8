"""What a merge has to have made of one tensor, in plain NumPy, written without a look at freemerge.

Methods that compare entries over the model are judged by the entries of the tensor alone, and methods that draw by a
draw of our own: of these the statistics agree, not the entries.
"""

from collections.abc import Callable, Iterator

import numpy as np

STATISTICS = ("ties_merging", "pcb", "dare_ties", "della")
# Of the root mean square of the update. Half for entries: peers round to bfloat16 at every step, where an update is of
# the size of a unit in the last place, and keep other ones of entries that are equal. Less than that unit is no error.
OF_ENTRIES, OF_STATISTICS, UNIT = 0.5, 0.15, 2**-8


def disagreements(name: str, base: np.ndarray, experts: list[np.ndarray], merged: np.ndarray) -> Iterator[str]:
    """In words: how `merged` is not what the merge `name` makes. All arrays are float32 of one shape."""
    if name not in EXPECTED:
        return
    task_vectors = np.array(experts) - base
    update, expected = merged - base, EXPECTED[name](base, task_vectors)
    if name not in STATISTICS:
        error = rms(update - expected)
        if error > max(OF_ENTRIES * rms(expected), UNIT * rms(base)):
            yield f"differs from {name} of the inputs by {error:.2g}, an update of {rms(expected):.2g}"
        return
    mean = task_vectors.mean(0)
    for what, measure in (("size", rms), ("agreement with the mean task vector", lambda x: cosine(x, mean))):
        found, ours = measure(update), measure(expected)
        if abs(found - ours) > OF_STATISTICS * ours:
            yield f"{what} of the update is {found:.3g}, that of {name} of the inputs {ours:.3g}"


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.mean(left * right, dtype=np.float64)) / (rms(left) * rms(right))


def largest(values: np.ndarray, first: float, last: float) -> np.ndarray:
    """The values whose rank by magnitude is between these shares of their number, the others 0."""
    order = np.argsort(-np.abs(values), axis=None, kind="stable")
    kept = np.zeros_like(values)
    chosen = order[int(first * values.size) : int(last * values.size)]
    kept.flat[chosen] = values.flat[chosen]
    return kept


def rescaled(kept: np.ndarray, task_vector: np.ndarray) -> np.ndarray:
    return kept * (np.abs(task_vector).sum() / np.abs(kept).sum())


def elected(vectors: np.ndarray) -> np.ndarray:
    """[T, ...]: the entries that agree in sign with their sum."""
    return np.where(vectors * np.where(vectors.sum(0) >= 0, 1, -1) > 0, vectors, 0)


def mean_of_present(vectors: np.ndarray) -> np.ndarray:
    return vectors.sum(0) / np.maximum((vectors != 0).sum(0), 1)


def ties(base: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return mean_of_present(elected(np.array([largest(vector, 0, 0.2) for vector in vectors])))


def breadcrumbs_ties(base: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return 0.3 * elected(np.array([largest(vector, 0.01, 0.91) for vector in vectors])).sum(0)


def dropped(vectors: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    draw = np.random.default_rng(0).random(vectors.shape)
    kept = np.where(draw < probabilities, vectors, 0)
    return elected(np.array([rescaled(*pair) for pair in zip(kept, vectors, strict=True)]))


def dare_ties(base: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return 0.3 * dropped(vectors, np.array(0.5)).sum(0)


def della(base: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    ranks = np.argsort(np.argsort(np.abs(vectors), axis=-1, kind="stable"), axis=-1)
    return mean_of_present(dropped(vectors, 0.35 + 0.3 * ranks / (vectors.shape[-1] - 1)))


def sce(base: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    variance = vectors.var(0)
    kept = vectors * (largest(variance, 0, 0.2 * (variance > 0).mean()) > 0)
    squares = np.array([rms(vector) ** 2 for vector in kept])
    weights = squares / squares.sum() if squares.sum() >= 1e-6 else np.full(len(vectors), 1 / len(vectors))
    shares = weights[:, None, None] * (elected(kept) != 0)
    return (kept * shares).sum(0) / np.maximum(shares.sum(0), 1e-6)


def model_stock(base: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    count = len(vectors)
    cosines = [cosine(vectors[s], vectors[t]) for t in range(count) for s in range(t)]
    share = count * np.mean(cosines) / (1 + (count - 1) * np.mean(cosines))
    return share * vectors.mean(0)


def pcb(base: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    sizes = np.array([np.clip(np.abs(v), *np.quantile(np.abs(v), (0.01, 0.99))) for v in vectors])
    low, high = (edge(sizes, axis=(1, 2), keepdims=True) for edge in (np.min, np.max))
    scores = np.exp(len(vectors) * ((sizes - low) / (high - low)) ** 2) * np.tanh(vectors * vectors.sum(0))
    floor, top = (np.quantile(scores, share, axis=(1, 2), keepdims=True) for share in (0.8, 1))
    shares = np.clip(scores - floor, 0, None) / (top - floor)
    return (np.sign(vectors) * sizes * shares).sum(0) / np.maximum(shares.sum(0), 1e-12)


EXPECTED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "task_arithmetic": lambda base, vectors: 0.3 * vectors.sum(0),
    "average": lambda base, vectors: vectors.mean(0),
    "ties": ties,
    "breadcrumbs_ties": breadcrumbs_ties,
    "ties_merging": ties,
    "dare_ties": dare_ties,
    "della": della,
    "sce": sce,
    "model_stock": model_stock,
    # nearly parallel: the arc is the straight line
    "slerp": lambda base, vectors: vectors.mean(0) / 2,
    "nuslerp": lambda base, vectors: vectors.mean(0),
    "pcb": pcb,
}
