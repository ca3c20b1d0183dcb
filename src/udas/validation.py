"""What is wrong with a configuration, in the words and at the places of the person who wrote it: all of it at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from udas.errors import ConfigError

Place = tuple[str, ...]
"""The keys that lead to a value: ("stages", "teacher", "training", "steps")."""

GROUPS = ("model_type", "model_attributes_type", "dict_type")  # pydantic's kinds of "this has to have keys"
WHOLE = 1000  # counts like this many unfit keys: the branch of a union cannot be meant at all

Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], raw: Any, where: str) -> Model:
    """Build `model` from `raw`.

    Raises:
        ConfigError: lists every problem, one line each, nearest names included.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = _readable(model, raw, error)
    raise ConfigError(listing(where, found))


def problems(model: type[BaseModel], raw: Any) -> dict[Place, str]:
    """What keeps `model` from being built of `raw`: place -> message; nothing when all is well."""
    try:
        model.model_validate(raw)
    except ValidationError as error:
        return _readable(model, raw, error)
    return {}


def listing(where: str, found: Mapping[Place, str]) -> str:
    """One message of all problems; those of the whole file have no place of their own."""
    lines = []
    for place, text in found.items():
        lines += [f"{'.'.join(place)}: {text}"] if place else text.split("\n")
    count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return "\n".join([f"{where}: {count}", *(f"  {line}" for line in lines)])


def nearest(name: str, choices: list[str]) -> str:
    """The end of a message about an unknown name: the nearest choice, or all of them."""
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f" (choose from: {', '.join(sorted(set(choices)))})" if choices else ""


def _readable(model: type[BaseModel], raw: Any, error: ValidationError) -> dict[Place, str]:
    """Place as written -> message; what several branches of a union say of one value is joined."""
    messages: dict[Place, dict[str, None]] = {}
    for problem in _likeliest(raw, error.errors()):
        place, message = _explain(model, raw, problem)
        messages.setdefault(place, {})[message] = None
    return {place: " or ".join(texts) for place, texts in messages.items()}


def _explain(model: type[BaseModel], raw: Any, problem: Any) -> tuple[Place, str]:
    """Place and message of one problem."""
    kind, place, context = problem["type"], _written(raw, problem), problem.get("ctx", {})
    if kind == "extra_forbidden":
        return place, f"unknown key{nearest(place[-1], _siblings(model, raw, place[:-1]))}"
    if kind == "missing":
        return place, "missing"
    if kind == "union_tag_not_found":
        return (*place, context["discriminator"].strip("'")), "missing"
    if kind == "union_tag_invalid":
        choices = [choice.strip(" '") for choice in context["expected_tags"].split(",")]
        tag = str(context["tag"])
        return (*place, context["discriminator"].strip("'")), f"nothing is called {tag!r}{nearest(tag, choices)}"
    if kind == "value_error":
        return place, str(context["error"])
    wanted = "input should be keys with values" if kind in GROUPS else problem["msg"]
    return place, f"{wanted[:1].lower()}{wanted[1:]} (got {problem['input']!r:.60})"


def _likeliest(raw: Any, found: list[Any]) -> list[Any]:
    """Of every union only what the branch says that fits best: the one with the fewest unknown or missing keys."""
    scores: dict[Any, dict[Any, int]] = {}
    for problem in found:
        location = problem["loc"]
        for number in _branches(raw, problem):
            unfit = WHOLE if len(location) == number + 1 else problem["type"] in ("extra_forbidden", "missing")
            union = scores.setdefault(location[:number], {})
            union[location[number]] = union.get(location[number], 0) + unfit

    def best(problem: Any) -> bool:
        location = problem["loc"]
        unions = [(scores[location[:number]], location[number]) for number in _branches(raw, problem)]
        return all(union[branch] == min(union.values()) for union, branch in unions)

    return [problem for problem in found if best(problem)]


def _branches(raw: Any, problem: Any) -> list[int]:
    """Where the location of a problem names the branch of a union, which no user wrote."""
    found = []
    for number, part in enumerate(problem["loc"]):
        if _is_key(raw, part):
            raw = raw[part]
        elif problem["type"] != "missing" or number + 1 < len(problem["loc"]):
            found.append(number)
    return found


def _written(raw: Any, problem: Any) -> Place:
    """The keys a user wrote on the way to a problem."""
    branches = _branches(raw, problem)
    return tuple(str(part) for number, part in enumerate(problem["loc"]) if number not in branches)


def _is_key(raw: Any, part: int | str) -> bool:
    if isinstance(raw, dict):
        return part in raw
    return isinstance(raw, list | tuple) and isinstance(part, int) and part < len(raw)


def _siblings(model: type[BaseModel], raw: Any, place: Place) -> list[str]:
    """Field names of all models that can stand at `place`, found by walking annotations."""
    models: list[type[BaseModel]] = [model]
    for part in place:
        raw = raw[int(part)] if isinstance(raw, list | tuple) else raw[part]
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        found = [inner for field in fields for inner in _models_in(field)] or models
        models = [m for m in found if _could_be(m, raw)] or found
    return [name for m in models for name in m.model_fields]


def _could_be(model: type[BaseModel], raw: Any) -> bool:
    """Whether the fields of `model` that can have one value only, such as a method's name, have it in `raw`."""
    if not isinstance(raw, dict):
        return True
    choices = {name: get_args(field.annotation) for name, field in model.model_fields.items() if _is_literal(field)}
    return all(raw[name] in values for name, values in choices.items() if name in raw and len(values) == 1)


def _is_literal(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
