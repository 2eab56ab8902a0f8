"""Experts in a running model: in place bit for bit, out again bit for bit, whatever was done to the model between."""

import copy
import json
import shutil
import struct
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from merged_models import EXPERTS, applied, merged_llama
from torch import nn

import freemerge
from freemerge.attached import in_place
from freemerge.attached.lock import WeightsLock
from freemerge.checkpoint.torch_arrays import from_torch, to_torch
from freemerge.errors import CheckpointError, InputError
from freemerge.kernels.array import BFLOAT16
from freemerge.testing import random_array

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return merged_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def checkpoints(merged, tmp_path_factory):
    """Every expert as a plain checkpoint."""
    out = tmp_path_factory.mktemp("applied")
    return {name: applied(merged, name, out / name) for name in EXPERTS}


@pytest.fixture
def model(merged):
    return freemerge.load(merged)


def weights(model):
    return {name: from_torch(tensor.cpu()).tobytes() for name, tensor in model.state_dict().items()}


def test_an_expert_in_place_is_the_checkpoint_of_apply_expert(model, checkpoints):
    backbone = weights(model)
    assert (model.experts, model.expert) == (tuple(sorted(EXPERTS)), None)
    for name in ("math", "code", "math"):
        model.use_expert(name)
        assert model.expert == name
        assert weights(model) == checkpoints[name]
        assert weights(model) != backbone
    model.use_expert(None)
    assert weights(model) == backbone


@pytest.mark.parametrize("parameters", [{"combine": "replace", "relative_to": "base"}, {"selection": "model"}], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=str)
def test_other_dtypes_and_modes(tmp_path, dtype, parameters):
    folder = merged_llama(tmp_path, dtype=dtype, experts=("math",), **parameters)
    model = freemerge.load(folder)
    backbone = weights(model)
    model.use_expert("math")
    assert weights(model) == applied(folder, "math", tmp_path / "out")
    model.use_expert(None)
    assert weights(model) == backbone


def test_nothing_is_registered(model, merged):
    names = [list(model.state_dict()), dict(model.named_modules()).keys(), len(list(model.parameters()))]
    model.use_expert("code")
    model.detach_experts()
    plain = type(model).from_pretrained(merged, dtype="auto")
    assert names == [list(plain.state_dict()), dict(plain.named_modules()).keys(), len(list(plain.parameters()))]
    assert weights(model) == weights(plain)
    assert not any(hasattr(model, name) for name in ("use_expert", "routed", "experts", "expert", "detach_experts"))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    freemerge.attach(model, merged).use_expert("law")  # and again


def test_a_copy_switches_on_its_own(model, checkpoints):
    backbone = weights(model)
    model.use_expert("math")
    twin = copy.deepcopy(model)
    model.use_expert("code")
    assert (twin.expert, weights(twin)) == ("math", checkpoints["math"])
    twin.use_expert(None)
    assert (model.expert, weights(model), weights(twin)) == ("code", checkpoints["code"], backbone)
    twin.use_expert("law")
    twin.detach_experts()
    assert weights(twin) == backbone
    model(torch.tensor([[1, 2]]))
    model.use_expert("law")


@pytest.mark.parametrize("when", ["before", "after", "in place"])
def test_a_model_may_change_its_dtype(merged, when):
    plain = freemerge.load(merged)
    plain.detach_experts()
    model = copy.deepcopy(plain).float() if when == "before" else copy.deepcopy(plain)
    freemerge.attach(model, merged)
    if when == "in place":
        model.use_expert("math")
    if when != "before":
        model.float()
    model.use_expert("code")
    expert = dict(freemerge.load(merged, dtype="float32", model_class=type(plain)).named_parameters())
    model.use_expert(None)
    assert weights(model) == weights(plain.float())
    assert expert["model.norm.weight"].dtype == torch.float32


def test_load_in_another_dtype_adds_to_weights_of_that_dtype(merged, checkpoints):
    model = freemerge.load(merged, dtype=torch.float32, verify=False)
    backbone = weights(model)
    model.use_expert("math")
    assert model.lm_head.weight.dtype == torch.float32
    rounded = from_torch(model.lm_head.weight.to(torch.bfloat16))
    assert rounded.tobytes() == checkpoints["math"]["lm_head.weight"]
    model.use_expert(None)
    assert weights(model) == backbone


def test_tied_weights_are_changed_once(tmp_path):
    folder = merged_llama(tmp_path, tied=True, experts=("math",))
    model = freemerge.load(folder)
    backbone = weights(model)
    model.use_expert("math")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = applied(folder, "math", tmp_path / "out")
    found = weights(model)
    assert found.pop("lm_head.weight") == found["model.embed_tokens.weight"]
    assert found == expected
    model.use_expert(None)
    assert weights(model) == backbone


