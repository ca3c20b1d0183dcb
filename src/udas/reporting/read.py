"""Reads run folders for the report. What is missing or broken becomes a note: nothing here stops a report."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from udas.config import read_yaml
from udas.errors import ConfigError, RunError

RESULTS = {
    "evaluate": "evaluation.json",
    "prototypes": "prototypes.safetensors",
    "label": "statistics.json",
    "train": "log.jsonl",
    "rank": "ranking.csv",
    "translate": "preview",
}
"""What a finished stage of each kind must hold for the report; also tells the kind where the manifest is lost."""

Value = Annotated[float | None, AfterValidator(lambda x: x if x is not None and isfinite(x) else None)]
Channel = Annotated[int, Field(ge=0, le=255)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Manifest(_Record):
    """manifest.json of a stage; `seconds` is its wall-clock time, `error` what a failed one stopped with."""

    stage: str
    kind: str
    state: str
    error: str | None = None
    title: str | None = None
    fingerprint: str | None = None
    uses: dict[str, Any] = {}
    seconds: Value = None
    machine: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    method: str | None = None
    steps: int | None = None

    def used(self) -> list[str]:
        """Names of the stages this one builds on."""
        listed = [name if isinstance(name, list) else [name] for name in self.uses.values()]
        return [str(name) for names in listed for name in names]


class Evaluation(_Record):
    """evaluation.json: scores in [0, 1], `confusion[i][j]` = pixels of true class i predicted as class j."""

    domain: str | None = None
    split: str
    miou: Value
    iou: dict[str, Value]
    classes: list[str]
    colours: list[tuple[Channel, Channel, Channel]]
    protocol: Any = None
    pictures: int | None = None
    pixel_accuracy: Value = None
    interval: tuple[Value, Value] | None = None
    confusion: list[list[float]] | None = None
    shown: list[str] = []

    @model_validator(mode="after")
    def _fitting(self) -> Evaluation:
        count = len(self.classes)
        if len(self.colours) != count:
            raise ValueError(f"{count} classes but {len(self.colours)} colours")
        if self.confusion is not None and [len(row) for row in self.confusion] != [count] * count:
            raise ValueError(f"`confusion` is not {count} x {count}")
        return self

    def setting(self) -> str:
        """Data set, split, protocol and size in words."""
        protocol = self.protocol
        if isinstance(protocol, dict):
            protocol = protocol.get("name") or ", ".join(f"{key} {value}" for key, value in protocol.items())
        count = None if self.pictures is None else f"{self.pictures} pictures"
        return " · ".join(str(part) for part in (self.domain, self.split, protocol, count) if part)

    def comparable(self) -> str:
        """Equal for evaluations on the same labels: setting, classes, and pixels of each true class."""
        truth = [sum(row) for row in self.confusion or []]
        return repr((self.setting(), self.classes, truth))


class Statistics(_Record):
    """statistics.json of a label stage, by class in [0, 1]: `kept` is the share of what is predicted as the class."""

    kept: dict[str, Value]
    kept_total: Value = None
    predicted: dict[str, Value] = {}
    thresholds: dict[str, Value] = {}
    confidence: dict[str, Value] = {}
    quality: dict[str, Any] | None = None


class Collected(_Record):
    """statistics.json of a prototypes stage: pictures that each class's prototype is the mean over."""

    pictures: int
    count: dict[str, int]
    projection: str


class _Validation(_Record):
    miou: Value = None


class _Line(_Record):
    step: int
    losses: dict[str, Value] = {}
    rate: Value = None
    val: _Validation | None = None


@dataclass(frozen=True)
class Log:
    """Curves of a training: loss name -> {step: value}, validation mIoU in [0, 1] by step, median steps per second."""

    losses: dict[str, dict[int, float]]
    miou: dict[int, float]
    rate: float | None


@dataclass(frozen=True)
class Ranking:
    """ranking.csv: the scores of all pictures in ascending order; the first `easy` of them are easy."""

    scores: list[float]
    easy: int


