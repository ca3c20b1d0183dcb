"""What a run will do and why: one hash per stage decides between reuse, resume, restart and start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from udas.data.batch import Stream
from udas.pipeline.config import AnyStage, LabelStage, PrototypesStage, RankStage, TrainStage, TranslateStage, uses
from udas.pipeline.context import Context
from udas.pipeline.difference import difference

FORMAT = 1
"""Raised when the same configuration would give another result: older stage folders are then made again."""

NEUTRAL: dict[str, Any] = {
    "teacher": None,
    "prototypes": None,
    "hard": None,
    "easy": None,
    "fourier": None,
    "protocol": None,
    "average": "logits",
    "semantic": 0.0,
    "horizon": None,
    "plain": None,
    "norm_eps": None,
    "separate_decoding": False,
}
"""Settings that joined format 1 later, with the value that changes nothing: there fingerprints leave them out."""


class Action(StrEnum):
    """What happens to a stage."""

    REUSE = "reuse"
    RESUME = "resume"
    RESTART = "restart"
    START = "start"


@dataclass(frozen=True)
class Planned:
    """One stage with its decision."""

    name: str
    stage: AnyStage
    made_from: dict[str, Any]
    action: Action
    why: str

    @property
    def fingerprint(self) -> str:
        """Hash of all that the stage's result depends on."""
        return _hash(self.made_from)


def plan(context: Context) -> list[Planned]:
    """Decide for every stage in order. Reads configurations, file lists and manifests; writes nothing.

    Raises:
        ConfigError: when a method lacks a stream.
        DataError: when pictures or granted labels are missing.
    """
    prints: dict[str, str] = {}
    planned = []
    for name, stage in context.config.stages.items():
        made_from = _made_from(context, name, stage, prints)
        prints[name] = _hash(made_from)
        action, why = _decide(context.folder / name, made_from)
        planned.append(Planned(name, stage, made_from, action, why))
    return planned


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a stage folder, or None where there is none that can be read."""
    try:
        content: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and {"fingerprint", "state"} <= content.keys() else None


def _decide(folder: Path, made_from: Mapping[str, Any]) -> tuple[Action, str]:
    manifest = read_manifest(folder)
    if manifest is None:
        there = folder.exists()
        return (Action.RESTART, "folder without a readable manifest") if there else (Action.START, "not there yet")
    if manifest["fingerprint"] != _hash(made_from):
        return Action.RESTART, f"{difference(folder, made_from)}; the old folder is moved aside"
    if manifest["state"] == "done":
        return Action.REUSE, "finished"
    return Action.RESUME, f"unfinished ({manifest['state']})"


def _made_from(context: Context, name: str, stage: AnyStage, prints: Mapping[str, str]) -> dict[str, Any]:
    """All that the result of a stage depends on."""
    return {
        "format": FORMAT,
        "seed": context.config.seed,
        "classes": context.taxonomy.classes,
        "stage": settings(stage),
        "uses": {role: _prints(names, prints) for role, names in uses(stage).items()},
        "data": _data(context, name, stage),
    }


def _hash(made_from: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=12).hexdigest()


def settings(stage: AnyStage) -> dict[str, Any]:
    """What a stage is told, as far as its result depends on it."""
    told = stage.model_dump(mode="json", exclude={"title", "evaluate", "labelled", *uses(stage)})
    result: dict[str, Any] = _telling(told)
    return result


def _telling(value: Any) -> Any:
    """Settings without those of `NEUTRAL` that say nothing, group by group."""
    if not isinstance(value, dict):
        return value
    return {key: _telling(inner) for key, inner in value.items() if key not in NEUTRAL or inner != NEUTRAL[key]}


def _prints(names: str | list[str], prints: Mapping[str, str]) -> str | list[str]:
    return prints[names] if isinstance(names, str) else [prints[name] for name in names]


def _weights(stage: TrainStage) -> dict[str, str | None]:
    """Content of the local file a network starts from; packages and hubs keep what stands under a name."""
    weights = stage.network.weights
    if stage.start is not None or weights is None or not Path(weights).is_file():
        return {}
    return {"weights": _digest(weights, Path(weights).stat().st_mtime_ns)}


@cache
def _digest(path: str, changed: int) -> str:
    """Of a file's content; `changed` is its time, for a file that many stages name to be read once."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _data(context: Context, name: str, stage: AnyStage) -> dict[str, str | None]:
    """Fingerprints of the pictures and labels that a stage reads."""
    if isinstance(stage, TrainStage):
        makers: Mapping[Stream, Callable[[], str]] = {
            Stream.SOURCE: lambda: context.source_pictures.fingerprint(),
            Stream.LABELLED: lambda: context.labelled(stage).fingerprint(),
            Stream.UNLABELLED: lambda: context.unlabelled.fingerprint(),
            Stream.PSEUDO: lambda: context.with_real_labels(name, stage, context.unlabelled).fingerprint(),
        }
        return {stream: makers[stream]() for stream in sorted(context.streams(name, stage))} | _weights(stage)
    if isinstance(stage, TranslateStage):
        partners = {} if stage.fourier is None else {"unlabelled": context.unlabelled.fingerprint()}
        return {"source": context.source_pictures.fingerprint(), **partners}
    if isinstance(stage, RankStage | PrototypesStage):
        return {"unlabelled": context.unlabelled.fingerprint()}
    validation = context.probe if isinstance(stage, LabelStage) else context.validation
    scored = {"validation": None if validation is None else validation.fingerprint()}
    return scored | ({"unlabelled": context.unlabelled.fingerprint()} if isinstance(stage, LabelStage) else {})
