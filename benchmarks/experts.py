"""Experts in a running model against the bars: switching, a mixed batch, memory.

    python benchmarks/experts.py                         all of it: ten minutes on 2 cores, 12 GiB
    python benchmarks/experts.py --only encoder_4,switch  some
    python benchmarks/experts.py --layers 1              in small

Eight experts of 1 % of the weights, at random places. Each case is a process of its own, in which everything that is
compared takes turns; medians of ROUNDS. Rows are appended to benchmarks/results/experts.csv.

switch          use_expert on the 1.1 B Llama in bfloat16, against loading its file from the page cache
encoder_4, _16  6 layers of 768, float32: 32 rows of 4 or 16 tokens over 8 experts
decoder         the 1.1 B Llama, float32: one token of each of 32 rows, as in generation, but with no cache of keys
*_memory        what a process holds more with 8 experts than with one, each used in place and routed, against 7 files
"""

import argparse
import copy
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import machine
import results
from bars import at_least, at_most

RESULTS = Path(__file__).parent / "results" / "experts.csv"
EXPERTS, DENSITY, ROWS = 8, 0.01, 32
ROUNDS = 7
SWITCH_BAR, DENSE_BAR, SWAP_BAR, MEMORY_BAR = 0.03, 1.3, 4.0, 1.05


# ---- the cases, each in a process of its own: milliseconds, or shares, by name ----


def switch(layers: int | None, folder: Path) -> dict[str, float]:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from synthetic import make_checkpoint

    base = make_checkpoint(folder / "base", llama(layers), None, 0)

    def read() -> None:  # what a loader does at least: every byte of the file in memory of the process
        for tensor in load_file(base / "model.safetensors").values():
            tensor.clone()

    def load():
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)

    model = attached(load())
    first, second = model.experts[:2]
    steps = {  # in this order: the first is put in place, changed for the second, and taken out
        "file read": read,
        "from_pretrained": load,
        "expert put in place": lambda: model.use_expert(first),
        "changed for another": lambda: model.use_expert(second),
        "taken out": lambda: model.use_expert(None),
    }
    return in_turns(steps)


def mixed_batch(model, tokens: int, folder: Path) -> dict[str, float]:
    """The backbone alone, routed, and the rows of one expert after the other on a model changed for them."""
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    path, other = folder / "model.safetensors", copy.deepcopy(model)
    save_file(model.state_dict(), path)
    model = attached(model)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, model.config.vocab_size, (ROWS, tokens)))
    assignment = [model.experts[row % EXPERTS] for row in range(ROWS)]
    groups = {name: [row for row, own in enumerate(assignment) if own == name] for name in model.experts}

    def routed():
        with model.routed(assignment):
            return model(ids).last_hidden_state

    def one_after_the_other(model, change: Callable[[str], object]):
        answer = torch.empty(ROWS, tokens, model.config.hidden_size)
        for name, rows in groups.items():
            change(name)
            answer[rows] = model(ids[rows]).last_hidden_state
        return answer

    def switched():
        answer = one_after_the_other(model, model.use_expert)
        model.use_expert(None)
        return answer

    def swapped():  # from files in the page cache; which of them takes the same time, so all are the backbone's
        return one_after_the_other(other, lambda name: other.load_state_dict(load_file(path)))

    with torch.inference_mode():
        torch.testing.assert_close(routed(), switched(), rtol=1e-3, atol=1e-3)  # many layers in float32
        return in_turns({"dense": lambda: model(ids), "routed": routed, "switched": switched, "swapped": swapped})


def memory(model, folder: Path) -> dict[str, float]:
    import torch

    import freemerge
    from attached_models import write_expert

    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    paths = [write_expert(folder / f"e{e}.safetensors", shapes, DENSITY, e) for e in range(EXPERTS)]
    ids = torch.zeros(EXPERTS, 2, dtype=torch.int64)

    def use(source) -> int:
        freemerge.attach(model, source)
        for name in (*model.experts, None):
            model.use_expert(name)
            model(ids)
        with model.routed([model.experts[row % len(model.experts)] for row in range(EXPERTS)]):
            model(ids)
        found = resident()
        model.detach_experts()
        return found

    with torch.inference_mode():
        use(paths[0])  # imports and threads
        one, all_of_them = use(paths[0]), use(folder)
    return {"held for 7 more": (all_of_them - one) / 1e6, "their files": sum(p.stat().st_size for p in paths[1:]) / 1e6}


