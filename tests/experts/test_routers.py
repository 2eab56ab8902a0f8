"""Routers: which expert each row gets, how sure they are, their files, and what they refuse."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import freemerge
from freemerge import cli
from freemerge.checkpoint.verify import verify
from freemerge.errors import CheckpointError, InputError, OutputError
from freemerge.kernels.array import BFLOAT16
from freemerge.routers import (
    FunctionRouter,
    LastHiddenMean,
    MlpRouter,
    PrototypeRouter,
    collect_features,
    load_router,
    mlp_training,
)
from freemerge.routers.assignment import choose
from freemerge.routers.half_dropout import HalfDropout
from freemerge.testing import tiny_llama, tiny_llama_config, write_checkpoint, write_safetensors

EXPERTS = ("math", "code", "law")
WIDTH = 12


def clusters(rows=20, seed=0, spread=0.3, width=WIDTH):
    """Features of three tasks around directions of their own, all far from zero: a mapping by expert."""
    random = np.random.default_rng(seed)
    common = 5 * np.ones(width)
    middles = np.random.default_rng(99).standard_normal((len(EXPERTS), width))
    return {
        name: (common + middle + spread * random.standard_normal((rows, width))).astype(np.float32)
        for name, middle in zip(EXPERTS, middles, strict=True)
    }


def flat(examples):
    """Features and labels of a mapping, row by row."""
    labels = [name for name, rows in examples.items() for _ in rows]
    return np.concatenate(list(examples.values())), labels


@pytest.fixture(scope="module")
def mlp():
    return MlpRouter.fit(clusters(40), hidden=(16, 16), epochs=60, learning_rate=5e-3, batch=32)


@pytest.fixture(params=["prototype", "mlp"])
def router(request, mlp):
    """A fresh one, as tests may calibrate it."""
    if request.param == "prototype":
        return PrototypeRouter.fit(clusters(4))
    return MlpRouter.of(mlp.experts, {name: array.copy() for name, array in mlp.arrays.items()}, slope=mlp.slope)


def test_the_right_expert_for_rows_never_seen(router):
    features, labels = flat(clusters(50, seed=1))
    assert router.assign(features) == labels


def test_prototypes_are_the_means_and_logits_the_cosines_to_them():
    examples = clusters(5)
    router = PrototypeRouter.fit(examples)
    means = np.stack([rows.astype(np.float64).mean(axis=0) for rows in examples.values()])
    center = means.mean(axis=0)
    features = clusters(3, seed=7)["code"].astype(np.float64)
    a, b = features - center, means - center
    cosines = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    # float32 of a difference of numbers near 5: 3e-7 of them, relative to differences near 1
    np.testing.assert_allclose(router.logits(features), cosines, atol=5e-6)
    powers = np.exp(cosines / 0.1)
    np.testing.assert_allclose(router.probabilities(features), powers / powers.sum(axis=1, keepdims=True), atol=1e-4)


def test_a_prototype_router_without_center_compares_plain_directions():
    router = PrototypeRouter.fit({"a": np.eye(2)[:1], "b": np.eye(2)[1:]}, centered=False)
    np.testing.assert_allclose(
        router.logits(np.array([[3.0, 4.0], [0, 0], [1e30, 0], [1e-30, 0]])),
        [[0.6, 0.8], [0, 0], [1, 0], [1, 0]],
        rtol=1e-6,
    )


def test_one_expert_is_always_picked():
    router = PrototypeRouter.fit({"math": clusters()["math"]})
    assert router.assign(clusters(2, seed=3)["law"]) == ["math", "math"]


def test_examples_may_come_with_labels_or_from_a_loader():
    examples = clusters(6)
    features, labels = flat(examples)
    of_mapping = PrototypeRouter.fit(examples)
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = [EXPERTS.index(labels[i]) for i in order]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(features[order]), torch.tensor(shuffled)), batch_size=4
    )
    of_loader = PrototypeRouter.fit(loader, experts=EXPERTS)
    np.testing.assert_allclose(of_loader.arrays["prototypes"], of_mapping.arrays["prototypes"], rtol=1e-6)
    of_labels = PrototypeRouter.fit(features, labels)
    assert of_labels.experts == ("code", "law", "math")  # sorted, unless an order is given
    assert PrototypeRouter.fit(features, labels, experts=EXPERTS).experts == EXPERTS


# -- the small network


@pytest.mark.parametrize("variant", ["lm", "vit", "vit_mlp"])
def test_the_folded_layers_answer_what_the_trained_network_does(variant, monkeypatch):
    kept, folded = [], mlp_training._folded
    monkeypatch.setattr(mlp_training, "_folded", lambda network: kept.append(network) or folded(network))
    router = MlpRouter.fit(clusters(), variant=variant, epochs=2, batch=16)
    features = flat(clusters(5, seed=1))[0]
    with torch.no_grad():
        expected = kept[0].eval()(torch.from_numpy(features)).numpy()
    # two orders of float32 sums over at most 512 terms near 1
    np.testing.assert_allclose(router.logits(features), expected, rtol=1e-5, atol=1e-5)


def test_the_official_networks_have_the_official_shapes():
    def network(variant, width):
        shape = mlp_training.VARIANTS[variant]
        return mlp_training._network(width, shape.hidden(width), 8, shape)

    def linears(variant, width):
        return [(m.in_features, m.out_features) for m in network(variant, width) if isinstance(m, torch.nn.Linear)]

    assert linears("lm", 12) == [(12, 24), (24, 24), (24, 8)]
    assert linears("vit", 512) == [(512, 256), (256, 8)]
    assert linears("vit_mlp", 768) == [(768, 512), (512, 256), (256, 8)]
    names = [type(module).__name__ for module in network("lm", 12)]
    assert names == ["Linear", "BatchNorm1d", "LeakyReLU", "HalfDropout"] * 2 + ["Linear"]
    activations = [m for m in network("lm", 12) if isinstance(m, (torch.nn.LeakyReLU, torch.nn.Dropout))]
    assert [getattr(m, "p", getattr(m, "negative_slope", None)) for m in activations] == [0.01, 0.5, 0.01, 0.5]


def test_training_depends_on_the_seed_and_leaves_torch_as_it_was():
    def fit(seed):
        return MlpRouter.fit(clusters(), hidden=(8,), epochs=3, batch=16, seed=seed).arrays

    state = torch.random.get_rng_state()
    first = fit(1)
    torch.rand(5)
    with torch.inference_mode():
        again = fit(1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["layers.0.weight"], fit(2)["layers.0.weight"])
    torch.random.set_rng_state(state)
    fit(3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_ends_where_there_is_little_left_to_learn():
    def fit(**options):
        return MlpRouter.fit(clusters(), hidden=(8,), batch=16, learning_rate=0.01, **options).arrays["layers.0.weight"]

    last = fit(epochs=100, enough=0.2)
    fits = [fit(epochs=epochs, enough=0) for epochs in range(1, 30)]
    assert 3 < next(i for i, weight in enumerate(fits) if np.array_equal(weight, last)) < 28


def test_dropout_keeps_half_of_the_entries_and_twice_their_size():
    dropout = HalfDropout()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.full((101, 103), 1.5, requires_grad=True)
        y = dropout(x)
        assert not torch.equal(y, dropout(x))
    assert set(y.unique().tolist()) == {0.0, 3.0}
    assert abs((y > 0).float().mean() - 0.5) < 0.025  # five standard deviations
    for along in (0, 1):  # no row or column is treated otherwise: six standard deviations
        assert ((y > 0).float().mean(along) - 0.5).abs().max() < 0.3
    y.sum().backward()
    assert torch.equal(x.grad, (y > 0) * 2.0)
    assert dropout.eval()(x) is x


def test_a_last_row_alone_joins_the_batch_before():
    sizes = [len(rows) for rows in mlp_training._batches(torch.arange(33), 8)]
    assert sizes == [8, 8, 8, 9]
    assert [len(rows) for rows in mlp_training._batches(torch.arange(34), 8)] == [8, 8, 8, 8, 2]
    assert [len(rows) for rows in mlp_training._batches(torch.arange(1), 8)] == [1]
    MlpRouter.fit(clusters(11), hidden=(4,), epochs=1, batch=32)  # 33 rows: batch norm would refuse one alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "vlm"}, "no router variant 'vlm': there are lm, vit, vit_mlp"),
        ({"hidden": (0,)}, "widths of layers"),
        ({"epochs": 0}, "above 0"),
        ({"batch": 1}, "above 1"),
        ({"enough": float("nan")}, "enough nan: a loss"),
        ({"learning_rate": 1e30, "hidden": (4,), "epochs": 5}, "diverged"),
        ({"top_k": 4, "epochs": 1}, "top_k 4: from 1 to 3"),
    ],
)
def test_bad_training_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        MlpRouter.fit(clusters(), **options)


# -- hard, top-k, soft


def test_choose_hard_top_k_and_soft():
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2], [0.36, 0.33, 0.31]])
    assert choose(p, EXPERTS, 1, 0.0) == ["math", "law", "math", "math"]
    assert choose(p, EXPERTS, 1, 0.4) == ["math", "law", "math", None]
    two = choose(p, EXPERTS, 2, 0.4)
    assert two.dtype == np.float32
    np.testing.assert_allclose(two, [[0.625, 0.375, 0], [0, 2 / 9, 7 / 9], [0.5, 0.5, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(choose(p, EXPERTS, None, 0.4), [*p[:3], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(choose(p, EXPERTS, 3, 0.0), p, rtol=1e-6)


def test_a_batch_of_no_rows_gets_an_empty_assignment(router):
    empty = np.zeros((0, WIDTH), np.float32)
    assert router.assign(empty) == []
    router.top_k = None
    assert router.assign(empty).shape == (0, 3)


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "tensor", "bfloat16 tensor", "list"])
def test_features_in_any_float_type(router, kind):
    features, labels = flat(clusters(3, seed=1))
    convert = {
        "float64": lambda: features.astype(np.float64),
        "bfloat16": lambda: features.astype(BFLOAT16),
        "tensor": lambda: torch.from_numpy(features).requires_grad_(),
        "bfloat16 tensor": lambda: torch.from_numpy(features).bfloat16(),
        "list": features.tolist,
    }
    assert router.assign(convert[kind]()) == labels


def test_the_arithmetic_is_the_same_on_tensors(router):
    features = torch.from_numpy(flat(clusters(3, seed=1))[0])
    arrays = {name: torch.from_numpy(array) for name, array in router.arrays.items()}
    # as on a GPU; one order of sums against another
    np.testing.assert_allclose(router._forward(features, arrays).numpy(), router.logits(features), rtol=1e-4, atol=1e-5)


# -- calibration


def noisy_logits(n=4000, seed=0, sharpness=4.0):
    """Logits whose true temperature is `sharpness`: labels are drawn from softmax(logits / sharpness)."""
    random = np.random.default_rng(seed)
    logits = sharpness * random.standard_normal((n, 3)) * 2
    p = np.exp(logits / sharpness)
    p /= p.sum(axis=1, keepdims=True)
    labels = (p.cumsum(axis=1) > random.random((n, 1))).argmax(axis=1)
    return logits.astype(np.float32), labels


class Given(PrototypeRouter):
    """Answers its features as logits."""

    def _forward(self, features, arrays):
        return features


def given():
    return Given(EXPERTS, np.eye(3, dtype=np.float32), np.zeros(3, np.float32))


def test_calibration_finds_the_true_temperature():
    logits, labels = noisy_logits()
    router = given()
    report = router.calibrate(logits, labels)
    assert report.temperature == router.temperature == pytest.approx(4.0, rel=0.06)  # 4000 rows: about 2 % either way
    assert report.nll < report.nll_before
    assert (report.threshold, report.coverage, report.rows) == (0.0, 1.0, 4000)
    other, others = noisy_logits(seed=1)
    confidence = router.probabilities(other).max(axis=1)
    right = router.probabilities(other).argmax(axis=1) == others
    for low, high in ((0.4, 0.6), (0.6, 0.8), (0.8, 1.0)):
        bucket = (confidence >= low) & (confidence < high)
        assert right[bucket].mean() == pytest.approx(confidence[bucket].mean(), abs=0.05)  # of some 1000 rows


def test_the_temperature_is_where_the_likelihood_is_greatest():
    logits, labels = noisy_logits(300, sharpness=0.3)
    report = given().calibrate(logits, labels)

    def objective(temperature):
        z = logits.astype(np.float64) / temperature
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        own = log_p[np.arange(300), labels].mean()
        return -(300 * own + log_p.mean()) / 301  # one row more, of any expert

    assert objective(report.temperature) < min(objective(report.temperature * f) for f in (0.99, 1.01))


def test_an_accuracy_is_reached_with_the_most_rows_that_allow_it():
    logits, labels = noisy_logits()
    router = given()
    report = router.calibrate(logits, labels, accuracy=0.9)
    confidence, picked = router.probabilities(logits).max(axis=1), router.assign(logits)
    kept = np.array([name is not None for name in picked])
    right = np.array([name == EXPERTS[label] for name, label in zip(picked, labels, strict=True)])
    assert report.accuracy == right[kept].mean() >= 0.9
    assert report.coverage == kept.mean() < 1
    best = np.argsort(-confidence)[: kept.sum() + 1]
    assert (logits[best].argmax(axis=1) == labels[best]).mean() < 0.9 or report.coverage == 1
    assert report.accuracy_of_all < 0.9


def test_a_coverage_is_reached_with_the_greatest_confidence():
    logits, labels = noisy_logits(1000)
    router = given()
    report = router.calibrate(logits, labels, coverage=0.75)
    assert report.coverage == 0.75
    assert sum(name is not None for name in router.assign(logits)) == 750


def test_rows_of_equal_confidence_stay_together():
    logits = np.array([[2, 0, 0]] * 4 + [[1, 0, 0]] * 4, np.float32)
    labels = [0, 0, 0, 1, 0, 0, 1, 1]
    router = given()
    assert router.calibrate(logits, labels, coverage=0.2).coverage == 0.5
    assert router.calibrate(logits, labels, accuracy=0.75).coverage == 0.5
    assert router.calibrate(logits, labels, accuracy=0.6).coverage == 1.0


def test_inputs_of_no_expert_are_left_to_the_backbone():
    tasks, labels = flat(clusters(30, seed=1, spread=0.5))
    strange = np.random.default_rng(5).standard_normal((60, WIDTH)).astype(np.float32) + 5
    router = PrototypeRouter.fit(clusters(8))
    report = router.calibrate(np.concatenate([tasks, strange]), [*labels, *[None] * 60], accuracy=0.9)
    assert report.accuracy >= 0.9 > report.accuracy_of_all
    fresh = np.random.default_rng(6).standard_normal((200, WIDTH)).astype(np.float32) + 5
    left = sum(name is None for name in router.assign(fresh)) / 200
    kept = sum(name is not None for name in router.assign(flat(clusters(60, seed=2, spread=0.5))[0])) / 180
    assert left > 0.7
    assert kept > 0.7


def test_rows_that_are_all_right_leave_confidence_below_one(router):
    report = router.calibrate(*flat(clusters(10, seed=2)))
    assert report.accuracy_of_all == 1.0
    assert router.probabilities(flat(clusters(10, seed=3))[0]).max() < 1


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1], {"accuracy": 0.9, "coverage": 0.5}, "not both"),
        ([0, 1], {"accuracy": 1.5}, "accuracy 1.5: a share"),
        ([0, 1], {"coverage": 0.0}, "coverage 0.0: a share"),
        ([1, 0], {"accuracy": 0.9}, "accuracy 0.9 is not reached at any threshold: at best 0, with 1 of 2 rows"),
        ([0], {}, "2 rows of features, 1 labels"),
        ([None, None], {}, "rows of the router's experts"),
        (["math", "cod"], {}, "no expert 'cod': there are math, code, law; did you mean 'code'?"),
        ([0, 3], {}, "no expert 3"),
    ],
)
def test_a_calibration_that_fails_leaves_the_router_as_it_was(labels, options, message):
    router = given()
    logits = np.array([[2, 0, 0], [0, 1, 0]], np.float32)
    with pytest.raises(InputError, match=message):
        router.calibrate(logits, labels, **options)
    assert (router.temperature, router.threshold) == (1.0, 0.0)


# -- features


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny Llama merged of three experts."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", *EXPERTS)):
        write_checkpoint(folder / name, tiny_llama(seed, scale=0.1), config=tiny_llama_config())
    sources = {name: folder / name for name in EXPERTS}
    freemerge.merge("free", base=folder / "base", experts=sources, out=folder / "merged", density=0.1, fsync=False)
    return folder


@pytest.fixture
def merged(models, tmp_path):
    """A copy of the merged model, to put routers in."""
    import shutil

    return shutil.copytree(models / "merged", tmp_path / "merged")


@pytest.fixture(scope="module")
def llama(models):
    return freemerge.load(models / "merged")


def batch_of(rows=3, tokens=6, seed=0):
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 90, (rows, tokens)))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_features_are_the_mean_of_the_last_hidden_state_over_the_tokens_that_count(llama):
    batch = batch_of()
    with torch.no_grad():
        hidden = llama(**batch, output_hidden_states=True).hidden_states[-1]
    mask = batch["attention_mask"][:, :, None]
    features = LastHiddenMean(llama)(batch | {"labels": batch["input_ids"], "use_cache": True, "logits_to_keep": 1})
    torch.testing.assert_close(features, (hidden * mask).sum(1) / mask.sum(1))
    assert not features.requires_grad
    alone = LastHiddenMean(llama)({"input_ids": batch["input_ids"][2:]})
    torch.testing.assert_close(features[2:], alone)


def test_features_of_a_module_that_answers_hidden_states():
    encoder = torch.nn.Embedding(9, 4)
    features = LastHiddenMean(encoder.eval())(torch.tensor([[1, 2], [3, 4]]))
    torch.testing.assert_close(features, encoder.weight.detach()[torch.tensor([[1, 2], [3, 4]])].mean(1))


def test_padding_may_hold_nan():
    from freemerge.routers.features import mean_over_tokens

    hidden = torch.tensor([[[1.0], [3.0], [float("nan")]]])
    assert mean_over_tokens(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0]]


def test_features_are_refused_where_they_would_not_be_the_backbones(llama):
    features = LastHiddenMean(llama)
    batch = batch_of()
    empty = batch | {"attention_mask": batch["attention_mask"] * torch.tensor([[1], [0], [1]])}
    with pytest.raises(InputError, match="row 1 of the batch: no token"):
        features(empty)
    llama.use_expert("math")
    with pytest.raises(InputError, match=r"use_expert\(None\) first \(math is in place\)"):
        features(batch)
    llama.use_expert(None)
    llama.train()
    with pytest.raises(InputError, match="in training are random"):
        features(batch)
    llama.eval()


def test_collected_features_stop_at_the_rows_wanted(llama):
    batches = [batch_of(3, seed=i) for i in range(4)]
    features = LastHiddenMean(llama)
    found = collect_features(features, batches, rows=7)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.concatenate([features(b).numpy() for b in batches])[:7])
    with pytest.raises(InputError, match="no batches"):
        collect_features(features, [])


# -- bound to a model


def test_a_bound_router_answers_for_batches_in_the_models_order(llama, monkeypatch):
    features = LastHiddenMean(llama)
    batches = {name: [batch_of(seed=i + 10 * t) for i in range(2)] for t, name in enumerate(EXPERTS)}
    router = PrototypeRouter.fit({name: collect_features(features, b) for name, b in batches.items()}, top_k=None)
    batch = batch_of(seed=77)
    expected = router.assign(features(batch))
    attached = [EXPERTS.index(name) for name in llama.experts]
    np.testing.assert_array_equal(router.bind(llama)(batch), expected[:, attached])
    monkeypatch.setattr(llama, "experts", ("law", "other", "math", "code"))
    weights = router.bind(llama)(batch)
    np.testing.assert_array_equal(weights[:, [2, 3, 0]], expected)
    assert (weights[:, 1] == 0).all()
    router.top_k = 1
    assert router.bind(llama)(batch) == router.assign(features(batch))


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_model_routed_by_a_router(llama, top_k):
    features = LastHiddenMean(llama)
    batch = batch_of(4, seed=5)
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(3)]
    examples = {name: features(row) for name, row in zip(EXPERTS, rows, strict=True)}
    router = PrototypeRouter.fit(examples, top_k=top_k)
    assignment = router.bind(llama)(batch)
    with torch.no_grad(), llama.routed(assignment):
        expected = llama(**batch).logits
        written = llama.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with torch.no_grad(), llama.routed(router):
        torch.testing.assert_close(llama(**batch).logits, expected, rtol=0, atol=0)
        again = llama.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(again, written)
    if top_k == 1:
        assert assignment[:3] == list(EXPERTS)
        with torch.no_grad():
            assert not torch.equal(llama(**batch).logits, expected)


def test_a_model_without_a_head_is_its_own_features(tmp_path):
    for seed, name in enumerate(("base", *EXPERTS)):
        whole = tiny_llama(seed, scale=0.1)
        tensors = {name.removeprefix("model."): array for name, array in whole.items() if name != "lm_head.weight"}
        write_checkpoint(tmp_path / name, tensors, config=tiny_llama_config(architectures=["LlamaModel"]))
    sources = {name: tmp_path / name for name in EXPERTS}
    freemerge.merge("free", base=tmp_path / "base", experts=sources, out=tmp_path / "out", density=0.1, fsync=False)
    model = freemerge.load(tmp_path / "out")
    features = LastHiddenMean(model)
    batch = batch_of(3, seed=5)
    router = PrototypeRouter.fit({name: features(batch_of(2, seed=row)) for row, name in enumerate(EXPERTS)})
    assignment = router.bind(model)(batch)
    with torch.no_grad(), model.routed(assignment):
        expected = model(**batch).last_hidden_state
    with torch.no_grad(), model.routed(router):
        torch.testing.assert_close(model(**batch).last_hidden_state, expected, rtol=0, atol=0)


def test_features_of_the_users_own():
    class Model(torch.nn.Module):
        experts = EXPERTS

    examples = clusters(4)
    router = PrototypeRouter.fit(examples, features="first token")
    with pytest.raises(InputError, match="features 'first token': pass the function"):
        router.bind(Model())
    bound = router.bind(Model(), features=lambda batch: batch["x"])
    assert bound({"x": examples["law"]}) == ["law"] * 4


def test_a_router_for_other_experts_than_are_attached_is_refused(router):
    class Model(torch.nn.Module):
        pass

    model = Model()
    with pytest.raises(InputError, match="Model has no experts attached"):
        router.bind(model)
    model.experts = ("math", "physics")
    with pytest.raises(InputError, match="other experts: code, law not attached, attached are math, physics"):
        router.bind(model)
    with pytest.raises(InputError, match="other experts"):
        FunctionRouter(len, EXPERTS).bind(model)


# -- functions of the user's own


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (["math", None], ["math", None]),
        (("law", "law"), ["law", "law"]),
        (torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]], dtype=torch.bfloat16), [[1, 0, 0], [0, 0.5, 0.5]]),
        ([[0, 0, 0], [0, 2, -1]], [[0, 0, 0], [0, 2, -1]]),
    ],
)
def test_a_function_as_a_router(answer, expected):
    router = FunctionRouter(lambda batch: answer, EXPERTS)
    found = router({"input_ids": torch.zeros(2, 5)})
    np.testing.assert_array_equal(found, expected)
    assert isinstance(found, list) or found.dtype == np.float32


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (["math", "maths"], "no expert 'maths': there are math, code, law; did you mean 'math'"),
        (["math"], "for 1 rows, the batch has 2"),
        ([[1, 0, 0], [float("nan"), 0, 0]], "NaN or Inf for row 1"),
        ([[1, 0], [0, 1]], r"weights \[2, 2\], expected are \[rows, 3\]"),
        ("math", "a name for each row"),
        (None, "a name for each row"),
        (["math", 3], "neither names nor"),
    ],
)
def test_answers_that_are_no_assignment_are_refused(answer, message):
    with pytest.raises(InputError, match=message):
        FunctionRouter(lambda batch: answer, EXPERTS)({"input_ids": torch.zeros(2, 5)})


def test_a_function_is_not_saved(tmp_path):
    with pytest.raises(InputError, match="cannot be saved"):
        FunctionRouter(len, EXPERTS).save(tmp_path)
    with pytest.raises(InputError, match="not 3"):
        FunctionRouter(3, EXPERTS)


# -- features and examples that are refused


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((2, WIDTH + 1)), r"features are \[2, 13\], expected are \[rows, 12\]"),
        (np.zeros(WIDTH), r"features are \[12\]"),
        ([["a"] * WIDTH], r"features are \[1, 12\] of <U1, expected are \[rows, 12\] numbers"),
        (np.full((2, WIDTH), np.nan), "features of rows 0, 1 are NaN or Inf"),
        (torch.tensor([[0.0] * WIDTH, [float("inf")] * WIDTH]), "features of row 1 are NaN or Inf"),
    ],
)
def test_features_that_are_refused(router, features, message):
    with pytest.raises(InputError, match=message):
        router.assign(features)


def test_nan_that_arises_inside_is_refused(router):
    name = "prototypes" if router.kind == "prototype" else "layers.0.bias"
    router.arrays[name][...] = np.nan
    with pytest.raises(InputError, match="answers NaN or Inf for rows 0, 1"):
        router.assign(np.ones((2, WIDTH)))


@pytest.mark.parametrize(
    ("data", "labels", "experts", "message"),
    [
        (np.ones((2, 3)), None, None, "do not say which expert"),
        (np.ones((2, 3)), ["a"], None, "2 rows of features, 1 labels"),
        (np.ones((2, 3)), [0, 1], None, "give the names of the experts"),
        (np.ones((2, 3)), [0, 1], ["a", "a"], "a twice"),
        (np.ones((2, 3)), [0, 1], "ab", "not the one name"),
        (np.ones((2, 3)), [0, 0], ["a", "b"], "no example of b"),
        (np.ones((2, 3)), ["a", None], ["a", "b"], "a label is None"),
        (np.ones((2, 3)), ["a", "c"], ["a", "b"], "no expert 'c'"),
        ({"a": np.ones((2, 3)), "b": np.ones((2, 4))}, None, None, "different widths: 3, 4"),
        ({"a": np.ones((2, 3)), "b": np.full((1, 3), np.inf)}, None, None, "row 2 are NaN or Inf"),
        ({"a": np.ones((2, 3))}, ["a"], None, "keys of the mapping"),
        ({"a": np.ones(3)}, None, None, r"features are \[3\]"),
        ({}, None, None, "no examples"),
        ({"a": np.ones((1, 3)), "b": np.ones((1, 3))}, None, None, "zero mean"),
    ],
)
def test_examples_that_are_refused(data, labels, experts, message):
    with pytest.raises(InputError, match=message):
        PrototypeRouter.fit(data, labels, experts=experts)


# -- files


def test_a_saved_router_answers_the_same(router, tmp_path):
    router.calibrate(*flat(clusters(10, seed=2)), coverage=0.9)
    router.top_k = 2
    assert router.save(tmp_path / "here", fsync=False) == tmp_path / "here"
    loaded = load_router(tmp_path / "here")
    assert type(loaded) is type(router)
    for name in ("experts", "width", "features", "temperature", "threshold", "top_k", "options"):
        assert getattr(loaded, name) == getattr(router, name)
    features = flat(clusters(5, seed=4))[0]
    np.testing.assert_array_equal(loaded.assign(features), router.assign(features))


def test_a_merged_model_keeps_its_router_beside_its_experts(router, merged):
    assert router.save(merged) == merged / "router"
    assert verify(merged).ok
    assert load_router(merged).experts == load_router(merged / "router").experts == EXPERTS
    with pytest.raises(OutputError, match="holds a router already"):
        router.save(merged)
    router.top_k = None
    router.save(merged, overwrite=True)
    assert load_router(merged).top_k is None
    assert verify(merged).ok
    assert sorted(path.name for path in (merged / "router").iterdir()) == ["router.json", "router.safetensors"]


def test_the_list_of_experts_names_the_router(router, merged):
    def listed():
        result = CliRunner().invoke(cli.app, ["experts", "list", str(merged)])
        assert result.exit_code == 0
        return result.output.splitlines()

    assert not any("router" in line for line in listed())
    router.threshold = 0.625
    router.save(merged)
    assert listed()[-1] == f"router: {router.kind}, picks one expert, the backbone alone below a confidence of 0.625"


def test_a_merged_model_refuses_the_router_of_another(merged, tmp_path):
    other = PrototypeRouter.fit({"math": np.eye(2)[:1], "physics": np.eye(2)[1:]})
    before = sorted(merged.rglob("*"))
    with pytest.raises(InputError, match="has no physics; there are: math, code, law"):
        other.save(merged)
    assert sorted(merged.rglob("*")) == before
    other.save(tmp_path / "other")
    (tmp_path / "other").rename(merged / "router")
    with pytest.raises(CheckpointError, match="for other experts: physics not there; the model has math, code, law"):
        load_router(merged)


def test_a_router_of_another_backbone_is_refused(router, merged):
    router.save(merged)
    edit(merged / "router", backbone="0" * 32)
    with pytest.raises(CheckpointError, match="made for the backbone 0000"):
        load_router(merged)


def edit(folder, **changes):
    path = folder / "router.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a router of freemerge"),
        ({"version": 2}, "version 2; this freemerge reads version 1"),
        ({"kind": "forest"}, "kind 'forest'; this freemerge reads prototype, mlp"),
        ({"experts": ["math", "math", "law"]}, "math twice"),
        ({"experts": ["math", "code"]}, r"expected is float32 \[2"),
        ({"width": 13}, "expected is float32"),
        ({"width": 0}, "width is 0"),
        ({"width": "12"}, "width is '12'"),
        ({"temperature": 0}, "temperature 0: a number above 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"threshold": 2}, "threshold 2: a probability"),
        ({"top_k": True}, "top_k is True"),
        ({"top_k": 4}, "top_k 4: from 1 to 3"),
        ({"options": {"power": 1}}, "options are"),
        ({"surprise": 1}, "has 'surprise', which this freemerge does not know"),
        ({"threshold": ..., "width": ...}, "2 problems, nothing was loaded"),
        ({"checksum": "0" * 32}, "its checksum differs"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(router, tmp_path, changes, message):
    router.save(tmp_path, fsync=False)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_router(tmp_path)


def test_damaged_files_are_refused(router, tmp_path):
    from freemerge.checkpoint.checksum import checksum_file

    router.save(tmp_path, fsync=False)
    config, weights = tmp_path / "router.json", tmp_path / "router.safetensors"
    text, data = config.read_text(), weights.read_bytes()

    def refused(message):
        with pytest.raises(CheckpointError, match=message):
            load_router(tmp_path)

    weights.write_bytes(data[:-4])
    refused("cut short")
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused("its checksum differs")
    arrays = dict(router.arrays)
    first = next(iter(arrays))
    write_safetensors(weights, {**arrays, first: np.full_like(arrays[first], np.nan)})
    edit(tmp_path, checksum=checksum_file(weights))
    refused(f"{first} has NaN or Inf")
    write_safetensors(weights, {"extra": np.zeros(1, np.float32), **arrays})
    refused("extra is no part of a")
    write_safetensors(weights, {name: array for name, array in arrays.items() if name != first})
    refused(f"{first} is missing")
    weights.unlink()
    config.write_text(text)
    refused("cannot be read")
    weights.write_bytes(data)
    config.write_text(text[:-10])
    refused("cannot be read")
    config.write_text(text.replace('"width"', '"kind": "mlp", "width"'))
    refused("a key stands twice")
    config.unlink()
    refused("router.json is missing")
    weights.unlink()
    with pytest.raises(InputError, match="holds no router"):
        load_router(tmp_path)


def test_routers_need_no_torch(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, numpy as np, freemerge.routers as r\n"
        "router = r.PrototypeRouter.fit({'a': np.eye(3)[:1], 'b': np.eye(3)[1:2]})\n"
        f"router.save({str(tmp_path)!r}, fsync=False)\n"
        f"assert r.load_router({str(tmp_path)!r}).assign(np.eye(3)[1:2]) == ['b']\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
