"""A run that is killed again and again, and started again with the same command, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_run import make_world, run_file, same_tensors, settings, tensors_below

KILLS = 10
TRAINING = {"steps": 6, "batch": 2}
LOGGING = {"every": 2, "checkpoint_every": 2, "evaluate_every": 3}
CROP = {"augment": {"crop": [32, 32]}}
STAGES: dict[str, Any] = {
    "style": {"method": settings("cyclegan") | {"semantic": 0}, "training": CROP},
    "repainted": {"kind": "translate", "model": "style"},
    "teacher": {"method": settings("udas"), "source": "repainted"},
    "student": {
        "kind": "rounds",
        "rounds": 1,
        "model": "teacher",
        "label": {"views": 2, "threshold": 0.0, "confidence": True},
        "student": {"method": settings("supervised") | {"strong": True}, "start": "teacher"},
    },
}
"""Every kind of stage, and of memory: optimisers, averaged weights, an image pool, critics."""

Attempt = Callable[[Path, float | None], tuple[int | None, float]]
"""(folder of the run, seconds of processor time until the kill) -> (exit code or None if killed, seconds used)."""


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Attempt]:
    """`udas run`, forked from a process that has imported it already."""
    world, output = make_world(tmp_path / "world"), tmp_path / "output.txt"
    file = run_file(tmp_path / "run.yaml", world, STAGES, training=TRAINING, logging=LOGGING)
    command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as zygote:

        def run(folder: Path, after: float | None) -> tuple[int | None, float]:
            job = {"argv": ["run", str(file), "--out", str(folder)], "after": after, "output": str(output)}
            zygote.stdin.write(json.dumps(job) + "\n")
            zygote.stdin.flush()
            code, used = json.loads(zygote.stdout.readline())
            assert code in (None, 0), output.read_text()
            return code, used

        yield run
        zygote.stdin.close()


def results(folder: Path) -> dict[str, bytes]:
    """Labels, repainted pictures and scores, by path."""
    found = [path for kind in ("*.png", "evaluation.json") for path in folder.rglob(kind) if "old" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_kills_change_no_bit_of_any_network(attempt: Attempt, tmp_path: Path) -> None:
    _, duration = attempt(tmp_path / "whole", None)
    expected, tensors = results(tmp_path / "whole"), tensors_below(tmp_path / "whole")
    assert len([name for name in tensors if "/last.safetensors" in name]) > 100

    chance, kills, number = random.Random(0), 0, 0
    while kills < KILLS:  # a run that finishes before the last kill is followed by another one
        folder, number = tmp_path / f"killed{number}", number + 1
        while attempt(folder, chance.uniform(0, 0.6 * duration))[0] is None:
            kills += 1
        after = {name: tensor for name, tensor in tensors_below(folder).items() if not name.startswith("old/")}
        assert same_tensors(after, tensors)
        assert results(folder) == expected
        assert not [path for path in folder.rglob(".*") if path.name != ".lock"]
