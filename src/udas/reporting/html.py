"""Assembles the report: one HTML file that needs nothing beside itself."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from udas import __version__
from udas.reporting import pictures, tables
from udas.reporting.plots import Curve, draw, style
from udas.reporting.read import Ranking, Run, Stage, read_runs
from udas.storage import write_atomically


@dataclass(frozen=True)
class Legend:
    """One line of the comparison plot: last and highest validation mIoU in [0, 1], and the step of the highest."""

    title: str
    colour: str
    dash: str
    last: float
    best: float
    best_step: int


def write_report(runs: list[Path], out: Path) -> Path:
    """Write what `runs` hold so far to the HTML file `out`; a file that is missing or broken becomes a note in it.

    Args:
        runs: run folders; with several, every row and picture names its run.
        out: the file to write; its folder is made, an older report is replaced in one move.

    Returns:
        `out`.

    Raises:
        RunError: a run folder does not exist, or `out` cannot be written.
    """
    write_atomically(out, render(read_runs(runs)).encode())
    return out


def render(runs: list[Run]) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, duration=duration, measure=measure, stride=stride)
    return environment.get_template("report.html.j2").render(_content(runs))


def _content(runs: list[Run]) -> dict[str, Any]:
    results = tables.evaluated(runs)
    stages = [stage for run in runs for stage in run.stages]
    notes = [note for run in runs for note in run.notes]
    content = {
        "runs": runs,
        "stages": stages,
        "results": tables.result_tables(results),
        "matrices": tables.matrices(results),
        "comparison": comparison(stages),
        "losses": [(stage, _losses(stage)) for stage in stages if stage.log and stage.log.losses],
        "galleries": _galleries(runs, notes),
        "repainted": [(s, shown) for s in stages if _is(s, "translate") and (shown := pictures.pairs(s, notes))],
        "previews": _previews(runs, notes),
        "labels": tables.label_tables(runs),
        "rankings": [(s, _ranking(s.ranking), pictures.extremes(s, notes)) for s in stages if s.ranking],
        "prototypes": [(s, s.collected, pictures.scatter(s, notes)) for s in stages if s.collected],
        "legends": _legends(runs),
        "environments": tables.environments(runs),
        "configurations": [(run.name, tables.configuration(run)) for run in runs if run.config],
    }
    return content | {"notes": list(dict.fromkeys(notes)), "summary": _summary(stages, results)}


def _is(stage: Stage, kind: str) -> bool:
    return stage.manifest.kind == kind


def _summary(stages: list[Stage], results: list[tables.Result]) -> dict[str, Any]:
    scored = [(r.evaluation.miou, r.stage.title, r.evaluation) for r in results if r.evaluation.miou is not None]
    states = [stage.manifest.state for stage in stages]
    return {
        "top": max(scored, key=lambda entry: entry[0], default=None),
        "states": {state: states.count(state) for state in dict.fromkeys(states)},
        "seconds": sum(stage.manifest.seconds or 0.0 for stage in stages),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "version": __version__,
    }


def comparison(stages: list[Stage]) -> tuple[Markup, list[Legend]] | None:
    """Validation mIoU of all trainings over their steps, with the legend; None when there is no such curve."""
    with_curve = [(stage.title, stage.log.miou) for stage in stages if stage.log and stage.log.miou]
    if not with_curve:
        return None
    curves, legend = [], []
    for index, (title, points) in enumerate(with_curve):
        colour, dash = style(index)
        best = max(points, key=lambda step: points[step])
        curves.append(Curve(points, colour, dash))
        legend.append(Legend(title, colour, dash, points[max(points)], points[best], best))
    return draw(curves, width=860, height=330, percent=True), legend


def _losses(stage: Stage) -> list[tuple[str, Markup, float]]:
    """Name, curve and last value of every loss of a training."""
    losses = stage.log.losses if stage.log else {}
    return [
        (name, draw([Curve(points, style(index)[0], band=True)], width=270, height=150), points[max(points)])
        for index, (name, points) in enumerate(losses.items())
    ]


def _ranking(ranking: Ranking) -> tuple[Markup, dict[str, str]]:
    """Scores over pictures, easy and hard ones in two colours, with the numbers worth knowing."""
    scores, easy = ranking.scores, ranking.easy
    points = list(enumerate(scores, 1))
    parts = [dict(points[:easy]), dict(points[easy:])]
    curves = [Curve(part, style(index)[0]) for index, part in enumerate(parts) if part]
    facts = {"easy pictures": f"{easy:,}", "hard pictures": f"{len(scores) - easy:,}"}
    if scores:
        facts |= {"lowest score": stride(scores[0]), "highest score": stride(scores[-1])}
    if easy:
        facts["highest score of an easy one"] = stride(scores[easy - 1])
    return draw(curves, width=560, height=220), facts


def _galleries(runs: list[Run], notes: list[str]) -> list[pictures.Gallery]:
    """In the order of the chain: a model's predictions, the labels it makes, the next model's predictions."""
    space = {stage.where: repr(tables.legend(run)) for run in runs for stage in run.stages}
    stages = [stage for run in runs for stage in tables.by_model(run, "evaluate", "label")]
    return pictures.galleries(stages, space, notes)


def _previews(runs: list[Run], notes: list[str]) -> list[tuple[Stage, str, list[tuple[str, pictures.Embedded]]]]:
    """Newest previews of the trainings that no evaluation shows."""
    found = []
    for run in runs:
        seen = {used for stage in run.stages if stage.evaluation for used in stage.manifest.used()}
        for stage in run.stages:
            if _is(stage, "train") and stage.manifest.stage not in seen:
                step, shown = pictures.last_previews(stage, notes)
                found += [(stage, step, shown)] if shown else []
    return found


def _legends(runs: list[Run]) -> list[tuple[list[str], list[tuple[str, tables.Colour]]]]:
    """Label spaces with the runs that use them."""
    spaces: dict[str, tuple[list[str], list[tuple[str, tables.Colour]]]] = {}
    for run in runs:
        if legend := tables.legend(run):
            spaces.setdefault(repr(legend), ([], legend))[0].append(run.name)
    return list(spaces.values())


def percent(value: float | None, digits: int = 1) -> str:
    """A share in [0, 1] in per cent; a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units: 42 s, 3 min 05 s, 2 h 07 min, 1 d 03 h."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def measure(value: Any) -> str:
    """A quality of pseudo-labels: per cent for a share, else the number; a dash for what is no number."""
    if not isinstance(value, int | float) or not isfinite(value):
        return "–"
    return percent(value) if isinstance(value, float) and 0 <= value <= 1 else f"{value:,.4g}"


def stride(value: float) -> str:
    """A loss or rate with three significant digits."""
    return f"{value:.3g}"
