"""The loop: it learns from every step once, stops when a loss is not finite, and goes on where it was."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import CPU, Toy, engine, pictures, toy, training

from tiny_run import same_tensors
from udas.data.batch import Batch, Stream
from udas.errors import DataError, RunError
from udas.training.checkpoint import Progress, load_checkpoint
from udas.training.log import read_log
from udas.training.loop import BEST, LAST, TrainingConfig


class Watching(Toy):
    """Remembers the step, the pictures and a random number of every step, and the mode it was in."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[tuple[int, tuple[str, ...], float]] = []

    def step(self, batch: Batch) -> None:
        assert batch.unlabelled is not None
        assert self.training
        self.seen.append((self.engine.step, batch.unlabelled.names, float(torch.rand(()))))
        super().step(batch)


def watching() -> Watching:
    torch.manual_seed(0)
    return Watching()


def weights(method: Toy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


def state_of(path: Path) -> tuple[dict[str, Tensor], int]:
    method = toy(seed=9)
    progress = load_checkpoint(path, method, engine(method))
    return weights(method), progress.step


def test_steps_see_the_same_pictures_and_random_numbers_after_a_stop(tmp_path: Path) -> None:
    streams = pictures(tmp_path / "pictures")
    whole, parts = watching(), [watching(), watching()]
    training(tmp_path / "whole", whole).run(streams)
    first = training(tmp_path / "parts", parts[0])
    first.config = first.config.model_copy(update={"steps": 4})  # the schedule is still that of six steps
    first.run(streams)
    training(tmp_path / "parts", parts[1]).run(streams)
    assert [seen[0] for seen in parts[0].seen + parts[1].seen] == list(range(6))
    assert parts[0].seen + parts[1].seen == whole.seen
    assert len({number for _, _, number in whole.seen}) == 6
    assert same_tensors(parts[1].state_dict(), whole.state_dict())


def test_lines_of_losses_are_those_of_a_training_that_was_never_stopped(tmp_path: Path) -> None:
    """A mean over the steps since the last line, also where a checkpoint lies between two lines."""

    def killed(batch: Batch) -> None:
        if method.engine.step == 3:
            raise SystemExit
        Toy.step(method, batch)

    def told(name: str) -> list[Any]:
        return [(line["step"], line["losses"]) for line in read_log(tmp_path / name / "log.jsonl")]

    streams, method = pictures(tmp_path / "pictures"), toy()
    training(tmp_path / "whole", toy(), every=4).run(streams)
    method.step = killed  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        training(tmp_path / "parts", method, every=4).run(streams)
    assert told("parts") == []
    training(tmp_path / "parts", toy(), every=4).run(streams)
    assert [step for step, _ in told("parts")] == [4, 6]
    assert told("parts") == told("whole")


def test_a_finished_training_does_nothing_but_restore_its_weights(tmp_path: Path) -> None:
    streams = pictures(tmp_path / "pictures")
    done, again = watching(), watching()
    training(tmp_path / "run", done).run(streams)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    training(tmp_path / "run", again).run(streams)
    assert again.seen == []
    assert same_tensors(again.state_dict(), done.state_dict())
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_pictures(tmp_path: Path) -> None:
    streams, folder = pictures(tmp_path / "pictures"), tmp_path / "run"
    good, bad, watched = toy(), toy(), watching()
    training(tmp_path / "good", good, steps=3).run(streams)
    training(tmp_path / "watched", watched).run(streams)
    bad.bad_step = 3
    with pytest.raises(RunError) as caught:
        training(folder, bad).run(streams)
    names = watched.seen[3][1]
    text = str(caught.value)
    assert text.startswith("step 3: a loss or gradient is not finite. ")
    assert f"unlabelled: {', '.join(names)}" in text
    assert str(folder / "failed.safetensors") in text
    told = json.loads((folder / "failed.json").read_text())
    assert (told["step"], told["pictures"]) == (3, {"unlabelled": list(names)})
    assert told["losses"]["fool"] == "nan"
    assert same_tensors(state_of(folder / "failed.safetensors")[0], good.state_dict())
    assert state_of(folder / LAST)[1] == 2


def test_the_last_checkpoint_is_one_that_continues(tmp_path: Path) -> None:
    streams, folder = pictures(tmp_path / "pictures"), tmp_path / "run"
    bad, mended, whole = toy(), toy(seed=4), toy()
    bad.bad_step = 3
    with pytest.raises(RunError):
        training(folder, bad).run(streams)
    training(folder, mended).run(streams)
    training(tmp_path / "whole", whole).run(streams)
    assert same_tensors(mended.state_dict(), whole.state_dict())


def test_checkpoints_come_when_they_are_due_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def note(path: Path, method: Toy, lent: object, progress: Progress) -> None:
        written.append((path.name, progress.step))

    monkeypatch.setattr("udas.training.loop.save_checkpoint", note)
    training(tmp_path, toy(), steps=5, checkpoint_every=2).run(pictures(tmp_path / "pictures"))
    assert written == [(LAST, 2), (LAST, 4), (LAST, 5)]


def test_the_best_validation_is_kept_beside_the_last_and_chooses_nothing(tmp_path: Path) -> None:
    scores, modes, seen = iter([0.2, 0.6, 0.4]), [], []

    def validate(model: nn.Module) -> dict[str, Any]:
        modes.append(model.training)
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"miou": next(scores), "pixel_accuracy": 0.5, "iou": {"road": None, "sky": 0.1}}

    method, plain = watching(), toy()
    streams = pictures(tmp_path / "pictures")
    training(tmp_path / "run", method, validate=validate, evaluate_every=2).run(streams)
    training(tmp_path / "plain", plain).run(streams)
    assert modes == [False] * 3
    assert same_tensors(load_file(tmp_path / "run" / BEST), seen[1])
    assert state_of(tmp_path / "run" / LAST)[1] == 6
    assert same_tensors(method.state_dict(), plain.state_dict())
    curve = [(line["step"], line["val"]["miou"]) for line in read_log(tmp_path / "run" / "log.jsonl") if "val" in line]
    assert curve == [(2, 0.2), (4, 0.6), (6, 0.4)]


