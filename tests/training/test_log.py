"""What a training tells, and how a log survives a kill."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from udas.errors import RunError
from udas.training.log import Bar, TrainingLog, read_log


def write(folder: Path, steps: range, start: int = 0) -> None:
    log = TrainingLog(folder, start)
    for step in steps:
        log.losses(step, 1.234, {"source": 0.5 * step}, {"segmenter": 0.1}, 2.0)
    log.close()


def test_lines_hold_what_the_report_reads(tmp_path: Path) -> None:
    write(tmp_path, range(1, 2))
    log = TrainingLog(tmp_path, 1)
    log.validation(1, {"miou": 0.5, "pixel_accuracy": 0.75, "iou": {"road": 0.5, "sky": None}})
    log.close()
    assert read_log(tmp_path / "log.jsonl") == [
        {"step": 1, "seconds": 1.23, "losses": {"source": 0.5}, "lr": {"segmenter": 0.1}, "rate": 2.0},
        {"step": 1, "val": {"miou": 0.5, "pixel_accuracy": 0.75, "iou": {"road": 0.5, "sky": None}}},
    ]


def test_a_resumed_log_drops_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 7), start=4)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [line["step"] for line in read_log(path)] == [1, 2]
    write(tmp_path, range(3, 4), start=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_kill_while_a_log_is_shortened_does_not_lose_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(1, 4))
    before = (tmp_path / "log.jsonl").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        TrainingLog(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_there_is_no_log_before_the_first_line(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") == []


def test_previews_are_sheets_of_pictures_side_by_side(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    sheet = torch.stack([torch.zeros(3, 8, 16), torch.full((3, 8, 16), 7.0)])  # beyond 1 is white
    log.pictures(20, {"x": sheet})
    log.close()
    pixels = np.array(Image.open(tmp_path / "previews/0000020/x.jpg")).astype(int)
    assert pixels.shape == (8, 32, 3)
    assert pixels[:, :15].max() < 20
    assert pixels[:, 17:].min() > 235


def test_a_log_that_cannot_be_written_is_an_error_of_the_user(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    log.path.mkdir()
    with pytest.raises(RunError, match=r"log.jsonl: cannot be written .*the last checkpoint is kept"):
        log.losses(1, 0.0, {}, {}, 0.0)
    log.close()


def test_a_board_that_cannot_be_written_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = TrainingLog(tmp_path, 0)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log.board, "add_scalar", full)
    with pytest.raises(RunError, match=r"No space left on device.*the last checkpoint is kept"):
        log.losses(1, 0.0, {"source": 1.0}, {}, 0.0)
    with pytest.raises(RunError, match="No space left on device"):
        log.validation(1, {"miou": 0.5, "iou": {}})
    monkeypatch.setattr(log.board, "close", full)
    with pytest.raises(RunError, match="No space left on device"):
        log.close()


def test_without_a_terminal_lines_tell_of_losses_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr("udas.training.log.time.monotonic", lambda: next(clock))
    with Bar("teacher", 100) as bar:
        for done in range(1, 5):  # every say is 20 seconds after the one before it
            bar.say(f"source {done}")
            bar.progress.update(bar.task, completed=done)
    lines = [line for line in capsys.readouterr().out.splitlines() if "source" in line]
    assert ["source 2" in lines[0], "source 4" in lines[1]] == [True, True]
    assert lines[0].startswith("teacher  1/100")
    assert len(lines) == 2
    with Bar("teacher", 100, visible=False) as silent:
        silent.said = -1000.0
        silent.say("source 1")
    assert capsys.readouterr().out == ""


def test_losses_are_told_however_many_steps_come_between(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bar, "PAUSE", -1.0)
    with Bar("teacher", 100) as bar:
        bar.say("source 0.25")
        capsys.readouterr()
        bar(2, 100)  # the next line is due at a step that has no losses of its own
        assert "2/100" in (line := capsys.readouterr().out)
        assert "source 0.25" in line


def test_a_validation_hardly_changes_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Bar("teacher", 1000) as bar:
        bar.progress.get_time = lambda: now
        for done in range(1, 202):  # two seconds each, and a minute of validation before the last
            now += 2 if done < 201 else 62
            bar(done, 1000)
        left = bar.progress.tasks[0].time_remaining
    assert left is not None
    assert 1600 < left < 2000
    rate = re.search(r"([\d.]+) steps/s", capsys.readouterr().out)
    assert rate is not None
    assert 0.4 < float(rate[1]) <= 0.5


def test_the_bar_shows_count_and_title_and_is_silent_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    for visible in (True, False):
        with Bar("train", 10, 4, visible=visible) as bar:
            bar(7, 10, "mIoU 0.5")
        shown = capsys.readouterr().out
        assert ("train" in shown, "7/10" in shown) == (visible, visible)