def test_signed_zeros_and_other_layouts_come_back():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.weight.neg_()
        model.weight[0] = torch.nan
    backbone = weights(model)
    base = {name: tensor.detach().nan_to_num().clone() for name, tensor in model.state_dict().items()}
    tuned = {name: to_torch(random_array(tuple(t.shape), np.float32, 1)) for name, t in base.items()}
    merged = freemerge.merge_state_dicts("free", base, {"a": tuned, "b": base}, density=0.3)
    freemerge.attach(model, merged.experts)
    model.use_expert("a")
    assert not model.weight.is_contiguous()
    expected = merged.experts[0].apply(base)["weight"][1:]
    torch.testing.assert_close(model.weight.detach()[1:], expected, rtol=0, atol=0)
    model.use_expert(None)
    assert weights(model) == backbone


class Wrapped(nn.Module):
    def __init__(self, inner, name="inner"):
        super().__init__()
        setattr(self, name, inner)


def test_names_behind_one_prefix_are_found(model, merged, checkpoints):
    model.detach_experts()
    outer = freemerge.attach(Wrapped(model), merged)
    outer.use_expert("math")
    assert weights(model) == checkpoints["math"]
    outer.detach_experts()
    with pytest.raises(InputError, match=r"^1 problem, .*\n  lm_head.weight: in .*, but not in the model"):
        freemerge.attach(model.model, merged)


def test_every_name_without_a_place_is_told_at_once(model, merged):
    model.detach_experts()
    layer = model.model.layers[0]
    layer.self_attn.qkv_proj = nn.Linear(48, 96, bias=False)
    del layer.self_attn.q_proj, layer.self_attn.k_proj
    layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(3, 48))
    with pytest.raises(InputError) as error:
        freemerge.attach(model, merged)
    text = str(error.value)
    assert text.startswith("3 problems, nothing was changed")
    assert "layers.0.self_attn.q_proj.weight: in" in text
    assert "[80, 48] in the expert, [3, 48] in the model" in text
    assert "not fused" in text


def test_two_places_are_refused(model, merged):
    model.detach_experts()
    outer = Wrapped(model)
    outer.other = copy.deepcopy(model)
    with pytest.raises(InputError, match="several places"):
        freemerge.attach(outer, merged)


def test_attached_twice_or_over_attributes_of_the_model(model, merged):
    with pytest.raises(InputError, match="attached already"):
        freemerge.attach(model, merged)
    model.detach_experts()
    model.experts = nn.ModuleList()
    with pytest.raises(InputError, match="LlamaForCausalLM has experts of its own"):
        freemerge.attach(model, merged)
    with pytest.raises(InputError, match="not to a dict"):
        freemerge.attach({}, merged)


def test_an_unknown_expert_names_the_nearest(model):
    model.use_expert("code")
    before = weights(model)
    with pytest.raises(InputError, match=r"no expert 'maths': there are code, law, math; did you mean 'math'\?"):
        model.use_expert("maths")
    assert (model.expert, weights(model)) == ("code", before)


@pytest.mark.parametrize("op", ["apply_sparse_rows", "put_entries"])
@pytest.mark.parametrize("call", [0, 1, 7, 20])
def test_a_failure_half_way_leaves_the_expert_before(model, checkpoints, monkeypatch, op, call):
    model.use_expert("math")
    run, calls = getattr(in_place, op), iter(range(1000))

    def fail(*args, **kwargs):
        if next(calls) == call:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(in_place, op, fail)
    with pytest.raises(KeyboardInterrupt):
        model.use_expert("code")
    assert (model.expert, weights(model)) == ("math", checkpoints["math"])
    model.use_expert("code")
    assert (model.expert, weights(model)) == ("code", checkpoints["code"])


def test_autograd_notices_a_switch(model):
    loss = (model.lm_head.weight.float() ** 2 * model.lm_head.weight).sum()
    model.use_expert("math")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_switch_waits_for_a_running_forward(model):
    inside, proceed, switched = threading.Event(), threading.Event(), threading.Event()

    def wait(*args):
        inside.set()
        assert proceed.wait(10)

    hook = model.model.layers[1].register_forward_pre_hook(wait)
    seen = []
    forward = threading.Thread(target=lambda: seen.append(model(torch.tensor([[1, 2]])).logits))
    switch = threading.Thread(target=lambda: (model.use_expert("math"), switched.set()))
    forward.start()
    assert inside.wait(10)
    switch.start()
    assert not switched.wait(0.05)
    proceed.set()
    forward.join()
    switch.join()
    hook.remove()
    assert model.expert == "math"
    model.use_expert(None)
    torch.testing.assert_close(seen[0], model(torch.tensor([[1, 2]])).logits, rtol=0, atol=0)