def resident() -> int:
    """Bytes of memory this process holds, mapped files included, without what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(1024 * int(fields[key].split()[0]) for key in ("RssAnon", "RssFile"))


def encoder(layers: int | None):
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(num_hidden_layers=layers or 6), add_pooling_layer=False).eval()


def decoder(layers: int | None):
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig.from_dict(llama(layers).config() | {"use_cache": False})).eval()


def llama(layers: int | None):
    from synthetic import FULL

    return FULL if layers is None else replace(FULL, layers=layers)


def attached(model):
    import freemerge
    from attached_models import random_expert

    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    return freemerge.attach(model, [random_expert(f"e{e}", shapes, DENSITY, e) for e in range(EXPERTS)])


def in_turns(steps: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(found[1:]) for name, found in times.items()}


CASES: dict[str, Callable[[int | None, Path], dict[str, float]]] = {
    "switch": switch,
    "encoder_4": lambda layers, folder: mixed_batch(encoder(layers), 4, folder),
    "encoder_16": lambda layers, folder: mixed_batch(encoder(layers), 16, folder),
    "decoder": lambda layers, folder: mixed_batch(decoder(layers), 1, folder),
    "encoder_memory": lambda layers, folder: memory(encoder(layers), folder),
    "decoder_memory": lambda layers, folder: memory(decoder(layers), folder),
}


# ---- the report ----


@dataclass(frozen=True)
class Row:
    """One measurement, of experts.csv."""

    date: str
    cpu: str
    cores: str
    memory_gib: str
    versions: str
    case: str
    what: str
    value: str
    unit: str
    notes: str

    @classmethod
    def of(cls, case: str, layers: int | None, what: str, value: float, unit: str) -> "Row":
        return cls(
            date=datetime.now().isoformat(timespec="seconds"),
            **machine.describe(),
            versions=machine.versions(),
            case=case if layers is None else f"{case}, layers = {layers}",
            what=what,
            value=f"{value:.4g}",
            unit=unit,
            notes=machine.others(),
        )


def judge(case: str, found: Mapping[str, float]) -> list[tuple[str, ...]]:
    """(what, bar, measured, verdict)."""
    if case.endswith("memory"):
        held = found["held for 7 more"] / found["their files"]
        return [at_most(f"{case} of an expert", held, MEMORY_BAR, " x its file")]
    if case == "switch":
        whole = found["file read"]
        return [
            at_most(what, 100 * found[what] / whole, 100 * SWITCH_BAR, " % of reading the file")
            for what in ("expert put in place", "changed for another", "taken out")
        ]
    return [
        at_most(case, found["routed"] / found["dense"], DENSE_BAR, " x dense"),
        at_least(case, found["swapped"] / found["routed"], SWAP_BAR, " x faster than swapped models"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="cases, comma-separated [all]")
    parser.add_argument("--layers", type=int, help="of the models [6 and 22]")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"rows are appended here [{RESULTS}]")
    options = parser.parse_args()
    verdicts = []
    for case in options.only.split(","):
        found = in_process(case, options.layers)
        unit = "MB" if case.endswith("memory") else "ms"
        print(f"{case}: " + ", ".join(f"{what} {value:.0f} {unit}" for what, value in found.items()), flush=True)
        for what, value in found.items():
            results.append(options.out, Row.of(case, options.layers, what, value, unit))
        verdicts += judge(case, found)
    print(results.table(("what", "bar", "measured", "verdict"), verdicts))


def in_process(case: str, layers: int | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "measure", case, json.dumps(layers), folder]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        case, layers, folder = sys.argv[2:]
        print(json.dumps(CASES[case](json.loads(layers), Path(folder))))
    else:
        main()
