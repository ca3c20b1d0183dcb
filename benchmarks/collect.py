"""What stands behind the numbers of a run: `python benchmarks/collect.py runs/NAME docs/results/NAME`.

Copies the tables and the log of every train stage, and gathers the manifests (commit, machine, seconds, fingerprints).
The run file itself is written by hand and stays as it is.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import yaml


def collect(run: Path, out: Path) -> None:
    (out / "logs").mkdir(parents=True, exist_ok=True)
    for suffix in (".md", ".json", ".csv"):
        shutil.copy(run / f"results{suffix}", out / f"results{suffix}")
    manifests = {}
    for stage in yaml.safe_load((run / "run.yaml").read_text())["stages"]:
        manifest = run / stage / "manifest.json"
        if manifest.exists():
            manifests[stage] = json.loads(manifest.read_text())
        if (run / stage / "log.jsonl").exists():
            shutil.copy(run / stage / "log.jsonl", out / "logs" / f"{stage}.jsonl")
        if (run / stage / "statistics.json").exists():
            shutil.copy(run / stage / "statistics.json", out / "logs" / f"{stage}.statistics.json")
    (out / "manifests.json").write_text(json.dumps(manifests, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    collect(Path(sys.argv[1]), Path(sys.argv[2]))
