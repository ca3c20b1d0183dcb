"""A table for the console: what a check of a data set found."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from udas.data.check import Report, SplitReport


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