def test_previews_change_nothing(tmp_path: Path) -> None:
    streams = pictures(tmp_path / "pictures")
    shown, plain = watching(), toy()
    training(tmp_path / "shown", shown, preview_every=3).run(streams)
    training(tmp_path / "plain", plain).run(streams)
    assert same_tensors(shown.state_dict(), plain.state_dict())
    found = sorted(str(p.relative_to(tmp_path / "shown")) for p in (tmp_path / "shown").rglob("*.jpg"))
    assert found == ["previews/0000003/painted.jpg", "previews/0000006/painted.jpg"]


def test_a_broken_picture_stops_with_its_name_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    streams, watched = pictures(tmp_path / "pictures"), watching()
    training(tmp_path / "watched", watched).run(streams)
    early = {name for _, names, _ in watched.seen[:2] for name in names}
    broken = next(p for p in streams[Stream.UNLABELLED].pictures if p.name not in early)
    broken.image.write_bytes(b"not a picture")
    with pytest.raises(DataError, match=broken.image.name):
        training(tmp_path / "run", toy()).run(streams)
    assert state_of(tmp_path / "run" / LAST)[1] == 2


class Interrupted(Toy):
    """Gets `signals` in the middle of its third step, and so do its loading processes."""

    signals: tuple[int, ...] = ()  # their numbers

    def step(self, batch: Batch) -> None:
        if self.engine.step == 2:
            for number in self.signals:
                signal_all(number)
        super().step(batch)


def signal_all(number: int) -> None:
    """Signal loading processes and this one, from another process: they may treat their parent's in their own way."""
    for pid in [*(worker.pid for worker in multiprocessing.active_children()), os.getpid()]:
        subprocess.run(["kill", f"-{number}", str(pid)], check=True)
        time.sleep(0.1)


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_ends_the_step_and_saves(tmp_path: Path, number: int, workers: int) -> None:
    streams, before = pictures(tmp_path / "pictures"), signal.getsignal(number)
    torch.manual_seed(0)
    method = Interrupted()
    method.signals = (int(number),)
    training(tmp_path / "whole", whole := toy()).run(streams)
    interrupted = training(tmp_path / "parts", method, checkpoint_every=100)
    interrupted.runtime = replace(CPU, workers=workers)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(streams)
    assert signal.getsignal(number) == before
    assert state_of(tmp_path / "parts" / LAST)[1] == 3
    training(tmp_path / "parts", resumed := toy()).run(streams)
    assert same_tensors(weights(resumed), weights(whole))


@pytest.mark.usefixtures("foreground")
def test_a_signal_during_a_validation_ends_it_and_saves(tmp_path: Path) -> None:
    def validate(model: nn.Module) -> dict[str, Any]:
        signal_all(signal.SIGTERM)
        return {"miou": 0.5, "pixel_accuracy": 0.5, "iou": {}}

    interrupted = training(tmp_path, toy(), checkpoint_every=100, evaluate_every=2, validate=validate)
    interrupted.runtime = replace(CPU, workers=2)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(pictures(tmp_path / "pictures"))
    assert state_of(tmp_path / LAST)[1] == 2


@pytest.mark.usefixtures("foreground")
def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    method = Interrupted()
    method.signals = (int(signal.SIGTERM), int(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path, method, checkpoint_every=100).run(pictures(tmp_path / "pictures"))
    assert not (tmp_path / LAST).exists()


def test_signals_that_are_ignored_stay_ignored(tmp_path: Path) -> None:
    method = Interrupted()
    method.signals = (int(signal.SIGINT),)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        training(tmp_path, method).run(pictures(tmp_path / "pictures"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert state_of(tmp_path / LAST)[1] == 6


def test_batches_are_given_for_all_streams_or_by_stream() -> None:
    assert TrainingConfig(batch=3).batch_of(Stream.SOURCE) == 3
    by_stream = TrainingConfig(batch={Stream.SOURCE: 4})
    assert (by_stream.batch_of(Stream.SOURCE), by_stream.batch_of(Stream.LABELLED)) == (4, 8)


def test_every_step_has_its_own_random_numbers_by_rank() -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        runtime = type(CPU)(CPU.device, "fp32", rank=rank, world=2)
        runtime.seed(seed, step)
        return float(torch.rand(()))

    draws = [draw(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)]
    assert len(set(draws)) == 8
    assert draw(1, 0, 1) == draws[5]
