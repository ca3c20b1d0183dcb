"""A run that is killed again and again, and started again with the same command, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_run import make_world, run_file, same_tensors, settings, tensors_below

KILLS = 10
CROP = {"augment": {"crop": [32, 32]}}
STAGES: dict[str, Any] = {
    "style": {"method": settings("cyclegan"), "training": CROP},
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

Attempt = Callable[[list[str], float | None, Path], int | None]
"""(arguments of udas, seconds until the kill or None, file for what is printed) -> exit code, None when killed."""


@pytest.fixture(scope="module")
def forked() -> Iterator[Attempt]:
    """Starts udas by forking a process that has imported it already."""
    command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as zygote:
        assert zygote.stdin is not None
        assert zygote.stdout is not None

        def attempt(argv: list[str], after: float | None, output: Path) -> int | None:
            zygote.stdin.write(json.dumps({"argv": argv, "after": after, "output": str(output)}) + "\n")
            zygote.stdin.flush()
            return json.loads(zygote.stdout.readline())

        yield attempt
        zygote.stdin.close()


@pytest.fixture(scope="module")
def started() -> Attempt:
    """Starts udas as a user does; its imports take longer than the run."""

    def attempt(argv: list[str], after: float | None, output: Path) -> int | None:
        with output.open("a") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "udas", *argv], env=environment(), stdout=file, stderr=file
            )
        try:
            return process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None

    return attempt


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def results(folder: Path) -> dict[str, bytes]:
    """Labels, repainted pictures and scores, by path."""
    found = [path for kind in ("*.png", "evaluation.json") for path in folder.rglob(kind) if "old" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("launcher", ["forked", pytest.param("started", marks=pytest.mark.slow)])
def test_ten_kills_change_no_bit_of_any_network(launcher: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    attempt: Attempt = request.getfixturevalue(launcher)
    world = make_world(tmp_path / "world")
    file = run_file(
        tmp_path / "run.yaml", world, STAGES, training={"steps": 6, "batch": 2},
        logging={"every": 2, "checkpoint_every": 2, "evaluate_every": 3},
    )  # fmt: skip
    output = tmp_path / "output.txt"

    def command(folder: Path) -> list[str]:
        return ["run", str(file), "--out", str(folder)]

    began = time.monotonic()
    assert attempt(command(tmp_path / "whole"), None, output) == 0, output.read_text()
    duration = time.monotonic() - began
    whole, tensors = results(tmp_path / "whole"), tensors_below(tmp_path / "whole")
    assert len([name for name in tensors if "/last.safetensors" in name]) > 100

    chance, kills, number = random.Random(0), 0, 0
    while kills < KILLS:  # a run that finishes before the last kill is followed by another one
        folder, number = tmp_path / f"killed{number}", number + 1
        while (code := attempt(command(folder), chance.uniform(0, 0.7 * duration), output)) is None:
            kills += 1
        assert code == 0, output.read_text()
        after = {name: tensor for name, tensor in tensors_below(folder).items() if not name.startswith("old/")}
        assert same_tensors(after, tensors)
        assert results(folder) == whole
        assert not [path for path in folder.rglob(".*") if path.name != ".lock"]
