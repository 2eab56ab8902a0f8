"""Twin-Merging in a running model, as in the paper: a shared model, low-rank experts, and a router that weighs them."""

import numpy as np
import pytest
from test_export import merged_by

import freemerge
from freemerge.experts.apply import apply_expert
from freemerge.routers import LastHiddenMean, MlpRouter, PrototypeRouter, collect_features, load_router

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

IDS = {
    name: torch.from_numpy(np.random.default_rng(t).integers(20 * t, 20 * t + 20, (12, 6)))
    for t, name in enumerate(("math", "code"))
}


@pytest.fixture(scope="module", params=["svd", "magnitude"])
def merged(request, tmp_path_factory):
    return merged_by("twin", tmp_path_factory.mktemp("twin"), density=0.2, compression=request.param)


def fitted(kind, model):
    features = LastHiddenMean(model)
    examples = {name: collect_features(features, [{"input_ids": ids}]) for name, ids in IDS.items()}
    if kind is PrototypeRouter:
        return PrototypeRouter.fit(examples, temperature=1.0, top_k=None)
    return MlpRouter.fit(examples, top_k=None, epochs=2, seed=0)


@pytest.mark.parametrize("kind", [PrototypeRouter, MlpRouter])
def test_rows_are_answered_by_the_weights_their_router_gives(merged, kind, tmp_path):
    """Each row as the plain checkpoint that `experts apply` writes for its probabilities."""
    model = freemerge.load(merged)
    fitted(kind, model).save(merged, overwrite=True)
    router = load_router(merged)
    batch = {"input_ids": torch.cat([IDS["math"][:2], IDS["code"][:2]])}
    with torch.no_grad():
        backbone = model(**batch).logits
        with model.routed(router):
            found = model(**batch).logits
    weights = router.bind(model)(batch)
    assert weights.shape == (4, 2)
    math = weights[:, model.experts.index("math")]
    assert math[:2].mean() > math[2:].mean()
    assert (weights > 0.05).all(axis=1).any()  # real mixtures, not a choice
    for row, given in enumerate(weights):
        out = tmp_path / f"row{row}"
        apply_expert(merged, dict(zip(model.experts, map(float, given), strict=True)), out, fsync=False)
        plain = transformers.LlamaForCausalLM.from_pretrained(out).eval()
        with torch.no_grad():
            expected = plain(batch["input_ids"][row : row + 1]).logits[0]
        # two orders of summation in float32, over layers with activations of size 1 to 10
        torch.testing.assert_close(found[row], expected, rtol=2e-4, atol=2e-4)
        assert not torch.allclose(found[row], backbone[row], atol=1e-2)
