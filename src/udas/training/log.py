"""What a training tells: JSON lines for programs and the report, TensorBoard for people, a bar for the console."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from udas.errors import RunError
from udas.storage import write_atomically, write_picture


class TrainingLog:
    """The log of one stage in `folder`; a resumed stage continues it and drops what lies beyond its checkpoint."""

    def __init__(self, folder: Path, start: int) -> None:
        self.folder = folder
        self.path = folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        _keep_until(self.path, start)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def losses(self, step: int, seconds: float, losses: dict[str, float], lr: dict[str, float], rate: float) -> None:
        """One line of training losses, learning rates and speed (steps per second)."""
        with self._writing():
            self._line({"step": step, "seconds": round(seconds, 2), "losses": losses, "lr": lr, "rate": round(rate, 4)})
            for name, value in losses.items():
                self.board.add_scalar(f"loss/{name}", value, step)
            for name, value in lr.items():
                self.board.add_scalar(f"learning rate/{name}", value, step)
            self.board.add_scalar("steps per second", rate, step)

    def validation(self, step: int, scores: dict[str, Any]) -> None:
        """One line of validation scores: {"miou", "pixel_accuracy", "iou": {class: value or null}}."""
        with self._writing():
            self._line({"step": step, "val": scores})
            self.board.add_scalar("validation/mIoU", scores["miou"], step)
            for name, value in scores["iou"].items():
                if value is not None:
                    self.board.add_scalar(f"validation IoU/{name}", value, step)

    def pictures(self, step: int, pictures: dict[str, Tensor]) -> None:
        """Preview pictures: title -> [B, 3, H, W] in [0, 1], as files and in TensorBoard."""
        for title, images in pictures.items():
            rows = images.detach().float().clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
            sheet = (np.concatenate(list(rows), axis=1) * 255).astype(np.uint8)
            write_picture(
                self.folder / "previews" / f"{step:07d}" / f"{title}.jpg", Image.fromarray(sheet), "JPEG", quality=90
            )
            with self._writing():
                self.board.add_image(f"preview/{title}", sheet, step, dataformats="HWC")

    def close(self) -> None:
        """Flush everything."""
        with self._writing():
            self.board.close()

    def _line(self, content: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a full disk into an error of the user's; TensorBoard tells of it with a delay."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"{self.path}: cannot be written ({reason}); the last checkpoint is kept") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _keep_until(path: Path, step: int) -> None:
    kept = [json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step]
    if path.exists():
        write_atomically(path, "".join(kept).encode())


class Bar:
    """A progress bar with count, rate and time left; silent in all but the main process. Use as a context manager.

    What is said on the way stands above the bar. Where there is no terminal (a log file, a scheduler), a line now and
    then tells the same, and the bar shows at the end alone.
    """

    PAUSE = 30.0  # seconds between two lines
    PERIOD = 600.0  # seconds that rate and time left are means over: a validation does not upset them

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "steps", visible: bool = True) -> None:
        columns = (
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=10),  # all fits into 80 columns
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>6} {task.fields[unit]}/s"),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, disable=not visible, refresh_per_second=2, speed_estimate_period=self.PERIOD)
        self.task = self.progress.add_task(title, total=total, completed=done, unit=unit, rate="", note="")
        self.started, self.said, self.text = False, time.monotonic(), ""

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.started:
            self.progress.stop()

    def __call__(self, done: int, total: int, note: str | None = None) -> None:
        """Show that `done` of `total` are finished."""
        if not self.started:  # only now: work that has nothing to do shows no bar
            self.progress.start()
            self.started = True
        speed = self.progress.tasks[0].speed
        rate = f"{speed:.2f}" if speed else ""
        self.progress.update(self.task, completed=done, total=total, rate=rate)
        if note is not None:
            self.progress.update(self.task, note=note)
        if not self.progress.console.is_terminal:
            self._tell()

    def say(self, text: str) -> None:
        """Have `text` in the next line about the state of the work; `PAUSE` seconds at least are between two lines."""
        self.text = text
        self._tell()

    def _tell(self) -> None:
        now, task = time.monotonic(), self.progress.tasks[0]
        if self.progress.disable or now - self.said < self.PAUSE:
            return
        self.said = now
        left = "" if task.time_remaining is None else f"left {timedelta(seconds=round(task.time_remaining))}"
        count, rate = f"{task.completed:.0f}/{task.total:.0f}", f"{task.fields['rate']} {task.fields['unit']}/s"
        parts = (task.description, count, rate, left, self.text, task.fields["note"])
        line = "  ".join(part for part in parts if part)
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
