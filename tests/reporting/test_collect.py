"""The script that puts rows of several runs into one table of `docs/results`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from reporting.run_folder import add_evaluation, add_labels, add_train
from udas.pipeline.run import write_results

SCRIPT = Path(__file__).parents[2] / "benchmarks/collect.py"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder of results whose run file says in which order rows stand."""
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "run.yaml").write_text("stages: {alone: {}, evaluate_alone: {}, teacher: {}, student: {}}")
    return folder


def finished_run(folder: Path, **levels: float) -> Path:
    """A run whose train stages are named, with the share of pixels that each gets wrong."""
    for name, wrong in levels.items():
        add_train(folder, name, 0.5)
        add_evaluation(folder, name, wrong)
    stages = {name: {"kind": "train"} for name in levels} | {f"evaluate_{name}": {} for name in levels}
    (folder / "run.yaml").write_text(yaml.safe_dump({"name": folder.name, "stages": stages}, sort_keys=False))
    write_results(folder)
    return folder


def collect(run: Path, out: Path) -> dict[str, float]:
    """Rows of the table after a run was added: title -> mIoU, in order."""
    subprocess.run([sys.executable, SCRIPT, run, out], check=True)
    return {row["title"]: row["miou"] for row in json.loads((out / "results.json").read_text())}


def test_rows_of_runs_join_in_the_order_of_the_run_file_and_a_repeated_row_is_replaced(
    tmp_path: Path, out: Path
) -> None:
    first = collect(finished_run(tmp_path / "first", student=0.3, alone=0.5), out)
    second = collect(finished_run(tmp_path / "second", teacher=0.4, alone=0.2), out)
    assert list(first) == ["Alone", "Student"]
    assert list(second) == ["Alone", "Teacher", "Student"]
    assert second["Student"] == first["Student"]
    assert second["Alone"] > first["Alone"]


def test_what_stands_behind_the_rows_lies_beside_them_and_unfinished_stages_do_not(tmp_path: Path, out: Path) -> None:
    run = finished_run(tmp_path / "run", alone=0.3)
    add_labels(run, "label", "alone", 0.3, shown=0)
    add_train(run, "student", 0.5, state="stopped")
    collect(run, out)
    manifests = json.loads((out / "manifests.json").read_text())
    assert set(manifests) == {"alone", "evaluate_alone", "label"}
    assert (out / "logs/alone.jsonl").read_bytes() == (run / "alone/log.jsonl").read_bytes()
    assert {path.name for path in out.iterdir()} >= {"results.csv", "results.md"}
    assert {path.name for path in (out / "logs").iterdir()} == {"alone.jsonl", "label.statistics.json"}
