"""Interventions: each formula against itself written out for one vector; NumPy and torch alike."""

import numpy as np
import pytest

from freemerge.checkpoint.torch_arrays import from_torch, to_torch
from freemerge.errors import ShapeError
from freemerge.experts.interventions import INTERVENTIONS, at_position, lobireft, mini, noreft
from freemerge.testing import random_array

D, RANK = 13, 3
WRITTEN_OUT = {
    "NoReFT": lambda h, w1, b1, w2, b2: h + w2.T @ (np.tanh(w1 @ h + b1) - (w2 @ h + b2)),
    "NoDiReFT": lambda h, w1, b1, w2: h + w2.T @ np.tanh(w1 @ h + b1),
    "LoReFT": lambda h, r, w1, b1: h + r @ (np.tanh(w1 @ h + b1) - r.T @ h),
    "DiReFT": lambda h, r, w1, b1: h + r @ np.tanh(w1 @ h + b1),
    "ConsReFT": lambda h, r, b: h + r @ (b - r.T @ h),
    "LobiReFT": lambda h, r, b: h + r @ b,
}
SHAPES = {"w1": (RANK, D), "w2": (RANK, D), "r": (D, RANK), "b1": (RANK,), "b2": (RANK,), "b": (RANK,)}
NEEDED = {name: formula.__code__.co_varnames[1:] for name, formula in WRITTEN_OUT.items()}


def matrices(name):
    return {key: random_array(SHAPES[key], np.float32, ord(key[0]) + len(key) * 7, 0.3) for key in NEEDED[name]}


def written_out(name, h, given):
    vectors = [WRITTEN_OUT[name](v.astype(float), *given.values()) for v in h.reshape(-1, D)]
    return np.array(vectors).reshape(h.shape)


@pytest.mark.parametrize("shape", [(D,), (4, D), (2, 3, D)], ids=str)
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_as_written_out(name, shape):
    h, given = random_array(shape, np.float32, 1), matrices(name)
    activation = {"activation": np.tanh} if "w1" in given else {}
    found = INTERVENTIONS[name](h, **given, **activation)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, written_out(name, h, given), rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_torch_tensors_as_arrays(name):
    pytest.importorskip("torch")
    h, given = random_array((4, D), np.float32, 1), matrices(name)
    found = INTERVENTIONS[name](to_torch(h), **{key: to_torch(array) for key, array in given.items()})
    # sums of products in another order
    np.testing.assert_allclose(from_torch(found), INTERVENTIONS[name](h, **given), rtol=0, atol=3e-6)


def test_one_token_is_changed_and_the_input_is_not():
    hidden, given = random_array((5, 2, D), np.float32, 1), matrices("NoReFT")
    before = hidden.copy()
    found = at_position(hidden, 3, lambda h: noreft(h, **given))
    np.testing.assert_array_equal(hidden, before)
    np.testing.assert_array_equal(found[[0, 1, 2, 4]], before[[0, 1, 2, 4]])
    np.testing.assert_array_equal(found[3], noreft(before[3], **given))


@pytest.mark.parametrize("block", [0, 2])
def test_a_slice_of_the_vector(block):
    h, given = random_array((4, 3 * D), np.float32, 1), matrices("LobiReFT")
    found = mini(h, formula=lobireft, block=block, **given)
    piece = slice(block * D, (block + 1) * D)
    np.testing.assert_array_equal(found[:, piece], lobireft(h[:, piece], **given))
    others = np.delete(np.arange(3 * D), piece)
    np.testing.assert_array_equal(found[:, others], h[:, others])


def test_a_slice_that_is_not_there():
    with pytest.raises(ShapeError, match=r"hidden vectors of 20 have no slice \[13, 26\) for block 1"):
        mini(np.zeros((2, 20), np.float32), formula=lobireft, block=1, **matrices("LobiReFT"))
