"""The tables of a report as plain values: results, confusion matrices, pseudo-labels, stages, machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from udas.reporting.read import Budget, Evaluation, Run, Stage, Statistics

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Result:
    """An evaluate stage with what it found, and what the network took to train where that is known."""

    stage: Stage
    evaluation: Evaluation
    budget: Budget | None


@dataclass(frozen=True)
class ResultRow:
    """One evaluated model. iou: by class in the table's order; best: columns in which it holds the highest value."""

    title: str
    evaluation: Evaluation
    budget: Budget | None
    iou: list[float | None]
    best: frozenset[str]


@dataclass(frozen=True)
class ResultTable:
    """Models measured on the same labels in the same way: only these may be compared."""

    setting: str
    classes: list[tuple[str, Colour]]
    rows: list[ResultRow]


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix by row: shares in [0, 1] of a true class, None where the class does not occur."""

    title: str
    setting: str
    classes: list[str]
    rows: list[list[float | None]]


@dataclass(frozen=True)
class ClassRows:
    """One quantity of the pseudo-labels by class. rows: (stage title, values in the table's class order)."""

    name: str
    rows: list[tuple[str, list[float | None]]]


@dataclass(frozen=True)
class LabelTable:
    """All label stages of one label space. totals: (stage title, kept share, quality by name of `measures`)."""

    classes: list[tuple[str, Colour | None]]
    measures: list[str]
    totals: list[tuple[str, float | None, list[Any]]]
    groups: list[ClassRows]


def by_model(run: Run, *kinds: str) -> list[Stage]:
    """Stages of `kinds` in the order of the models they use; of one model, what comes first in `kinds` comes first."""
    place = {stage.manifest.stage: index for index, stage in enumerate(run.stages)}
    chosen = [stage for stage in run.stages if stage.manifest.kind in kinds]
    last_used = {s.where: max((place.get(used, 0) for used in s.manifest.used()), default=0) for s in chosen}
    return sorted(chosen, key=lambda stage: (last_used[stage.where], kinds.index(stage.manifest.kind)))


def evaluated(runs: list[Run]) -> list[Result]:
    """Evaluate stages with a result, in the order of the models they evaluate."""
    found = [(run, stage) for run in runs for stage in by_model(run, "evaluate")]
    return [Result(stage, stage.evaluation, run.budget(stage)) for run, stage in found if stage.evaluation]


def result_tables(results: list[Result]) -> list[ResultTable]:
    """One table per group of comparable evaluations."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.evaluation.comparable(), []).append(result)
    return [_result_table(group) for group in groups.values()]


def _result_table(group: list[Result]) -> ResultTable:
    first = group[0].evaluation
    scores = [_scores(result.evaluation) for result in group]
    highest = {key: max((s[key] or 0.0 for s in scores), default=0.0) for key in scores[0]} if len(group) > 1 else {}
    rows = [
        ResultRow(
            result.stage.title,
            result.evaluation,
            result.budget,
            [result.evaluation.iou.get(name) for name in first.classes],
            frozenset(key for key, top in highest.items() if top > 0 and score[key] == top),
        )
        for result, score in zip(group, scores, strict=True)
    ]
    return ResultTable(first.setting(), list(zip(first.classes, first.colours, strict=True)), rows)


def _scores(evaluation: Evaluation) -> dict[str, float | None]:
    by_class = {f"class {name}": evaluation.iou.get(name) for name in evaluation.classes}
    return {"miou": evaluation.miou, "pixel_accuracy": evaluation.pixel_accuracy, **by_class}


def matrices(results: list[Result]) -> list[Matrix]:
    """Row-normalised confusion matrices of the evaluations that carry one."""
    found = []
    for result in results:
        evaluation = result.evaluation
        if evaluation.confusion is not None:
            rows = [_normalised(row) for row in evaluation.confusion]
            found.append(Matrix(result.stage.title, evaluation.setting(), evaluation.classes, rows))
    return found


def _normalised(row: list[float]) -> list[float | None]:
    total = sum(row)
    return [value / total if total > 0 else None for value in row]


def label_tables(runs: list[Run]) -> list[LabelTable]:
    """Pseudo-label statistics, label stages of equal classes in one table."""
    colours = {name: colour for run in runs for name, colour in legend(run)}
    groups: dict[tuple[str, ...], list[tuple[str, Statistics]]] = {}
    for run in runs:
        for stage in run.stages:
            if stage.statistics:
                groups.setdefault(tuple(stage.statistics.kept), []).append((stage.title, stage.statistics))
    return [_label_table(list(classes), group, colours) for classes, group in groups.items()]


def _label_table(classes: list[str], group: list[tuple[str, Statistics]], colours: Mapping[str, Colour]) -> LabelTable:
    quality = [(title, statistics.quality or {}) for title, statistics in group]
    measures = list(dict.fromkeys(k for _, q in quality for k, v in q.items() if _is_number(v)))
    detailed = list(dict.fromkeys(k for _, q in quality for k, v in q.items() if isinstance(v, dict)))
    totals = [(t, s.kept_total, [(s.quality or {}).get(m) for m in measures]) for t, s in group]
    parts: list[tuple[str, list[tuple[str, Mapping[str, Any]]]]] = [
        ("share of the class's pixels kept", [(title, statistics.kept) for title, statistics in group]),
        *((f"quality: {key}", [(title, q.get(key) or {}) for title, q in quality]) for key in detailed),
        ("share of all pixels predicted", [(title, statistics.predicted) for title, statistics in group]),
        ("mean confidence", [(title, statistics.confidence) for title, statistics in group]),
        ("threshold", [(title, statistics.thresholds) for title, statistics in group]),
    ]
    groups = [ClassRows(name, [(t, [_number(v.get(c)) for c in classes]) for t, v in rows]) for name, rows in parts]
    known = [part for part in groups if any(value is not None for _, values in part.rows for value in values)]
    return LabelTable([(name, colours.get(name)) for name in classes], measures, totals, known)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


def legend(run: Run) -> list[tuple[str, Colour]]:
    """Classes and colours of a run, from its first evaluation; empty when it has none."""
    first = next((stage.evaluation for stage in run.stages if stage.evaluation), None)
    return list(zip(first.classes, first.colours, strict=True)) if first else []


def environments(runs: list[Run]) -> list[tuple[list[str], dict[str, str]]]:
    """Machine and versions with the stages that ran there; equal ones once."""
    found: dict[str, tuple[list[str], dict[str, str]]] = {}
    for run in runs:
        for stage in run.stages:
            values = {k: _text(v) for k, v in (stage.manifest.machine | stage.manifest.versions).items()}
            if values:
                found.setdefault(repr(values), ([], values))[0].append(stage.where if len(runs) > 1 else stage.title)
    return [(list(dict.fromkeys(titles)), values) for titles, values in found.values()]


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def configuration(run: Run) -> list[tuple[str, str, bool]]:
    """The run file's top-level keys: (key, value as text, whether the text is a block of YAML)."""
    return [
        (str(key), yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip(), True)
        if isinstance(value, dict | list)
        else (str(key), _text(value), False)
        for key, value in run.config.items()
    ]
