"""Why a stage is made again: what its result depends on, then and now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from udas.storage import write_atomically

FILE = "made_from.json"
SHOWN = 2  # changes that are told; the others are counted
LONG = 40  # characters of a value that is told
UNKNOWN = "configuration, data or an earlier stage changed"


def note(folder: Path, made_from: Mapping[str, Any]) -> None:
    """Keep beside a stage what its fingerprint is made from."""
    write_atomically(folder / FILE, json.dumps(made_from, indent=1).encode())


def difference(folder: Path, made_from: Mapping[str, Any]) -> str:
    """What is other than it was when the stage in `folder` was made, in words."""
    try:
        before = dict(_leaves(json.loads((folder / FILE).read_text(encoding="utf-8"))))
    except (OSError, ValueError):
        return UNKNOWN
    now = dict(_leaves(made_from))
    changed = [name for name in now | before if before.get(name) != now.get(name)]
    told = [_told(*name.partition(".")[::2], before.get(name), now.get(name)) for name in changed[:SHOWN]]
    more = [f"{len(changed) - SHOWN} more"] if len(changed) > SHOWN else []
    return ", ".join(told + more) or UNKNOWN


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and JSON values of all that is not a group."""
    if not isinstance(value, Mapping):
        yield name, json.dumps(value)
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}.{key}" if name else key)


def _told(part: str, name: str, before: str | None, now: str | None) -> str:
    match part:
        case "stage":
            return f"{name} {_short(before)} -> {_short(now)}"
        case "seed":
            return f"seed {before} -> {now}"
        case "data":
            return f"other data: {name}"
        case "uses":
            return f"{name} is made again"
        case "classes":
            return "other classes"
    return "made by an older version of udas"


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= LONG else f"{value[:LONG]}..."
