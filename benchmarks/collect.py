"""What stands behind the numbers of a run: `python benchmarks/collect.py runs/NAME docs/results/NAME`.

Takes the results, manifests (commit, machine, seconds, fingerprints) and training logs of the stages that are done, as
`udas report runs/NAME` has written them. What is in the folder already stays, or is replaced by a row of the same
title, so that rows can come from several runs; they stand in the order of the run file, which is written by hand.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from udas.evaluation.table import save_tables
from udas.storage import write_atomically


def collect(run: Path, out: Path) -> None:
    order = list(yaml.safe_load((out / "run.yaml").read_text())["stages"])
    finished = _finished(run)
    manifests = _read(out / "manifests.json", {}) | finished
    rows = {row.pop("title"): row for row in _read(out / "results.json", []) + _read(run / "results.json", [])}
    places = {manifests[stage]["title"]: place for place, stage in enumerate(order) if stage in manifests}
    save_tables(sorted(rows.items(), key=lambda row: places.get(row[0], len(places))), out / "results")
    (out / "results.txt").unlink()  # the Markdown says the same
    write_atomically(out / "manifests.json", (json.dumps(manifests, indent=1) + "\n").encode())
    for stage in finished:
        _copy_logs(run / stage, out / "logs")


def _finished(run: Path) -> dict[str, Any]:
    """The manifests of the stages that are done, by stage."""
    found = {path.parent.name: _read(path, {}) for path in sorted(run.glob("*/manifest.json"))}
    return {stage: manifest for stage, manifest in found.items() if manifest["state"] == "done"}


def _copy_logs(stage: Path, logs: Path) -> None:
    """The training log, and the statistics of rankings and labels, where the stage has them."""
    logs.mkdir(exist_ok=True)
    for name, suffix in (("log.jsonl", ".jsonl"), ("statistics.json", ".statistics.json")):
        if (stage / name).exists():
            shutil.copy(stage / name, logs / f"{stage.name}{suffix}")


def _read(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else default


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    collect(Path(sys.argv[1]), Path(sys.argv[2]))
