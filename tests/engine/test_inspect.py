"""freemerge inspect: numbers against plain NumPy, and a picture that is one."""

import builtins
import json

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from freemerge.cli import app
from freemerge.errors import InputError, PlanError, UnavailableError
from freemerge.inspect import inspect_models
from freemerge.kernels.high_pass import mask_reference
from freemerge.spectrum import energy_by_cutoff
from freemerge.testing import random_array, write_checkpoint

SHAPES = {"attention.weight": (32, 32), "mlp.weight": (48, 12), "mlp.bias": (48,), "odd.weight": (31, 17)}


def tensors(seed: int, dtype=np.float32) -> dict:
    return {name: random_array(shape, dtype, seed + i) for i, (name, shape) in enumerate(SHAPES.items())}


@pytest.fixture
def folders(tmp_path):
    base, expert = tensors(0), tensors(0)
    for i, (name, array) in enumerate(expert.items()):
        array += random_array(SHAPES[name], np.float32, 100 + i, scale=0.01)
        array[: len(array) // 2] = base[name][: len(array) // 2]
    counter = {"steps": np.arange(3)}
    write_checkpoint(tmp_path / "base", base | counter)
    write_checkpoint(tmp_path / "expert", expert | counter, shards=2)
    return str(tmp_path / "base"), str(tmp_path / "expert")


def by_tensor(rows):
    return {row.tensor: row for row in rows}


def test_without_base_tells_what_is_stored(folders):
    rows = by_tensor(inspect_models([folders[0]]))
    assert rows["mlp.weight"].shape == (48, 12)
    assert rows["mlp.weight"].rms is None
    assert rows["steps"].dtype == "int64"
    assert rows["(total)"].nbytes == 4 * sum(np.prod(shape) for shape in SHAPES.values()) + 24


@pytest.mark.parametrize("inner_ring", ["clean", "official"])
@pytest.mark.parametrize("radius_from", ["min", "max", "diagonal"])
def test_numbers_are_those_of_numpy(folders, tmp_path, radius_from, inner_ring):
    from safetensors.numpy import load_file

    base = load_file(f"{folders[0]}/model.safetensors")
    expert = {}
    for shard in (tmp_path / "expert").glob("*.safetensors"):
        expert |= load_file(shard)
    mask = {"cutoff": 0.6, "radius_from": radius_from, "inner_ring": inner_ring}
    rows = by_tensor(inspect_models([folders[1]], folders[0], **mask))
    for name, shape in SHAPES.items():
        tau, row = (expert[name] - base[name]).astype(np.float64), rows[name]
        # float64 sums of float32 differences
        assert row.rms == pytest.approx(np.sqrt(np.mean(tau**2)), rel=1e-12)
        assert row.max_abs == np.abs(tau).max()
        assert row.unchanged == np.mean(tau == 0)
        if len(shape) < 2:
            assert row.energy_removed is None
            continue
        gain = mask_reference(shape, *mask.values())
        removed = np.fft.ifft2((1 - gain) * np.fft.fft2(tau)).real
        assert row.coefficients_removed == np.mean(gain == 0)
        # the filter works in float32: about 1e-7 of the task vector, and both are squared
        assert row.energy_removed == pytest.approx(np.sum(removed**2) / np.sum(tau**2), rel=1e-5, abs=1e-12)
    assert rows["steps"].rms is None


def test_total_is_that_of_all_tensors_together(folders):
    rows = inspect_models([folders[1]], folders[0])
    moved, total = [row for row in rows[:-1] if row.rms is not None], rows[-1]
    squares = [row.rms**2 * np.prod(row.shape) for row in moved]
    assert total.rms == pytest.approx(np.sqrt(sum(squares) / sum(np.prod(row.shape) for row in moved)))
    assert total.max_abs == max(row.max_abs for row in moved)
    assert total.energy_removed == pytest.approx(
        sum((r.energy_removed or 0) * s for r, s in zip(moved, squares, strict=True)) / sum(squares)
    )


def test_a_model_that_is_the_base_has_not_moved(folders):
    total = inspect_models([folders[0]], folders[0])[-1]
    assert (total.rms, total.unchanged, total.energy_removed) == (0.0, 1.0, 0.0)


def test_bfloat16_model_of_a_float32_base(folders, tmp_path):
    narrow = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors(0).items()}
    write_checkpoint(tmp_path / "narrow", narrow | {"steps": np.arange(3)})
    rows = by_tensor(inspect_models([str(tmp_path / "narrow")], folders[0]))
    base = tensors(0)["mlp.weight"]
    assert rows["mlp.weight"].max_abs == np.abs(narrow["mlp.weight"].astype(np.float32) - base).max()


def test_all_that_does_not_fit_is_named(folders, tmp_path):
    other = tensors(0) | {"mlp.weight": np.zeros((2, 2), np.float32), "extra": np.zeros(1, np.float32)}
    write_checkpoint(tmp_path / "other", other)
    with pytest.raises(PlanError) as raised:
        inspect_models([str(tmp_path / "other")], folders[0])
    for part in ("mlp.weight: [48, 12] in the base, [2, 2]", "extra: not in", "steps: not in"):
        assert part in str(raised.value)


def test_picture(folders, tmp_path):
    inspect_models([folders[1], folders[0]], folders[0], spectrum=tmp_path / "new" / "spectra.png")
    assert (tmp_path / "new" / "spectra.png").read_bytes().startswith(b"\x89PNG")


def test_picture_without_matplotlib_says_how_to_get_it(folders, tmp_path, monkeypatch):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("no matplotlib here")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(UnavailableError, match=r"freemerge\[plots\]"):
        inspect_models([folders[1]], folders[0], spectrum=tmp_path / "spectra.png")


def test_picture_needs_a_base(folders, tmp_path):
    with pytest.raises(InputError, match="--base"):
        inspect_models([folders[1]], spectrum=tmp_path / "spectra.png")


@pytest.mark.parametrize("radius_from", ["min", "max", "diagonal"])
@pytest.mark.parametrize("shape", [(40, 40), (64, 16), (17, 31)])
def test_curve_meets_the_mask(shape, radius_from):
    power = np.random.default_rng(0).random(shape).astype(np.float32)
    # the mask rounds radius and distances to float32, and the curve's bins are half-open: a cutoff no distance lies on
    kept = energy_by_cutoff(power, radius_from, np.array([0.6123]))[0]
    mask = mask_reference(shape, 0.6123, radius_from, "clean")
    assert kept == pytest.approx(power[mask == 1].sum(dtype=np.float64) / power.sum(dtype=np.float64), rel=1e-12)


def test_command_line(folders):
    answer = CliRunner().invoke(app, ["inspect", folders[1], "--base", folders[0], "--json"])
    assert answer.exit_code == 0
    assert {row["tensor"] for row in json.loads(answer.stdout)} == {*SHAPES, "steps", "(total)"}
    table = CliRunner().invoke(app, ["inspect", folders[0]]).stdout
    assert "mlp.weight" in table
    assert "rms" not in table
