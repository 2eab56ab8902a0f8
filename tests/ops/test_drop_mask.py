import numpy as np
import pytest

from freemerge.errors import ShapeError
from freemerge.kernels._masks import empty_mask, unpack_mask
from freemerge.kernels.dispatch import implementation, set_threads
from freemerge.kernels.drop_mask import draw_key, drop_mask, drop_mask_reference, keep_probabilities, philox
from freemerge.testing import FLOATS, random_array

KEY = (0x12345678, 0x9ABCDEF0)


def kept(expert, density, epsilon=0.0, key=KEY, base=None):
    mask = np.full_like(empty_mask(expert), 0xAA)
    drop_mask(base, expert, density=density, epsilon=epsilon, key=key, out=mask)
    return unpack_mask(mask, expert.shape)


def test_known_answers_of_philox():
    # Random123's kat_vectors, philox4x32 10 rounds: counter 0, key 0
    assert [hex(word) for word in philox((0, 0), 4)] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("n", [0, 1, 3, 63, 64, 1009, 200_003])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1 - 1e-12, 1.0])
def test_constant_probability_matches_reference(n, density):
    expert = np.empty(n, np.float32)
    out, expected = np.full_like(empty_mask(expert), 0xAA), empty_mask(expert)
    drop_mask_reference(None, expert, density, 0.0, KEY, expected)
    implementation("drop_mask", expert)(None, expert, density, 0.0, KEY, out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "shape", [(), (1,), (1009,), (70_001,), (30, 201), (5, 1), (0, 3), (3, 0), (9, 5, 3, 2)], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_ranked_probability_matches_reference(tied, dtype, shape):
    base, expert = (np.asarray(random_array(shape, dtype, seed=seed)) for seed in (0, 1))
    if tied:
        base, expert = (np.asarray(np.round(array.astype(np.float32))).astype(dtype) for array in (base, expert))
    out, expected = np.full_like(empty_mask(expert), 0xAA), empty_mask(expert)
    drop_mask_reference(base, expert, 0.5, 0.3, KEY, expected)
    implementation("drop_mask", expert)(base, expert, 0.5, 0.3, KEY, out)
    np.testing.assert_array_equal(out, expected)


def test_probabilities_rise_with_the_rank_along_dimension_one():
    expert = np.array([[3, -1, 2], [5, 5, 0]], np.float32)
    found = keep_probabilities(None, expert, 0.5, 0.2)
    np.testing.assert_allclose(found, [[0.7, 0.3, 0.5], [0.7, 0.5, 0.3]], rtol=1e-15)  # equals: the lower index higher
    assert keep_probabilities(None, expert[:, :1], 0.5, 0.2).tolist() == [[0.5], [0.5]]


def test_the_share_kept_is_the_density():
    n = 1_000_000
    share = kept(np.empty(n, np.float32), 0.3).mean()
    assert abs(share - 0.3) < 5 * np.sqrt(0.3 * 0.7 / n)  # five standard deviations


def test_the_share_kept_rises_with_the_magnitude():
    expert = np.tile(np.arange(1000, dtype=np.float32), (2000, 1))
    share = kept(expert, 0.5, 0.25).reshape(2000, 10, 100).mean(axis=(0, 2))
    expected = 0.25 + 0.5 * (np.arange(10) * 100 + 49.5) / 999
    np.testing.assert_allclose(share, expected, atol=5 * np.sqrt(0.25 / 200_000))  # five standard deviations at most


def test_neighbours_and_other_keys_are_independent():
    n = 400_000
    one, other = (kept(np.empty(n, np.float32), 0.5, key=draw_key(0, "w", t)) for t in (0, 1))
    for left, right in [(one[1:], one[:-1]), (one[4:], one[:-4]), (one, other)]:
        assert abs((left == right).mean() - 0.5) < 5 * 0.5 / np.sqrt(n)  # five standard deviations


def test_keys_differ_in_seed_name_and_expert():
    keys = {draw_key(seed, name, t) for seed in (0, 1, 11) for name in ("a", "b", "1\0a") for t in (0, 1, 11)}
    assert len(keys) == 27


def test_draws_do_not_depend_on_threads():
    expert = random_array((400, 500), np.float32, seed=0)
    results = set()
    for threads in (1, 2, 5):
        set_threads(threads)
        results.add((kept(expert, 0.4).tobytes(), kept(expert, 0.4, 0.1).tobytes()))
    set_threads(0)
    assert len(results) == 1


def test_rejects_what_is_no_probability():
    expert = np.zeros(3, np.float32)
    with pytest.raises(ShapeError, match=r"density 0.9 with epsilon 0.2"):
        drop_mask(None, expert, density=0.9, epsilon=0.2, key=KEY, out=empty_mask(expert))
