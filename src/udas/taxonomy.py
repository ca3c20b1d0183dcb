"""Label spaces: classes with their colours, and the way from the values in label files to the ids a network learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from udas.config import Config, DomainConfig, find_yaml, preset_names, read_yaml
from udas.errors import ConfigError, DataError
from udas.validation import nearest, validate

IGNORE = 255
"""The label id of pixels that count nowhere."""

_UNMAPPED = 254  # marks values without a rule inside lookup tables; a taxonomy therefore ends at id 253

Channel = Annotated[int, Field(ge=0, le=255)]
Value = int | tuple[int, int, int]


@dataclass(frozen=True)
class Taxonomy:
    """A label space.

    classes: names; the position is the id.
    colours: one RGB triple per class, each in 0..255.
    sources: other label spaces it can be made from: taxonomy -> class here -> classes there.
    """

    name: str
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    sources: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)

    def palette(self) -> NDArray[np.uint8]:
        """Colours by id, uint8 [256, 3]; ids without a class, IGNORE among them, are black."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self.colours)] = self.colours
        return palette

    def colourise(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The label [H, W] as a colour picture, uint8 [H, W, 3]."""
        return self.palette()[label]

    def index(self, name: str, setting: str = "") -> int:
        """The id of a class.

        Raises:
            ConfigError: no such class; names the nearest one, and the `setting` that asks for it.
        """
        if name not in self.classes:
            place = f"{setting}: " if setting else ""
            raise ConfigError(f"{place}{self.name} has no class {name!r}{nearest(name, list(self.classes))}")
        return self.classes.index(name)


def differences(found: Sequence[str], wanted: Sequence[str]) -> str:
    """What tells the classes `found` in a file from those of a run, in words."""
    sides = {"the file": set(found) - set(wanted), "the run": set(wanted) - set(found)}
    order = [*found, *wanted]
    parts = [f"only {side} has {', '.join(sorted(own, key=order.index))}" for side, own in sides.items() if own]
    return "; ".join(parts) or "the same classes in another order"


class _TaxonomyFile(Config):
    """What a label-space file may contain."""

    name: str
    classes: dict[str, tuple[Channel, Channel, Channel]] = Field(min_length=1, max_length=_UNMAPPED)
    sources: dict[str, dict[str, tuple[str, ...]]] = Field(default_factory=dict, alias="from")

    @model_validator(mode="after")
    def _consistent(self) -> _TaxonomyFile:
        if "ignore" in self.classes:
            raise ValueError("`ignore` is not a class: it is what `map` calls pixels that count nowhere")
        for source, rule in self.sources.items():
            if unknown := [name for name in rule if name not in self.classes]:
                raise ValueError(f"from.{source}: no class {unknown[0]!r}{nearest(unknown[0], list(self.classes))}")
            given = [name for names in rule.values() for name in names]
            if twice := [name for name in given if given.count(name) > 1]:
                raise ValueError(f"from.{source}: {twice[0]!r} is given to more than one class")
        return self


def load_taxonomy(name_or_path: str) -> Taxonomy:
    """A packaged label space by its name, or one from a YAML file.

    Raises:
        ConfigError: unknown name, or a file with mistakes (all are listed).
    """
    path = find_yaml(name_or_path, "labels")
    content = validate(_TaxonomyFile, read_yaml(path), str(path))
    return Taxonomy(content.name, tuple(content.classes), tuple(content.classes.values()), content.sources)


class LabelMap:
    """From the ids or colours in a data set's label files to the run's class ids.

    Composes `map` of the domain (values -> its own taxonomy) with `from` of the run's taxonomy. Classes that the
    run's taxonomy does not list, and values under `ignore`, become IGNORE.
    """

    def __init__(self, domain: DomainConfig, taxonomy: Taxonomy) -> None:
        """Check the rules before any file is read.

        Raises:
            ConfigError: unknown class, a value given twice, or no rule between the two taxonomies.
        """
        self.domain = domain.name
        self.ids: dict[int, int] = {}
        self.colours: dict[int, int] = {}
        targets = _targets(domain, taxonomy)
        if domain.labels and not domain.map:
            raise ConfigError(f"{domain.name}.map: missing; list the ids or colours of the label files by class")
        for value, name in _owners(domain, list(targets)).items():
            self._add(value, targets[name])

    def _add(self, value: Value, target: int) -> None:
        parts, top = ((value,), 0xFFFF) if isinstance(value, int) else (value, 0xFF)
        if not all(0 <= part <= top for part in parts):
            raise ConfigError(f"{self.domain}.map: {_text(value)} is outside 0..{top}")
        (self.ids if isinstance(value, int) else self.colours)[_code(value)] = target

    def apply(self, raw: NDArray[Any], path: Path) -> NDArray[np.uint8]:
        """Class ids of the run for the pixels of a label file.

        Args:
            raw: ids [H, W] or RGB colours [H, W, 3].
            path: the file, for messages.

        Returns:
            uint8 [H, W]: class ids or IGNORE.

        Raises:
            DataError: when a value is not in `map`, or the file has another number of channels than `map` speaks of.
        """
        if not (self.colours if raw.ndim == 3 else self.ids):
            raise DataError(f"{path}: {_wrong_kind(raw.ndim)}, in the configuration of {self.domain}")
        result = self._lookup(raw)
        if (result == _UNMAPPED).any():
            raise DataError(f"{path}: {describe(self.unmapped(raw))} not in `map` of {self.domain}; {_HINT}")
        return result

    def unmapped(self, raw: NDArray[Any]) -> dict[Value, int]:
        """Values of a label file, [H, W] or [H, W, 3], that `map` does not list, and how many pixels have them."""
        missing = self._lookup(raw) == _UNMAPPED
        values, counts = np.unique(_codes(raw)[missing], return_counts=True)
        found = zip(values.tolist(), counts.tolist(), strict=True)
        return {(_colour(value) if raw.ndim == 3 else value): count for value, count in found}

    def _lookup(self, raw: NDArray[Any]) -> NDArray[np.uint8]:
        table = self._colour_table if raw.ndim == 3 else self._id_table
        # The last entry means "unmapped": it takes all larger values, and negative ones through index -1.
        return table[np.clip(_codes(raw), -1, len(table) - 1)]

    @cached_property
    def _id_table(self) -> NDArray[np.uint8]:
        return _table(self.ids)

    @cached_property
    def _colour_table(self) -> NDArray[np.uint8]:
        return _table(self.colours)

    def __getstate__(self) -> dict[str, Any]:
        """Without the lookup tables (up to 16 MiB), which every process makes again."""
        return {key: value for key, value in vars(self).items() if not key.endswith("_table")}


_HINT = "add the values to a class or to `ignore`"


def describe(values: Mapping[Value, int], most: int = 8) -> str:
    """Values and their pixel counts in words, the most frequent first."""
    ordered = sorted(values.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{_text(value)} ({count} pixel{'s' if count > 1 else ''})" for value, count in ordered[:most])
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return f"value{'s' if len(ordered) > 1 else ''} {shown}{more}"


def _targets(domain: DomainConfig, taxonomy: Taxonomy) -> dict[str, int]:
    """Class of the domain's taxonomy (and `ignore`) -> id in the run's taxonomy."""
    native = load_taxonomy(domain.taxonomy)
    targets = dict.fromkeys([*native.classes, "ignore"], IGNORE)
    if native.classes == taxonomy.classes:
        return targets | {name: number for number, name in enumerate(native.classes)}
    for name, sources in _rule(domain.name, native, taxonomy).items():
        for source in sources:
            if source not in native.classes:
                near = nearest(source, list(native.classes))
                raise ConfigError(f"label space {taxonomy.name}, from.{native.name}: no class {source!r}{near}")
            targets[source] = taxonomy.index(name)
    return targets


def _owners(domain: DomainConfig, classes: list[str]) -> dict[Value, str]:
    """Value -> class, from the domain's `map`."""
    owners: dict[Value, str] = {}
    for name, values in domain.map.items():
        if name not in classes:
            raise ConfigError(f"{domain.name}.map: no class {name!r} in {domain.taxonomy}{nearest(name, classes)}")
        for value in values:
            if owners.setdefault(value, name) != name:
                raise ConfigError(f"{domain.name}.map: {_text(value)} is under {owners[value]!r} and {name!r}")
    return owners


def _rule(domain: str, native: Taxonomy, taxonomy: Taxonomy) -> Mapping[str, tuple[str, ...]]:
    if native.name in taxonomy.sources:
        return taxonomy.sources[native.name]
    ways = [n for n in preset_names("labels") if n == native.name or native.name in load_taxonomy(n).sources]
    raise ConfigError(
        f"{domain}: no rule leads from its label space {native.name} to {taxonomy.name}, which can be made from: "
        f"{', '.join(taxonomy.sources) or 'none'}. Label spaces that can be made from {native.name}: "
        f"{', '.join(ways) or 'none'}. Choose one, or add `from: {{{native.name}: ...}}` to {taxonomy.name}"
    )


def _table(rules: Mapping[int, int]) -> NDArray[np.uint8]:
    table = np.full(max(rules, default=-1) + 2, _UNMAPPED, np.uint8)
    table[list(rules)] = list(rules.values())
    return table


def _codes(raw: NDArray[Any]) -> NDArray[np.int64]:
    wide = raw.astype(np.int64)
    return wide if raw.ndim == 2 else wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def _code(value: Value) -> int:
    return value if isinstance(value, int) else value[0] << 16 | value[1] << 8 | value[2]


def _colour(code: int) -> tuple[int, int, int]:
    return code >> 16, code >> 8 & 0xFF, code & 0xFF


def _text(value: Value) -> str:
    return str(value) if isinstance(value, int) else str(list(value))


def _wrong_kind(dimensions: int) -> str:
    if dimensions == 3:
        return "holds colours but `map` lists only ids: set `channel` to the one with the ids, or list colours"
    return "holds one id per pixel but `map` lists only colours: list ids"
