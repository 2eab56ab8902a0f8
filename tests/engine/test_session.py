"""A Session merges what the other doors merge, again and again, and into what is there already."""

import gc
import threading

import numpy as np
import pytest
import torch

import freemerge
from freemerge import methods
from freemerge.errors import CheckpointError, FreemergeError, PlanError, RecipeError
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import tiny_llama, tiny_llama_config, write_checkpoint

MANY = [
    ("average", {}),
    ("linear", {"weight": [0.2, 0.5, 0.3]}),
    ("linear", {"weight": [1.0, 2.0, 3.0], "normalize": False}),
    ("task_arithmetic", {}),
    ("task_arithmetic", {"scaling": 0.7, "dtype": "float16"}),
    ("task_arithmetic", {"weight": {"math": 0.3, "code": 0.1, "chat": -0.2}}),
    ("task_arithmetic", {"weight": [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.3}]}),
    ("fr", {"scaling": 0.3}),
    ("fr", {"scaling": 0.6, "cutoff": 0.4, "align": True}),
    ("fr", {"variant": "llm"}),
    ("free", {}),
    ("free", {"variant": "script", "scaling": 0.2}),
    ("free", {"selection": "model"}),
    ("adamerging", {"weight": [0.2, 0.5, 1.3]}),
    ("adamerging_plus_plus", {"weight": [0.2, 0.5, 1.3]}),
    ("doge", {"steps": 20}),
    ("emr", {}),
    ("emr", {"backbone": "unified"}),
    ("iso_c", {"averaged": ["embed"]}),
    ("iso_cts", {"scaling": 0.7}),
    ("opcm", {}),
    ("smile", {"rank": 4, "gate_rank": 2, "top_k": 2}),
    ("tall_mask", {"consensus": 1}),
    ("tall_mask", {"backbone": "base"}),
    ("tsvm", {}),
    ("twin", {}),
    ("twin", {"compression": "magnitude", "elect": True}),
    ("ties", {"weight": [1.0, 0.5, 0.2], "density": 0.3}),
    ("breadcrumbs", {"density": 0.4}),
    ("breadcrumbs_ties", {"density": 0.4}),
    ("dare", {"density": 0.5, "seed": 3}),
    ("dare_linear", {"density": 0.5}),
    ("dare_ties", {"density": 0.5}),
    ("della", {"density": 0.5}),
    ("della_linear", {"density": 0.5}),
    ("sce", {"select_topk": 0.4}),
    ("ties_merging", {"density": 0.3, "combination": "max"}),
    ("ties_merging", {"variant": "mergelm", "exclude": ["norm"]}),
    ("dare_ties_merging", {"density": 0.5}),
    ("pcb", {"weight": [1.0, 0.5, 1.2]}),
    ("pcb", {"variant": "vision"}),
    ("model_stock", {"filter_wise": True}),
    ("multislerp", {}),
    ("karcher", {}),
    ("ram", {}),
    ("ramplus_tl", {}),
]
ONE_OR_TWO = [  # what merges no more experts
    ("slerp", 1, {"t": 0.3}),
    ("nuslerp", 2, {}),
    ("nearswap", 1, {"t": 1e-3}),
    ("arcee_fusion", 1, {}),
    ("passthrough", 1, {}),
]


def llamas(dtype=BFLOAT16, **overrides):
    """A base and three experts that are not far from it, by name."""
    base, moves = tiny_llama(0, dtype=dtype, **overrides), [tiny_llama(t, **overrides) for t in (1, 2, 3)]
    experts = [
        {name: (base[name].astype(np.float32) + 0.2 * move[name]).astype(dtype) for name in base} for move in moves
    ]
    return base, dict(zip(("math", "code", "chat"), experts, strict=True))


def as_torch(state_dict):
    return {name: torch.from_numpy(array.astype(np.float32)).bfloat16() for name, array in state_dict.items()}


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def llama_module(dtype=torch.float32, *, tied=False):
    transformers = pytest.importorskip("transformers")
    config = tiny_llama_config(tie_word_embeddings=tied)
    config = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(dtype)


# -- the same as the other doors ----------------------------------------------------------------------------------


def test_every_method_is_among_the_merges_compared():
    of_models = {name for name in methods.names() if not methods.get(name).merges_adapters}
    assert {method for method, *_ in MANY + ONE_OR_TWO} == of_models


