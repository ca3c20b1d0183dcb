"""What a run will do and why: one hash per stage decides between reuse, resume, restart and start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from udas.data.batch import Stream
from udas.pipeline.config import AnyStage, LabelStage, TrainStage, TranslateStage, uses
from udas.pipeline.context import Context

FORMAT = 1
"""Raised when the same configuration would give another result: older stage folders are then made again."""


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
    fingerprint: str
    action: Action
    why: str


def plan(context: Context) -> list[Planned]:
    """Decide for every stage in order. Reads configurations, file lists and manifests; writes nothing.

    Raises:
        ConfigError: when a method lacks a stream.
        DataError: when pictures or granted labels are missing.
    """
    prints: dict[str, str] = {}
    planned = []
    for name, stage in context.config.stages.items():
        prints[name] = _fingerprint(context, name, stage, prints)
        action, why = _decide(context.folder / name, prints[name])
        planned.append(Planned(name, stage, prints[name], action, why))
    return planned


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a stage folder, or None where there is none that can be read."""
    try:
        content: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content


def _decide(folder: Path, fingerprint: str) -> tuple[Action, str]:
    manifest = read_manifest(folder)
    if manifest is None:
        return (Action.RESTART, "folder without a manifest") if folder.exists() else (Action.START, "not there yet")
    if manifest["fingerprint"] != fingerprint:
        return Action.RESTART, "configuration, data or an earlier stage changed; the old folder is moved aside"
    if manifest["state"] == "done":
        return Action.REUSE, "finished with this configuration"
    return Action.RESUME, f"unfinished ({manifest['state']})"


def _fingerprint(context: Context, name: str, stage: AnyStage, prints: Mapping[str, str]) -> str:
    content = {
        "format": FORMAT,
        "seed": context.config.seed,
        "classes": context.taxonomy.classes,
        "stage": stage.model_dump(mode="json", exclude={"title", "evaluate", "labelled", *uses(stage)}),
        "uses": {role: prints[other] for role, other in uses(stage).items()},
        "data": _data(context, name, stage),
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()


def _data(context: Context, name: str, stage: AnyStage) -> dict[str, str | None]:
    """Fingerprints of the pictures and labels that a stage reads."""
    if isinstance(stage, TrainStage):
        makers: Mapping[Stream, Callable[[], str]] = {
            Stream.SOURCE: lambda: context.source_pictures.fingerprint(),
            Stream.LABELLED: lambda: context.labelled(stage).fingerprint(),
            Stream.UNLABELLED: lambda: context.unlabelled.fingerprint(),
            Stream.PSEUDO: lambda: context.unlabelled.fingerprint(),
        }
        return {stream: makers[stream]() for stream in sorted(context.streams(name, stage))}
    if isinstance(stage, TranslateStage):
        return {"source": context.source_pictures.fingerprint()}
    validation = None if context.validation is None else context.validation.fingerprint()
    if isinstance(stage, LabelStage):
        return {"unlabelled": context.unlabelled.fingerprint(), "validation": validation}
    return {"validation": validation}
