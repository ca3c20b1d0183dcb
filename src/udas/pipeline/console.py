"""Tables for the console: what can be named, and what a check of a data set found."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import takewhile

from rich.console import Console
from rich.table import Table

from udas.config import find_yaml, preset_names, read_yaml
from udas.data.check import Report, SplitReport
from udas.errors import ConfigError
from udas.names import METHODS, load_method
from udas.validation import nearest


def print_check(report: Report) -> None:
    """One table of what each split holds, then every problem on a line of its own."""
    console = Console()
    table = Table("", *report.splits, title=f"{report.domain}: share of labelled pixels in per cent")
    splits = report.splits.values()
    table.add_row("pictures", *(str(split.pictures) for split in splits))
    table.add_row("with labels", *(str(split.labelled) for split in splits))
    table.add_row("sizes (height x width)", *(_sizes(split) for split in splits))
    table.add_section()
    for name in next(iter(splits)).histogram:
        table.add_row(name, *(_share(split, name) for split in splits))
    table.add_row("ignored pixels", *(str(split.ignored) for split in splits))
    console.print(table)
    for problem in report.problems:
        console.print(f"problem: {problem}", style="red", markup=False, highlight=False)
    count = len(report.problems)
    console.print(f"{count or 'no'} problem{'' if count == 1 else 's'}", style="bold")


def _share(split: SplitReport, name: str) -> str:
    """Of the labelled pixels; nothing where there are none."""
    total = sum(split.histogram.values())
    share = split.histogram[name] / max(total, 1)
    return f"{share:6.2%}  {'█' * round(20 * share)}" if total else "-"


def _sizes(split: SplitReport) -> str:
    common = [f"{height} x {width}" for (height, width), _ in split.sizes.most_common(2)]
    more = len(split.sizes) - len(common)
    return ", ".join(common) + (f" and {more} more" if more > 0 else "")


def print_names(what: str | None) -> None:
    """List one kind of names, or all. Raises `ConfigError` for an unknown kind."""
    if what is not None and what not in LISTS:
        raise ConfigError(f"nothing called {what!r} to list{nearest(what, list(LISTS))}")
    for kind in [what] if what else LISTS:
        table = Table("name", "what it is", title=kind, title_justify="left", show_edge=False, box=None, padding=(0, 2))
        for name, text in LISTS[kind]():
            table.add_row(name, text)
        Console().print(table, "")


def _presets(folder: str) -> list[tuple[str, str]]:
    return [(name, _comment(folder, name)) for name in preset_names(folder)]


def _comment(folder: str, name: str) -> str:
    """The comment at the head of a preset, without commands; of a run file, its first sentence."""
    lines = find_yaml(name, folder).read_text(encoding="utf-8").splitlines()
    head = [line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines)]
    told = " ".join(line for line in head if "udas run " not in line and not line.startswith("udas "))
    return re.split(r"(?<=\.) ", told)[0] if folder in ("runs", "bases") else told


def _methods() -> list[tuple[str, str]]:
    return [(name, (load_method(name).__doc__ or "").splitlines()[0]) for name in METHODS]


def _networks() -> list[tuple[str, str]]:
    from udas.networks.segmenters import SEGMENTERS

    return [
        (name, f"output stride {' or '.join(map(str, recipe.strides))}; encoder: {recipe.encoder or 'any of timm'}")
        for name, recipe in SEGMENTERS.items()
    ]


def _protocols() -> list[tuple[str, str]]:
    from udas.evaluation.protocols import PROTOCOLS

    return [(name, protocol.describe(()).removeprefix(f"{name}: ")) for name, protocol in PROTOCOLS.items()]


def _labels() -> list[tuple[str, str]]:
    spaces = {name: read_yaml(find_yaml(name, "labels"))["classes"] for name in preset_names("labels")}
    return [(name, f"{len(classes)} classes: {', '.join(classes)}") for name, classes in spaces.items()]


LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "runs": lambda: _presets("runs"),
    "bases": lambda: _presets("bases"),
    "data": lambda: _presets("data"),
    "labels": _labels,
    "methods": _methods,
    "networks": _networks,
    "protocols": _protocols,
}