def test_equals_merge_state_dicts_bit_for_bit_one_after_the_other():
    base, experts = llamas()
    with freemerge.Session(base, experts, device="cpu") as session:
        for method, parameters in MANY:
            merged = session.merge(method, **parameters)
            expected = freemerge.merge_state_dicts(method, base, experts, **parameters)
            assert list(merged) == list(expected)
            assert all(same(merged[name], expected[name]) for name in expected), method
            for expert, other in zip(merged.experts, expected.experts, strict=True):
                assert expert.metadata == other.metadata
                applied, wanted = expert.apply(merged), other.apply(expected)
                assert all(same(applied[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("method", "count", "parameters"), ONE_OR_TWO)
def test_methods_of_one_or_two_experts_equal_merge_state_dicts_too(method, count, parameters):
    base, experts = llamas()
    experts = dict(list(experts.items())[:count])
    with freemerge.Session(base, experts, device="cpu") as session:
        merged = session.merge(method, **parameters)
    expected = freemerge.merge_state_dicts(method, base, experts, **parameters)
    assert all(same(merged[name], expected[name]) for name in expected)


def test_tensors_larger_than_a_piece_are_merged_in_runs():
    random = np.random.default_rng(0)
    models = [{"w": random.standard_normal((1, 3 << 20), np.float32)} for _ in range(3)]
    with freemerge.Session(models[0], models[1:], device="cpu") as session:
        merged = session.merge("task_arithmetic", weight=[0.5, 0.25])
    assert same(
        merged["w"], freemerge.merge_state_dicts("task_arithmetic", models[0], models[1:], weight=[0.5, 0.25])["w"]
    )


def test_a_method_without_base():
    _, experts = llamas()
    with freemerge.Session(None, experts, device="cpu") as session:
        merged = session.merge("average")
        with pytest.raises(RecipeError, match="base_model"):
            session.merge("fr")
    expected = freemerge.merge_state_dicts("average", None, experts)
    assert all(same(merged[name], expected[name]) for name in expected)


def test_experts_of_another_vocabulary_are_cropped_where_that_is_asked_for():
    base, experts = llamas()
    larger = dict(experts["math"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        larger[name] = np.concatenate([larger[name], larger[name][:3]])
    with freemerge.Session(base, {"math": larger}, device="cpu") as session:
        with pytest.raises(PlanError, match=r"lm_head.weight: \[160, 48\] in base, \[163, 48\]"):
            session.merge("fr")
        merged = session.merge("fr", crop=True)
        with pytest.raises(PlanError, match="lm_head"):
            session.merge("task_arithmetic")
    expected = freemerge.merge_state_dicts("fr", base, {"math": experts["math"]})
    assert all(same(merged[name], expected[name]) for name in expected)


# -- what comes back ------------------------------------------------------------------------------------------------


def test_torch_in_torch_out_and_tied_tensors_stay_one():
    base, experts = (as_torch(model) for model in (tiny_llama(0), tiny_llama(1)))
    for model in (base, experts):
        model["lm_head.weight"] = model["model.embed_tokens.weight"]
    with freemerge.Session(base, [experts], device="cpu") as session:
        merged = session.merge("task_arithmetic")
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]


def test_paths_modules_and_out(tmp_path):
    base, experts = llamas()
    paths = [write_checkpoint(tmp_path / name, model) for name, model in [("base", base), *experts.items()]]
    with freemerge.Session(paths[0], paths[1:], device="cpu") as session:
        merged = session.merge("fr", weight={"math": 1.0, "code": 0.5, "chat": 0.5})
        result = session.merge("fr", weight=[1.0, 0.5, 0.5], out=tmp_path / "merged")
    assert result.tensors == len(base)
    with freemerge.Session(tmp_path / "merged", [tmp_path / "merged"], device="cpu") as session:
        on_disk = session.merge("average")
    assert all(torch.equal(bits(merged[name]), bits(on_disk[name])) for name in base)

    modules = [llama_module() for _ in range(2)]
    for module, model in zip(modules, (base, experts["math"]), strict=True):
        module.load_state_dict(as_torch(model))
    with freemerge.Session(modules[0], modules[1:], device="cpu") as session:
        merged = session.merge("average")
    assert torch.equal(merged["lm_head.weight"], modules[1].lm_head.weight)
    with pytest.raises(RecipeError, match="in memory"), freemerge.Session(base, experts) as session:
        session.merge("fr", out=tmp_path / "other")


# -- into -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_into_a_live_model(dtype, tied):
    overrides = {"tie_word_embeddings": tied}
    base, experts = llamas(np.float32, **overrides)
    model = llama_module(dtype, tied=tied)
    model.lm_head.weight.requires_grad_(False)
    before = {name: (p.data_ptr(), p.requires_grad, p._version) for name, p in model.named_parameters()}
    with freemerge.Session(base, experts, device="cpu") as session:
        for scaling in (0.2, 0.5):
            assert session.merge("task_arithmetic", scaling=scaling, into=model) is model
        expected = session.merge("task_arithmetic", scaling=0.5, dtype=str(dtype).removeprefix("torch."))
    state = model.state_dict()
    for name, array in expected.items():
        wanted = torch.from_numpy(array.astype(np.float32)).to(dtype)
        assert torch.equal(state[name], wanted), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, parameter in model.named_parameters():
        address, requires_grad, version = before[name]
        assert (parameter.data_ptr(), parameter.requires_grad) == (address, requires_grad)
        assert parameter._version > version
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_into_notices_a_graph_that_still_needs_the_old_weights():
    base, experts = llamas(np.float32)
    model = llama_module()
    with freemerge.Session(base, experts, device="cpu") as session:
        loss = model(torch.arange(8)[None]).logits.sum()
        session.merge("average", into=model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_into_a_former_result_and_into_strange_memory():
    base, experts = llamas(np.float32)
    base["steps"] = np.array([3, 4])
    experts = {name: {**expert, "steps": base["steps"]} for name, expert in experts.items()}
    with freemerge.Session(base, experts, device="cpu") as session:
        expected = session.merge("fr", scaling=0.4)
        former = session.merge("fr", scaling=0.1)
        arrays = {name: id(array) for name, array in former.items()}
        assert session.merge("fr", scaling=0.4, into=former) is former
        strange = {
            name: torch.full(array.shape[::-1], 7, dtype=torch.from_numpy(array).dtype).t()
            for name, array in base.items()
        }
        session.merge("fr", scaling=0.4, into=strange)
        fortran = {name: np.full(array.shape, 7, array.dtype, order="F") for name, array in base.items()}
        session.merge("fr", scaling=0.4, into=fortran)
    for name, array in expected.items():
        assert id(former[name]) == arrays[name]
        assert same(former[name], array)
        assert same(strange[name].numpy(), array)
        assert same(fortran[name], array)


def test_a_session_that_merges_into_a_model_loaded_from_its_base():
    base, experts = llamas(np.float32, tie_word_embeddings=True)
    model = llama_module(tied=True)
    model.load_state_dict(as_torch(base), strict=False)
    with freemerge.Session(base, experts, device="cpu") as session:
        session.merge(
            "average", into={name: tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}
        )
        merged = session.merge("average")
    assert np.array_equal(model.lm_head.weight.detach().numpy(), merged["model.embed_tokens.weight"])


def test_into_says_all_that_does_not_fit_before_it_writes():
    base, experts = llamas(np.float32)
    base["steps"] = np.array([3])
    into = {name: torch.zeros(array.shape) for name, array in base.items()}
    del into["model.norm.weight"]
    into["classifier.weight"] = torch.zeros(3)
    into["lm_head.weight"] = torch.zeros(161, 48)
    into["model.layers.0.mlp.up_proj.weight"] = torch.zeros(80, 48).to_sparse()
    into["model.layers.0.mlp.gate_proj.weight"] = into["model.layers.1.mlp.gate_proj.weight"]
    into["model.layers.0.mlp.down_proj.weight"] = base["model.layers.0.mlp.down_proj.weight"]
    into["model.layers.0.input_layernorm.weight"] = [0.0] * 48
    into["model.layers.1.input_layernorm.weight"] = torch.zeros(48, dtype=torch.int32)
    with freemerge.Session(base, experts, device="cpu") as session, pytest.raises(PlanError) as error:
        session.merge("average", into=into)
    for problem in (
        "9 problems, nothing was written",
        "model.norm.weight: merged, but not there to be written to",
        "classifier.weight: in the target, but not in the result",
        "lm_head.weight: [161, 48] in the target, [160, 48] in the result",
        "model.layers.0.mlp.up_proj.weight: a Tensor (torch.sparse_coo, on cpu), not a plain dense tensor",
        "model.layers.1.mlp.gate_proj.weight: the same memory as model.layers.0.mlp.gate_proj.weight in the target",
        "model.layers.0.mlp.down_proj.weight: it is an input of this session",
        "model.layers.0.input_layernorm.weight: a list, neither a torch tensor nor a NumPy array",
        "model.layers.1.input_layernorm.weight: int32 in the target, float32 in the result",
        "steps: float32 in the target, int64 in the result",
    ):
        assert problem in str(error.value)
    assert not any(value.any() for name, value in into.items() if torch.is_tensor(value) and not value.is_sparse)


def test_a_result_that_is_not_finite_is_refused_and_mended_by_the_next():
    base, experts = llamas(np.float32)
    into = {name: torch.zeros(array.shape, dtype=torch.float16) for name, array in base.items()}
    with freemerge.Session(base, experts, device="cpu") as session:
        with pytest.raises(CheckpointError, match=r"lm_head.weight: the result does not fit float32"):
            session.merge("task_arithmetic", scaling=3e38 * 1e3)
        with pytest.raises(
            CheckpointError, match=r"`into` holds(.|\n)*lm_head.weight: the result does not fit float16"
        ):
            session.merge("task_arithmetic", scaling=1e8, into=into)
        session.merge("task_arithmetic", scaling=1e8, into=into, check_finite=False)
        assert not torch.isfinite(into["lm_head.weight"]).all()
        session.merge("task_arithmetic", scaling=0.1, into=into)
        expected = session.merge("task_arithmetic", scaling=0.1, dtype="float16")
        experts["math"]["model.norm.weight"][5] = np.nan
        with pytest.raises(CheckpointError, match=r"1 problem(.|\n)*model.norm.weight: NaN or Inf in math"):
            session.merge("average")
    assert all(same(into[name].numpy(), expected[name]) for name in expected)


# -- a long life ------------------------------------------------------------------------------------------------------


def test_nothing_accumulates_over_many_merges():
    base, experts = llamas()
    model = llama_module(torch.bfloat16)
    with freemerge.Session(base, experts, device="cpu") as session:

        def merge_often(times):
            for i in range(times):
                session.merge("task_arithmetic", weight=[i / 200, 0.1, 0.2], into=model)
                session.merge("linear", weight=[i / 200 + 0.1, 0.1, 0.2])
            gc.collect()
            return len(gc.get_objects())

        before = merge_often(20)
        assert merge_often(100) - before < 50


def test_threads_take_turns():
    base, experts = llamas()
    with freemerge.Session(base, experts, device="cpu") as session:
        scalings, found = np.linspace(0.1, 1, 8).tolist(), {}
        merge = lambda scaling: found.update({scaling: session.merge("fr", scaling=scaling)})  # noqa: E731
        threads = [threading.Thread(target=merge, args=(scaling,)) for scaling in scalings]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for scaling in scalings:
            expected = session.merge("fr", scaling=scaling)
            assert all(same(found[scaling][name], expected[name]) for name in expected)


def test_a_closed_session_says_so():
    base, experts = llamas()
    with freemerge.Session(base, experts, device="cpu") as session:
        pass
    with pytest.raises(FreemergeError, match="closed"):
        session.merge("average")


def test_what_is_no_model_is_said_for_all_of_them(tmp_path):
    with pytest.raises(CheckpointError) as error:
        freemerge.Session(7, [tmp_path / "nowhere", {"w": "text"}])
    assert all(part in str(error.value) for part in ("base: a int", "nowhere", "w: a str"))


def test_parameters_are_checked_as_everywhere():
    base, experts = llamas()
    with freemerge.Session(base, experts, device="cpu") as session:
        with pytest.raises(RecipeError, match="did you mean scaling"):
            session.merge("fr", scalling=1)
        with pytest.raises(RecipeError, match="2 numbers for 3 experts"):
            session.merge("linear", weight=[1, 2])
        with pytest.raises(RecipeError, match="its own"):
            session.merge("linear", into=dict(base), dtype="float16")
        with pytest.raises(PlanError, match="into: a int"):
            session.merge("linear", into=3)
