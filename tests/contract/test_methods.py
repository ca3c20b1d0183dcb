"""What every method promises, with a tiny network: it learns, remembers, resumes, shares work, and keeps off labels."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_run import (
    CPU,
    GRANTED,
    LINKS,
    NETWORKS,
    QUIET,
    described,
    given,
    loaded,
    make_world,
    run_file,
    same_tensors,
    settings,
    streams,
    taken,
    tensors_below,
    training,
)
from udas.data.batch import Stream
from udas.methods.base import Method
from udas.names import METHODS, load_method
from udas.networks.generators import load_translator
from udas.networks.weights import load_segmenter
from udas.pipeline.run import run
from udas.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from udas.training.log import read_log
from udas.training.loop import Training

every_method = pytest.mark.parametrize("name", METHODS)
REAL = frozenset({Stream.LABELLED, Stream.UNLABELLED})
semi_supervised = pytest.mark.parametrize(
    "name", [name for name in METHODS if (kind := load_method(name)).needs == REAL and Stream.SOURCE in kind.optional]
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def state(method: Method[Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


def trained(world: Path, folder: Path, name: str, steps: int, **options: Any) -> Training:
    job = training(folder, name, steps, **options)
    job.run(given(world, job.method))
    return job


class StoppedError(Exception):
    """Ends a training as a kill would, between two steps."""


def stop_before(job: Training, step: int) -> None:
    """Let `job` fail when it begins `step`."""
    original = job.method.step

    def counted(batch: Any) -> None:
        if job.engine.step == step:
            raise StoppedError
        original(batch)

    job.method.step = counted  # type: ignore[method-assign]


@every_method
def test_two_steps_move_every_optimisers_parameters_and_the_model(world: Path, tmp_path: Path, name: str) -> None:
    job = training(tmp_path, name, steps=2)
    before, model = state(job.method), {k: v.clone() for k, v in job.method.model().state_dict().items()}
    job.run(given(world, job.method))
    after = {id(p): p for p in job.method.parameters()}
    names = {id(p): key for key, p in job.method.named_parameters()}
    for optimiser, updater in job.engine.updaters.items():
        still = [names[id(p)] for p in updater.parameters if torch.equal(before[names[id(p)]], after[id(p)])]
        assert len(still) < len(updater.parameters) / 10, (optimiser, still)
    assert not same_tensors(model, job.method.model().state_dict())
    assert all(tensor.isfinite().all() for tensor in job.method.state_dict().values())


@every_method
def test_a_checkpoint_restores_everything_a_method_remembers(world: Path, tmp_path: Path, name: str) -> None:
    job = trained(world, tmp_path / "run", name, steps=3)
    save_checkpoint(tmp_path / "state", job.method, job.engine, Progress(3, 0.5, 1.5))
    other = training(tmp_path / "other", name, steps=3, seed=1)
    assert not same_tensors(other.method.state_dict(), job.method.state_dict())
    assert load_checkpoint(tmp_path / "state", other.method, other.engine) == Progress(3, 0.5, 1.5)
    assert same_tensors(other.method.state_dict(), job.method.state_dict())
    assert same_tensors(other.engine.state(), job.engine.state())


@every_method
def test_a_stopped_and_resumed_training_ends_bit_identical(world: Path, tmp_path: Path, name: str) -> None:
    stop_and_resume(world, tmp_path, name, 6)


@semi_supervised
def test_a_training_without_synthetic_pictures_resumes_bit_identical(world: Path, tmp_path: Path, name: str) -> None:
    stop_and_resume(world, tmp_path, name, 4, chosen=REAL)


def stop_and_resume(world: Path, tmp_path: Path, name: str, steps: int, **options: Any) -> None:
    """Train at once; and again, stopped after a checkpoint and one more step, and resumed from other weights."""
    options |= {"checkpoint_every": 2}
    whole = trained(world, tmp_path / "whole", name, steps, **options)
    stopped = training(tmp_path / "parts", name, steps, **options)
    stop_before(stopped, 3)
    with pytest.raises(StoppedError):
        stopped.run(given(world, stopped.method))
    resumed = trained(world, tmp_path / "parts", name, steps, seed=5, **options)
    assert resumed.progress.step == steps
    assert same_tensors(whole.method.state_dict(), resumed.method.state_dict())
    assert same_tensors(tensors_below(tmp_path / "whole"), tensors_below(tmp_path / "parts"))


# ---------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def shared_work(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method trained by one process, and by two that share its batch."""
    folder = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("processes.py")
    command = [sys.executable, str(script), str(world), str(folder), *METHODS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@every_method
def test_two_processes_agree_with_one(shared_work: Path, name: str) -> None:
    """With the same global batch, up to summation order.

    The networks have neither batch norm nor dropout, which see a process's own pictures and random numbers; and every
    pixel has a label, for the mean of two means over pixels to be the mean over all. See also `PER_PROCESS`.

    The losses of the second step tell how exact the first update was. From then on rounding can grow: where an
    activation is at its kink, a change of the weights by 1e-7 changes a generator's third losses by 1e-3.
    """
    one, two = shared_work / "1" / name, shared_work / "2" / name
    lines = [[line["losses"] for line in read_log(folder / "log.jsonl")] for folder in (one, two)]
    assert len(lines[0]) == len(lines[1]) == 2
    for alone, shared in zip(*lines, strict=True):
        assert alone.keys() == shared.keys()
        assert shared == pytest.approx(alone, rel=1e-4, abs=1e-6)
    (start, alone), (_, shared) = (torch.load(p / "parameters.pt", weights_only=True) for p in (one, two))
    assert alone.keys() == shared.keys()
    for key, value in alone.items():
        assert (shared[key] - value).norm() <= 0.1 * (value - start[key]).norm() + 1e-6, key


# --------------------------------------------------------------------------------------------------------- firewall


@pytest.fixture
def guarded(tmp_path: Path) -> Path:
    """A world in which only the granted labels of the real training pictures exist."""
    world = make_world(tmp_path / "world")
    granted = set(streams(world)[Stream.LABELLED].labels.values())
    labels = sorted((world / "road/labels/train").iterdir())
    for path in labels:
        if path not in granted:
            path.unlink()
    assert (len(granted), len(labels)) == (GRANTED, 6)
    return world


def chain(name: str) -> dict[str, Any]:
    """A run of the method, with the stages before it that it builds on."""
    method = {"method": settings(name), "training": {"augment": {"crop": [32, 32]}}}
    method |= {"network": NETWORKS[name]} if name in NETWORKS else {}
    links = {"pseudo": "labels"} if Stream.PSEUDO in taken(name) else {}
    links |= LINKS.get(name, {})
    earlier = {
        "teacher": {"method": {"name": "supervised"}, "streams": ["source"]},
        "labels": {"kind": "label", "model": "teacher", "rule": {"views": 2, "threshold": 0.0}},
        "prototypes": {"kind": "prototypes", "model": "teacher", "minimum": 1},
    }
    used = {stage: earlier[stage] for stage in earlier if stage in links.values() or (links and stage == "teacher")}
    return used | {"tested": method | links}


@every_method
def test_a_run_opens_no_label_that_was_not_granted(guarded: Path, tmp_path: Path, name: str) -> None:
    config = loaded(run_file(tmp_path / "run.yaml", guarded, chain(name)))
    report = run(config, tmp_path / "run", CPU, QUIET)
    assert report.is_file()
    for stage in config.stages:
        assert json.loads((tmp_path / "run" / stage / "manifest.json").read_text())["state"] == "done"


@semi_supervised
def test_a_run_of_real_pictures_opens_nothing_else(guarded: Path, tmp_path: Path, name: str) -> None:
    """Neither labels that were not granted nor synthetic pictures exist."""
    shutil.rmtree(guarded / "game")
    real = {"data": {"target": described(guarded, "road")}}
    config = loaded(run_file(tmp_path / "run.yaml", guarded, chain(name), **real))
    assert run(config, tmp_path / "run", CPU, QUIET).is_file()
    assert json.loads((tmp_path / "run/tested/manifest.json").read_text())["state"] == "done"


def test_the_unlabelled_stream_has_no_path_to_labels(world: Path) -> None:
    pictures = streams(world)[Stream.UNLABELLED]
    assert len(pictures) == 6
    assert not pictures.labels
    assert pictures.label_map is None


# ----------------------------------------------------------------------------------------------------------- export


@every_method
def test_a_saved_model_gives_the_same_pictures_when_loaded(world: Path, tmp_path: Path, name: str) -> None:
    method = trained(world, tmp_path / "run", name, steps=1).method
    method.save_model(tmp_path / "model.safetensors")
    translates = method.makes == "translator"
    load = load_translator if translates else lambda path: load_segmenter(path)[0]
    image = torch.rand(2, 3, 40, 52, generator=torch.Generator().manual_seed(0))
    model, read = method.model().eval(), load(tmp_path / "model.safetensors").eval()
    assert same_tensors(read.state_dict(), model.state_dict())
    with torch.no_grad():
        expected, found = model(image), read(image)
    torch.testing.assert_close(found, expected)  # the memory format, and so the rounding, differs
    assert expected.shape[1] == (3 if translates else 11)