def test_no_switch_inside_a_forward(model):
    hook = model.model.register_forward_pre_hook(lambda *_: model.use_expert("math"))
    with pytest.raises(InputError, match="inside a forward"):
        model(torch.tensor([[1, 2]]))
    hook.remove()
    model.use_expert("math")  # the failed forward holds nothing


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_fails_or_is_interrupted_holds_nothing(model, error):
    def fail(*_):
        raise error

    hook = model.model.norm.register_forward_pre_hook(fail)
    with suppress(ValueError, KeyboardInterrupt):
        model(torch.tensor([[1, 2]]))
    hook.remove()
    model.use_expert("math")
    model(torch.tensor([[1, 2]]))


def test_forwards_and_switches_from_many_threads(model, checkpoints):
    ids = torch.arange(8)[None]
    expected = {}
    for name in (None, *EXPERTS):
        model.use_expert(name)
        expected[name] = model(ids).logits
    lock_held, problems = threading.Lock(), []

    def forwards():
        for _ in range(10):
            found = model(ids).logits
            if not any(torch.equal(found, logits) for logits in expected.values()):
                problems.append(found)

    def switches():
        for name in (*EXPERTS, None) * 3:
            with lock_held:
                model.use_expert(name)

    threads = [threading.Thread(target=work) for work in (forwards, forwards, switches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_readers_of_one_thread_may_nest():
    lock = WeightsLock()
    with lock.reading(), lock.reading():
        pass
    with lock.writing():
        pass
    with lock.reading(), pytest.raises(InputError), lock.writing():
        pass


def test_forwards_that_waited_for_a_switch_are_next():
    lock, order = WeightsLock(), []

    def use(kind):
        with getattr(lock, kind)():
            order.append(kind)

    threads = [threading.Thread(target=use, args=(kind,)) for kind in ("writing", "reading")]
    with lock.writing():
        for thread, waiting in zip(threads, ("_writers_waiting", "_readers_waiting"), strict=True):
            thread.start()
            while not getattr(lock, waiting):
                time.sleep(0.001)
    for thread in threads:
        thread.join(30)
    assert order == ["reading", "writing"]


def test_experts_of_another_backbone_are_refused(merged, model, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "copy")
    manifest = json.loads((folder / "freemerge.json").read_bytes())
    (folder / "freemerge.json").write_text(json.dumps(manifest | {"backbone": "f" * 32}))
    for source in (folder, folder / "experts", folder / "experts" / "math.safetensors"):
        with pytest.raises(CheckpointError, match="made for the backbone"):
            freemerge.load(folder) if source == folder else freemerge.attach(Wrapped(model), source)
    (folder / "freemerge.json").unlink()
    model.detach_experts()
    freemerge.attach(model, folder / "experts")  # nothing beside them says otherwise


def test_the_models_own_weights_are_compared_where_asked_for(merged, model):
    assert freemerge.load(merged, verify=True).expert is None
    model.detach_experts()
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: other numbers than the backbone's"):
        freemerge.attach(model, merged, verify=True)
    with pytest.raises(CheckpointError, match="F32 in the model, BF16 in the backbone"):
        freemerge.load(merged, dtype="float32", verify=True)
    assert not hasattr(model, "use_expert")


def test_another_model_than_the_backbone_is_refused_unless_asked_for(merged):
    base = merged.parent / "base"
    load = pytest.importorskip("transformers").LlamaForCausalLM.from_pretrained
    model = load(base, dtype="auto")
    with pytest.raises(CheckpointError, match=r"input_layernorm\.weight: other numbers than the backbone's"):
        freemerge.attach(model, merged)
    assert not hasattr(model, "use_expert")
    for other, verify in ((model, False), (load(base, dtype=torch.float32), None)):  # other dtypes have no checksums
        freemerge.attach(other, merged, verify=verify)


def test_a_sample_is_the_smallest_tensors_that_fit(merged, model, monkeypatch):
    from freemerge.attached import attachment

    model.detach_experts()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] += 1
    monkeypatch.setattr(attachment, "SAMPLE", 100)
    freemerge.attach(model, merged).detach_experts()
    monkeypatch.setattr(attachment, "SAMPLE", 1 << 20)
    with pytest.raises(CheckpointError, match=r"^1 problem.*\n.*up_proj\.weight: other numbers"):
        freemerge.attach(model, merged)


def rewritten(path, change):
    """An expert's file with another header or other bytes: change(header, tensors, body)."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    tensors = json.loads(header["__metadata__"]["tensors"])
    change(header, tensors, body)
    header["__metadata__"]["tensors"] = json.dumps(tensors)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def with_values(role, change):
    def edit(header, tensors, body):
        entry = header[f"{role}/model.layers.0.mlp.up_proj.weight"]
        first, last = entry["data_offsets"]
        array = np.frombuffer(bytes(body[first:last]), {"F32": np.float32, "U16": np.uint16}[entry["dtype"]]).copy()
        change(array)
        body[first:last] = array.tobytes()

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_values("values", lambda a: a.__setitem__(3, np.nan)), r"up_proj\.weight has NaN or Inf"),
        (with_values("columns", lambda a: a.__setitem__(slice(None), a[::-1].copy())), "columns of a row of .* ascend"),
        (lambda h, t, b: h["__metadata__"].update(expert="code"), "is 'code', as .*code.safetensors is"),
        (lambda h, t, b: h["__metadata__"].update(backbone="f" * 32), "the others are for"),
        (lambda h, t, b: t["lm_head.weight"].update(scale="2"), "metadata do not describe its tensors"),
        (lambda h, t, b: t["lm_head.weight"].update(scale=float("inf")), "has the scale inf"),
    ],
)
def test_what_no_merge_writes_is_refused_where_no_checksum_tells(merged, model, tmp_path, change, message):
    folder = shutil.copytree(merged / "experts", tmp_path / "copy")
    rewritten(folder / "math.safetensors", change)
    model.detach_experts()
    with pytest.raises(CheckpointError, match=message):
        freemerge.attach(model, folder)
    assert not hasattr(model, "use_expert")


@pytest.mark.parametrize("how", ["truncated", "tampered", "header"])
def test_damaged_files_are_refused(merged, model, tmp_path, how):
    folder = shutil.copytree(merged, tmp_path / "copy")
    path = folder / "experts" / "math.safetensors"
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[-10:]
    elif how == "tampered":
        content[-1] ^= 64
    else:
        content[20] ^= 64
    path.write_bytes(content)
    model.detach_experts()
    with pytest.raises(CheckpointError, match=r"math\.safetensors"):
        freemerge.attach(model, folder)
    if how != "tampered":  # without a manifest the header alone tells
        (folder / "freemerge.json").unlink()
        with pytest.raises(CheckpointError, match=r"math\.safetensors"):
            freemerge.attach(model, folder / "experts")
    assert not hasattr(model, "use_expert")


def test_columns_that_lead_out_of_a_tensor_are_refused(merged, model):
    from freemerge.attached.opening import open_experts
    from freemerge.experts.memory import MemoryExpert
    from freemerge.parts import Rows

    found = open_experts(merged, None).experts["math"]
    part = found.tensors["model.norm.weight"]
    broken = MemoryExpert("broken")
    columns = part.columns + np.uint16(48)
    broken.write("model.norm.weight", Rows(part.offsets, columns, part.values, part.shape))
    broken.finish({"mode": "add"}, {"model.norm.weight": 1.0})
    model.detach_experts()
    with pytest.raises(CheckpointError, match=r"broken: model\.norm\.weight: column"):
        freemerge.attach(model, [broken])


def test_folders_without_experts(merged, tmp_path, model):
    model.detach_experts()
    with pytest.raises(InputError, match="holds no experts"):
        freemerge.attach(model, tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        freemerge.load(tmp_path / "nowhere")
    applied(merged, "math", tmp_path / "plain")
    for plain in (tmp_path / "plain", merged.parent / "base"):
        with pytest.raises(InputError, match="has no experts"):
            freemerge.load(plain)
    for dtype in ("bf16", torch.int8):
        with pytest.raises(InputError, match="a float type of torch, or its name"):
            freemerge.load(merged, dtype=dtype)


def test_load_makes_any_class(tmp_path):
    from freemerge.testing import write_checkpoint

    def small():
        return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))

    for seed in range(3):
        tensors = {name: random_array(tuple(t.shape), BFLOAT16, seed) for name, t in small().state_dict().items()}
        write_checkpoint(tmp_path / str(seed), tensors)
    sources = {"a": tmp_path / "1", "b": tmp_path / "2"}
    freemerge.merge("free", base=tmp_path / "0", experts=sources, out=tmp_path / "merged", density=0.5, fsync=False)
    model = freemerge.load(tmp_path / "merged", model_class=small, verify=True)
    model.use_expert("b")
    assert weights(model) == applied(tmp_path / "merged", "b", tmp_path / "out")
    with pytest.raises(InputError, match=r"config\.json names no class"):
        freemerge.load(tmp_path / "merged")
    with pytest.raises(CheckpointError, match="missing from the checkpoint"):
        freemerge.load(tmp_path / "merged", model_class=lambda: nn.Linear(6, 4))


def test_a_model_with_experts_is_not_pickled(model, tmp_path):
    with pytest.raises(InputError, match="detach_experts"):
        torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