@dataclass(frozen=True)
class Stage:
    """One stage folder as far as it could be read. `title` is unique in its report."""

    where: str
    folder: Path
    title: str
    manifest: Manifest
    log: Log | None = None
    evaluation: Evaluation | None = None
    statistics: Statistics | None = None
    ranking: Ranking | None = None
    collected: Collected | None = None


@dataclass(frozen=True)
class Budget:
    """What a network took: steps with those of the trainings it started from; the last training's seconds per step."""

    steps: int
    seconds_per_step: float | None


@dataclass(frozen=True)
class Run:
    """One run folder: its configuration, its stages in the order they build on each other, and what is amiss."""

    name: str
    config: dict[str, Any]
    stages: list[Stage]
    notes: list[str] = field(default_factory=list)

    def budget(self, evaluation: Stage) -> Budget | None:
        """Of the network that a stage evaluates; None of several networks, or of one that this run did not train."""
        trainings = {stage.manifest.stage: stage for stage in self.stages if stage.manifest.kind == "train"}
        name = evaluation.manifest.uses.get("model")
        if not isinstance(name, str) or name not in trainings:
            return None
        log, steps = trainings[name].log, 0
        while name in trainings:
            manifest = trainings.pop(name).manifest
            steps, name = steps + (manifest.steps or 0), manifest.uses.get("start")
        return Budget(steps, 1 / log.rate if log and log.rate else None)


def read_runs(folders: list[Path]) -> list[Run]:
    """Read all `folders`; with more than one, titles begin with the run's name.

    Raises:
        RunError: a folder does not exist, or none was given.
    """
    if not folders:
        raise RunError("no run folder given: name at least one")
    folders = [folder.resolve() for folder in folders]
    short = [folder.name for folder in folders]
    names = [str(f) if short.count(f.name) > 1 else f.name for f in folders]
    prefixes = [f"{name} · " if len(folders) > 1 else "" for name in names]
    return [_read_run(*run) for run in zip(folders, names, prefixes, strict=True)]


def _read_run(folder: Path, name: str, prefix: str) -> Run:
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run folder; check the path, or start the run first")
    notes: list[str] = []
    config = _read_config(folder / "run.yaml", f"{name}/run.yaml", notes)
    stages = [stage for path in _stage_folders(folder) if (stage := _read_stage(path, name, prefix, notes))]
    if not stages:
        notes.append(f"{name}: holds no stage yet")
    return Run(name, config, _distinct(_ordered(stages, config, name, notes)), notes)


def _read_config(path: Path, where: str, notes: list[str]) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except (ConfigError, OSError) as error:
        notes.append(f"{where}: {' '.join(str(error).removeprefix(f'{path}: ').split())}")
        return {}


def _stage_folders(folder: Path) -> list[Path]:
    marks = ("manifest.json", "config.yaml", *RESULTS.values())
    found = [path for path in folder.iterdir() if path.is_dir() and any((path / mark).exists() for mark in marks)]
    return sorted(found, key=lambda path: natural(path.name))


