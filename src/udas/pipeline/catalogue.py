"""What can be named in files and commands, and what is behind a name."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from udas.config import FOLDERS, find_yaml, preset_names, read_yaml
from udas.errors import ConfigError
from udas.names import METHODS, load_method
from udas.validation import nearest

if TYPE_CHECKING:
    from udas.methods.base import Method


def print_names(what: str | None) -> None:
    """List one kind of names, or all. Raises `ConfigError` for an unknown kind."""
    for kind in [what] if what else LISTS:
        _print_rows(kind, _rows(kind))


def print_name(what: str, name: str) -> None:
    """A preset's file as it is, a method's formula and settings, or the row of anything else.

    Raises:
        ConfigError: an unknown kind or name.
    """
    rows = dict(_rows(what))
    if name not in rows:
        raise ConfigError(f"{what}: nothing is called {name!r}{nearest(name, list(rows))}")
    if what in FOLDERS:
        print(find_yaml(name, what).read_text(encoding="utf-8"), end="")
    elif what == "methods":
        _print_method(name)
    else:
        _print_rows(what, [(name, rows[name])])


def _rows(kind: str) -> list[tuple[str, str]]:
    if kind not in LISTS:
        raise ConfigError(f"nothing called {kind!r} to list{nearest(kind, list(LISTS))}")
    return LISTS[kind]()


def _print_rows(kind: str, rows: list[tuple[str, str]]) -> None:
    table = Table("name", "what it is", title=kind, title_justify="left", show_edge=False, box=None, padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    Console().print(table, "")


def _print_method(name: str) -> None:
    """What a method does, its formula, the streams it sees, and all settings as they stand in a file by default."""
    method = load_method(name)
    print(f"{_summary(method)}\n\n{inspect.cleandoc(method.__doc__)}\n\n{_streams(method)}\n\nmethod:")
    lines = list(_settings(method.settings))
    width = max(len(line) for line, _ in lines)
    for line, comment in lines:
        print(f"{line:{width}}  # {comment}" if comment else line)


def _settings(model: type[BaseModel], given: BaseModel | None = None, indent: str = "  ") -> Iterator[tuple[str, str]]:
    """A line of YAML and its comment for every setting; the values are those of `given`, or the defaults."""
    for name, field in model.model_fields.items():
        value = getattr(given, name) if given else field.get_default(call_default_factory=True)
        comment = field.description or _choices(field.annotation)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:", comment
            yield from _settings(type(value), value, indent + "  ")
        else:
            yield f"{indent}{name}: {value if isinstance(value, str) else json.dumps(value)}", comment


def _choices(annotation: Any) -> str:
    values = get_args(annotation) if get_origin(annotation) is Literal else ()
    return " or ".join(values) if len(values) > 1 else ""


def _presets(folder: str) -> list[tuple[str, str]]:
    return [(name, _comment(folder, name)) for name in preset_names(folder)]


def _comment(folder: str, name: str) -> str:
    """The comment at the head of a preset, without commands; of a run file, its first sentence."""
    lines = find_yaml(name, folder).read_text(encoding="utf-8").splitlines()
    head = [line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines)]
    told = " ".join(line for line in head if "udas run " not in line and not line.startswith("udas "))
    return re.split(r"(?<=\.) ", told)[0] if folder in ("runs", "bases") else told


def _methods() -> list[tuple[str, str]]:
    found = {name: load_method(name) for name in METHODS}
    return [(name, f"{_summary(method)}\n{_streams(method)}") for name, method in found.items()]


def _summary(method: type[Method[Any]]) -> str:
    """In a sentence: that of the method's file."""
    return (sys.modules[method.__module__].__doc__ or "").splitlines()[0]


def _streams(method: type[Method[Any]]) -> str:
    optional = [f"({stream})" for stream in sorted(method.optional)]
    return f"learns from: {', '.join([*sorted(method.needs), *optional])}"


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
