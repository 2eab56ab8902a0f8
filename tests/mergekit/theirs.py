"""Run recipes with mergekit, all in one process: its imports take longer than a tiny merge.

python theirs.py JOBS.json   a list of [recipe file, output folder, options of mergekit], run in this order

Where mergekit fails, the folder holds error.txt and nothing else.
"""

import json
import shutil
import sys
import traceback
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main() -> None:
    torch.set_num_threads(1)
    for recipe, out, options in json.loads(Path(sys.argv[1]).read_text()):
        try:
            config = MergeConfiguration.model_validate(yaml.safe_load(Path(recipe).read_text()))
            run_merge(config, out, MergeOptions(quiet=True, write_model_card=False, random_seed=0, **options))
        except Exception:
            shutil.rmtree(out, ignore_errors=True)
            Path(out).mkdir(parents=True)
            (Path(out) / "error.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main()