def natural(text: str) -> list[tuple[int, str]]:
    """Sorting key by which `round2` comes before `round10`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", text)]


def _read_stage(folder: Path, run: str, prefix: str, notes: list[str]) -> Stage | None:
    """None for a folder that was moved aside: its manifest carries another name."""
    where = f"{run}/{folder.name}"
    kind = next((kind for kind, result in RESULTS.items() if (folder / result).exists()), "unknown")
    lost = Manifest(stage=folder.name, kind=kind, state="unknown")
    manifest = _load(Manifest, folder / "manifest.json", where, notes) or lost
    if manifest.stage != folder.name:
        notes.append(f"{where}: an older version of stage {manifest.stage}, left out")
        return None
    stage = Stage(where, folder, prefix + (manifest.title or manifest.stage), manifest)
    result = RESULTS.get(manifest.kind)
    if result is None or (manifest.state != "done" and not (folder / result).exists()):
        return stage
    return _with_result(stage, folder / result, notes)


def _with_result(stage: Stage, path: Path, notes: list[str]) -> Stage:
    match stage.manifest.kind:
        case "evaluate":
            return replace(stage, evaluation=_load(Evaluation, path, stage.where, notes))
        case "label":
            return replace(stage, statistics=_load(Statistics, path, stage.where, notes))
        case "train":
            return replace(stage, log=_read_log(path, stage.where, notes))
        case "rank":
            return replace(stage, ranking=_read_ranking(path, stage.where, notes))
        case "prototypes":
            return replace(stage, collected=_load(Collected, path.with_name("statistics.json"), stage.where, notes))
    if not path.is_dir():
        notes.append(f"{stage.where}/{path.name}: no such folder")
    return stage


Record = TypeVar("Record", bound=_Record)


def _load(model: type[Record], path: Path, where: str, notes: list[str]) -> Record | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        notes.append(f"{where}/{path.name}: no such file")
    except OSError as error:
        notes.append(f"{where}/{path.name}: cannot be read ({error.strerror})")
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        notes.append(f"{where}/{path.name}: {f'{key}: ' if key else ''}{problem['msg']}")
    return None


def _read_ranking(path: Path, where: str, notes: list[str]) -> Ranking | None:
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        return Ranking([float(row["score"]) for row in rows], [row["part"] for row in rows].count("easy"))
    except OSError as error:
        notes.append(f"{where}/{path.name}: cannot be read ({error.strerror})")
    except (KeyError, TypeError, ValueError):
        notes.append(f"{where}/{path.name}: not a table with the columns score and part")
    return None


def _read_log(path: Path, where: str, notes: list[str]) -> Log | None:
    """Read the curves. A step logged again after a resumed run replaces the older line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        notes.append(f"{where}/{path.name}: cannot be read ({error.strerror})")
        return None
    losses: dict[str, dict[int, float]] = {}
    miou: dict[int, float] = {}
    rates: list[float] = []
    for line in _lines(lines, f"{where}/{path.name}", notes):
        for name, value in line.losses.items():
            if value is not None:
                losses.setdefault(name, {})[line.step] = value
        if line.val and line.val.miou is not None:
            miou[line.step] = line.val.miou
        if line.rate is not None:
            rates.append(line.rate)
    return Log(losses, miou, median(rates) if rates else None)


def _lines(lines: list[bytes], where: str, notes: list[str]) -> Iterator[_Line]:
    broken = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield _Line.model_validate_json(line)
        except ValidationError:
            broken.append(number)
    if broken:
        listed = ", ".join(map(str, broken[:5])) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        notes.append(f"{where}: left out what could not be read: line {listed}")


def _ordered(stages: list[Stage], config: dict[str, Any], run: str, notes: list[str]) -> list[Stage]:
    """A stage comes after what it uses; the order of the run file, then of names, settles the rest."""
    by_name = {stage.manifest.stage: stage for stage in stages}
    listed = _listed(config)
    order = TopologicalSorter({n: [u for u in s.manifest.used() if u in by_name] for n, s in by_name.items()})
    try:
        order.prepare()
    except CycleError:
        notes.append(f"{run}: its stages use each other in a circle; they are listed by name")
        return stages
    ready, result = list(order.get_ready()), []
    place: dict[str, int] = {}
    while ready:
        for name in ready:
            inherited = max((place[u] for u in by_name[name].manifest.used() if u in place), default=len(listed))
            place[name] = listed.index(name) if name in listed else inherited
        first = min(ready, key=lambda name: (place[name], natural(name)))
        ready.remove(first)
        order.done(first)
        result.append(by_name[first])
        ready += order.get_ready()
    return result


def _listed(config: dict[str, Any]) -> list[str]:
    """Stage names of a run file, whether its `stages` is a mapping or a list."""
    stages = config.get("stages")
    if isinstance(stages, dict):
        return [str(name) for name in stages]
    entries = stages if isinstance(stages, list) else []
    return [str(entry.get("name", "")) if isinstance(entry, dict) else str(entry) for entry in entries]


def _distinct(stages: list[Stage]) -> list[Stage]:
    """Titles of stages of one kind that would read the same get the stage's name behind them."""
    titles = [(stage.manifest.kind, stage.title) for stage in stages]
    return [
        replace(stage, title=f"{stage.title} ({stage.manifest.stage})") if titles.count(title) > 1 else stage
        for stage, title in zip(stages, titles, strict=True)
    ]
