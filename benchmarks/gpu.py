"""Measure freemerge on this machine's GPU: python benchmarks/gpu.py. A table last; everything in JSON."""

import argparse
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch

import machine
from gpu_experts import measure_experts
from gpu_merges import measure_merges
from gpu_ops import measure_ops
from gpu_results import Figure, printed, write_json
from gpu_timing import Device

RESULTS = Path(__file__).parent / "results"
ROOM = 60 << 30  # bytes the 8B models and their merge take


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--no-merges", action="store_true", help="ops and experts only: no files, no Session")
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes, to try the benchmark itself")
    options = parser.parse_args()
    if not torch.cuda.is_available() and options.shrink == 1:
        print("no GPU here, nothing measured; `freemerge info` says what is missing", file=sys.stderr)
        return 1
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidths = {"copy": device.copy_bandwidth(), "host_to_device": device.host_bandwidth()}
    figures = []
    for figure in _measured(device, bandwidths, options):
        print(*figure.row(), sep="  ", flush=True)
        figures.append(figure)
    facts = {"date": str(date.today()), **device.describe(), **machine.describe(), "versions": machine.versions()}
    write_json(options.out, facts, bandwidths, figures)
    print(f"\n{facts['device']}; GB/s: " + ", ".join(f"{name} {b / 1e9:.0f}" for name, b in bandwidths.items()))
    print(printed(figures))
    return int(any(figure.error for figure in figures))


def _measured(device: Device, bandwidths: dict[str, float], options) -> Iterator[Figure]:
    copy, host = bandwidths.values()
    for figures in measure_ops(device, copy, shrink=options.shrink):
        yield from _kept(figures)
    for figures in measure_experts(device, shrink=options.shrink):
        yield from _kept(figures)
    if not options.no_merges:
        with tempfile.TemporaryDirectory(dir=_roomy_folder()) as folder:
            for figures in measure_merges(device, Path(folder), copy, host, shrink=options.shrink):
                yield from _kept(figures)


def _kept(figures: Iterator[Figure]) -> Iterator[Figure]:
    """A failure is a figure too: device time is rare, and the others count."""
    try:
        yield from figures
    except Exception as error:
        traceback.print_exc()
        yield Figure.failed(figures.__name__.strip("_"), error)


def _roomy_folder() -> str:
    """Memory, where there is enough of it: merges are measured from the page cache."""
    shared = Path("/dev/shm")
    return str(shared) if shared.exists() and shutil.disk_usage(shared).free > ROOM else tempfile.gettempdir()


if __name__ == "__main__":
    sys.exit(main())
