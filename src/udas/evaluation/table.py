"""Results side by side, for people (text, Markdown) in percent and for programs (CSV, JSON) as shares."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from udas.storage import write_atomically

Form = Literal["text", "json", "csv", "markdown"]
Row = tuple[str, Mapping[str, Any]]
"""Title, and the content of its `evaluation.json`, with `steps` and `seconds_per_step` where the training is known."""

_ABSENT = "-"
_COLUMNS = 9  # results beside each other in text: with the names of classes 80 characters
_OVERALL = ("mIoU", "95 % interval", "pixel accuracy", "steps", "s/step")


def table(rows: Sequence[Row], form: Form = "text") -> str:
    """A comparison of evaluations.

    Text and Markdown are in per cent, for people; steps count those of the trainings a network started from, and
    seconds per step are the last training's median. Both end with how each number was measured and which
    classes were left out of a mean because they occur neither in the labels nor in the predictions.

    Args:
        rows: (title, content of `evaluation.json`), in the order they are shown.
        form: text, json, csv or markdown.
    """
    return {"text": _text, "json": _json, "csv": _csv, "markdown": _markdown}[form](rows)


def _classes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for _, result in rows for name in result["iou"]))


def _percent(share: float | None) -> str:
    return _ABSENT if share is None else f"{100 * share:.1f}"


def _cells(result: Mapping[str, Any], classes: Sequence[str]) -> dict[str, str]:
    low, high = result["interval"]
    return {
        "mIoU": _percent(result["miou"]),
        "95 % interval": f"{_percent(low)} to {_percent(high)}",
        "pixel accuracy": _percent(result["pixel_accuracy"]),
        "steps": str(result.get("steps", _ABSENT)),
        "s/step": _ABSENT if (seconds := result.get("seconds_per_step")) is None else f"{seconds:.3g}",
        **{name: _percent(result["iou"].get(name)) for name in classes},
    }


def _notes(rows: Sequence[Row]) -> list[str]:
    """How the numbers were measured: once when it is the same for all, else by title."""
    how = [f"{result['pictures']} pictures; {result['protocol']}" for _, result in rows]
    notes = how[:1] if len(set(how)) == 1 else [f"{row[0]}: {text}" for row, text in zip(rows, how, strict=True)]
    for title, result in rows:
        if result["absent"]:
            names = ", ".join(result["absent"])
            notes.append(f"{title}: left out of the mean, in neither labels nor predictions: {names}")
    return notes


def _text(rows: Sequence[Row]) -> str:
    """Overall figures line by line, then the classes with a numbered column per result: fits a terminal."""
    classes = _classes(rows)
    cells = [(str(number), _cells(result, classes)) for number, (_, result) in enumerate(rows, 1)]
    shown = _known([cell for _, cell in cells])
    overall = _grid("", "", *shown, left=2)
    for (number, cell), (title, _) in zip(cells, rows, strict=True):
        overall.add_row(number, Text(title), *(cell[name] for name in shown))
    grids = [overall]
    for first in range(0, len(rows), _COLUMNS):
        block = cells[first : first + _COLUMNS]
        grids.append(_grid("IoU", *(number for number, _ in block), left=1))
        for name in classes:
            grids[-1].add_row(Text(name), *(cell[name] for _, cell in block))
    return "\n".join([line for grid in grids for line in [*_drawn(grid), ""]] + _notes(rows)) + "\n"


def _known(cells: Sequence[Mapping[str, str]]) -> list[str]:
    """The overall columns in which there is something to read."""
    return [name for name in _OVERALL if any(cell[name] != _ABSENT for cell in cells)]


def _grid(*head: str, left: int) -> Table:
    """A table whose columns are right-aligned but for the first `left`."""
    grid = Table(*head, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in grid.columns[left:]:
        column.justify = "right"
    return grid


def _drawn(grid: Table) -> list[str]:
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    console.print(grid)
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    return [line[1:].rstrip() for line in drawn.splitlines() if line.strip()]


def _markdown(rows: Sequence[Row]) -> str:
    classes = _classes(rows)
    lines = [[_escape(title), *_cells(result, classes).values()] for title, result in rows]
    head = ["", *_OVERALL, *map(_escape, classes)]
    grid = [head, ["---", *("---:" for _ in head[1:])], *lines]
    notes = [f"* {_escape(note)}" for note in _notes(rows)]
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in grid] + ["", *notes]) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _csv(rows: Sequence[Row]) -> str:
    classes = _classes(rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    overall, training = ["miou", "low", "high", "pixel_accuracy"], ["steps", "seconds_per_step"]
    head = ["title", *overall, *classes, *training, "absent", "pictures", "split", "protocol"]
    writer.writerow(head)
    for title, result in rows:
        numbers = [result["miou"], *result["interval"], result["pixel_accuracy"], *map(result["iou"].get, classes)]
        record = [" ".join(result["absent"]), result["pictures"], result["split"], result["protocol"]]
        writer.writerow([title, *numbers, *map(result.get, training), *record])
    return out.getvalue()


def _json(rows: Sequence[Row]) -> str:
    return json.dumps([{"title": title, **result} for title, result in rows], indent=1) + "\n"


def save_tables(rows: Sequence[Row], path: Path) -> None:
    """Write the comparison beside each other as `<path>.txt`, `.json`, `.csv` and `.md`."""
    files: dict[Form, str] = {"text": ".txt", "json": ".json", "csv": ".csv", "markdown": ".md"}
    for form, suffix in files.items():
        write_atomically(path.with_suffix(suffix), table(rows, form).encode())
