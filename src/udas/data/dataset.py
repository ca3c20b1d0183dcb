"""A domain: pictures and, for those that are granted, labels; described by YAML alone.

The label firewall is built here. `Domain.unlabelled` makes a set that holds no label path at all, and
`Domain.labelled` resolves the label files of granted pictures only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from udas.config import (
    DomainConfig,
    Labelled,
    ListSplit,
    ShareSplit,
    Size,
    Subset,
    expand_environment,
    find_yaml,
    merge,
    read_yaml,
)
from udas.data.files import image_size, read_image, read_label, resize_image, resize_label
from udas.data.layout import Layout, Picture, read_list
from udas.errors import ConfigError, DataError
from udas.taxonomy import IGNORE, LabelMap, Taxonomy, describe
from udas.validation import nearest, validate


def load_domain(raw: str | Mapping[str, Any]) -> DomainConfig:
    """The configuration of a domain, from whatever `domain_settings` takes.

    Raises:
        ConfigError: unknown preset, or mistakes (all are listed).
    """
    settings = domain_settings(raw)
    where = raw if isinstance(raw, str) else f"data {settings.get('name', '')}".strip()
    return validate(DomainConfig, settings, where)


def domain_settings(raw: str | Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a domain, not yet validated.

    Args:
        raw: a preset's name, the path of a YAML file, a mapping with `preset:` and the keys to change (mappings are
            merged, other values replaced), or a full mapping.

    Raises:
        ConfigError: unknown preset or file, or neither a name nor a mapping.
    """
    if not isinstance(raw, str | Mapping):
        raise ConfigError(f"expected a preset, a YAML file, or the keys of a data set (got {raw!r:.60})")
    own = {"preset": raw} if isinstance(raw, str) else dict(raw)
    preset = own.pop("preset", None)
    base = read_yaml(find_yaml(str(preset), "data")) if preset is not None else {}
    return merge(base, own)


@dataclass(frozen=True)
class PictureSet:
    """Pictures that can be read by index, with labels where they are granted. Small and picklable.

    domain: the domain's name.
    pictures: in the order of their names.
    classes: number of classes of the run.
    labels: picture name -> label file; empty in an unlabelled set.
    size: height and width every picture and label is resized to; None keeps each as it is.
    label_map: from file values to run ids; None when the files hold run ids already (pseudo-labels).
    channel: channel of the label files that holds the id.
    confidences: folder of the pseudo-labels' confidence.
    known: pictures with real labels, which replace their pseudo-labels.
    repainted: the pictures were made by a generator, whose output may have another size than the labels.
    image_cache, label_cache: picture name -> exactly what `image` and `label` would give; looked up first.
    """

    domain: str
    pictures: tuple[Picture, ...]
    classes: int
    labels: Mapping[str, Path] = field(default_factory=dict)
    size: Size | None = None
    label_map: LabelMap | None = None
    channel: int | None = None
    confidences: Path | None = None
    known: PictureSet | None = None
    repainted: bool = False
    image_cache: Mapping[str, Tensor] | None = None
    label_cache: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.pictures)

    def image(self, index: int) -> Tensor:
        """The picture, uint8 [3, H, W] RGB, at `size`. Raises `DataError` when the file cannot be read."""
        name = self.pictures[index].name
        if self.image_cache is not None and name in self.image_cache:
            return self.image_cache[name]
        return resize_image(self.native_image(index), self.size)

    def native_image(self, index: int) -> Tensor:
        """The picture as it is in its file, uint8 [3, H, W] RGB. Raises `DataError` when it cannot be read."""
        return read_image(self.pictures[index].image)

    def label(self, index: int) -> Tensor:
        """The run's class ids, uint8 [H, W], at `size`.

        Raises:
            DataError: unreadable file, values without a rule, or a size that differs from the picture's.
            KeyError: the picture has no label in this set.
        """
        return self._label(self.pictures[index])

    def _label(self, picture: Picture) -> Tensor:
        name = picture.name
        if self.known is not None and name in self.known.labels:
            return self.known._label(picture)
        if self.label_cache is not None and name in self.label_cache:
            return self.label_cache[name]
        path = self.labels[name]
        raw = read_label(path, self.channel)
        target = self._fit(picture, path, (raw.shape[0], raw.shape[1]))
        ids = _run_ids(raw, self.classes, path) if self.label_map is None else self.label_map.apply(raw, path)
        return resize_label(torch.from_numpy(ids), target)

    def confidence(self, index: int) -> Tensor | None:
        """Confidence of the pseudo-label, uint8 [H, W] (255 is certain), at `size`; None where there is none."""
        if self.confidences is None:
            return None
        name = self.pictures[index].name
        if self.known is not None and name in self.known.labels:
            return torch.full_like(self.label(index), 255)
        path = self.confidences / f"{name}.png"
        raw = read_label(path)
        if raw.ndim != 2 or raw.dtype != np.uint8:
            raise DataError(f"{path}: a confidence is an 8-bit PNG with one channel")
        target = self._fit(self.pictures[index], path, (raw.shape[0], raw.shape[1]))
        return resize_label(torch.from_numpy(raw), target)

    def with_images(self, folder: Path) -> PictureSet:
        """The same set repainted: `<folder>/<name>.png` in place of each picture; pictures without one are left out.

        Raises:
            DataError: none of the pictures is there.
        """
        files = {picture.name: folder / f"{picture.name}.png" for picture in self.pictures}
        pictures = tuple(replace(p, image=files[p.name]) for p in self.pictures if files[p.name].is_file())
        self._expect(pictures, folder, "repainted picture")
        labels = {p.name: self.labels[p.name] for p in pictures if p.name in self.labels}
        # Without `size` a label takes the size of the repainted picture, which the cache does not know.
        kept = self.label_cache if self.size else None
        return replace(self, pictures=pictures, labels=labels, repainted=True, image_cache=None, label_cache=kept)

    def with_labels(self, folder: Path, confidence: Path | None = None) -> PictureSet:
        """The same pictures with pseudo-labels `<folder>/<name>.png`; pictures without one are left out.

        Args:
            folder: 8-bit PNGs in the run's ids, at `size` or at the picture's own size.
            confidence: folder of 8-bit PNGs of the same names.

        Raises:
            DataError: no label is there, or the confidence of one is missing.
        """
        files = {picture.name: folder / f"{picture.name}.png" for picture in self.pictures}
        labels = {name: path for name, path in files.items() if path.is_file()}
        pictures = tuple(picture for picture in self.pictures if picture.name in labels)
        self._expect(pictures, folder, "pseudo-label")
        if confidence and (lost := [p.name for p in pictures if not (confidence / f"{p.name}.png").is_file()]):
            raise DataError(f"{confidence}/{lost[0]}.png: no such file ({len(lost)} confidences are missing)")
        bare = replace(self, pictures=pictures, label_map=None, channel=None, label_cache=None)
        return replace(bare, labels=labels, confidences=confidence)

    def with_known(self, real: PictureSet) -> PictureSet:
        """The same pseudo-labelled pictures; those that `real` has labels of show these, with full confidence."""
        return replace(self, known=real)

    def fixed(self, count: int) -> list[int]:
        """At most `count` evenly spaced indices: the pictures that previews and reports show."""
        count = min(count, len(self))
        return [(2 * number + 1) * len(self) // (2 * count) for number in range(count)]

    def fingerprint(self) -> str:
        """Hash of all that decides what the set gives; the place and age of the files are left out."""
        rules = None if self.label_map is None else [self.label_map.ids, self.label_map.colours]
        head = [self.domain, self.classes, self.size, self.channel, self.repainted, rules]
        head += [] if self.known is None else [self.known.fingerprint()]
        digest = hashlib.blake2b(json.dumps(head, default=list).encode(), digest_size=16)
        for picture in self.pictures:
            sizes = [file.name + str(file.stat().st_size) for file in self._files(picture)]
            digest.update(json.dumps([picture.name, sizes]).encode())
        return digest.hexdigest()

    def _files(self, picture: Picture) -> Iterable[Path]:
        yield picture.image
        if picture.name in self.labels:
            yield self.labels[picture.name]
        if self.confidences is not None:
            yield self.confidences / f"{picture.name}.png"

    def _fit(self, picture: Picture, path: Path, found: Size) -> Size:
        """The size a label of size `found` is brought to. Raises `DataError` when it does not fit its picture."""
        at_size = self.label_map is None and self.size is not None and found == tuple(self.size)
        if self.size is not None and (self.repainted or at_size):
            return self.size
        image = picture.image
        native = image_size(image)
        if not (self.repainted or found == native):
            sizes = f"{found[1]}x{found[0]} (width x height), but its picture {image} is {native[1]}x{native[0]}"
            raise DataError(f"{path}: the label is {sizes}; a label must have its picture's size")
        return self.size or native

    def _expect(self, pictures: tuple[Picture, ...], folder: Path, what: str) -> None:
        if self.pictures and not pictures:
            name = self.pictures[0].name
            raise DataError(f"{folder}: no {what} of {self.domain} is there; looked for {name}.png and so on")


def _run_ids(raw: NDArray[Any], classes: int, path: Path) -> NDArray[np.uint8]:
    foreign = (raw >= classes) & (raw != IGNORE)
    if raw.ndim != 2 or foreign.any():
        values = dict(zip(*(part.tolist() for part in np.unique(raw[foreign], return_counts=True)), strict=True))
        found = describe(values) if raw.ndim == 2 else "several channels"
        raise DataError(f"{path}: {found}; a pseudo-label holds ids 0..{classes - 1} or {IGNORE} in one channel")
    return raw.astype(np.uint8)


class Domain:
    """One data set, seen with the classes of a run."""

    def __init__(self, config: DomainConfig, taxonomy: Taxonomy) -> None:
        """Check everything that can be checked without reading pictures.

        Raises:
            ConfigError: an unset environment variable, wrong patterns, or a label map that does not fit.
        """
        self.config = config
        self.taxonomy = taxonomy
        self.root = Path(expand_environment(config.root)).expanduser()
        self._layout = Layout(config)
        self._label_map = LabelMap(config, taxonomy)
        self._pictures: dict[str, list[Picture]] = {}

    def pictures(self, split: str) -> list[Picture]:
        """All pictures of a split, sorted by name. Folders are listed once; streets are rendered before that.

        Raises:
            DataError: unknown split, missing root, no picture found, or a list naming an absent picture.
        """
        if split not in self.config.splits:
            raise DataError(f"{self.config.name} has no split {split!r}{nearest(split, list(self.config.splits))}")
        if split not in self._pictures:
            self._pictures[split] = self._list(split)
        return self._pictures[split]

    def labelled_names(self, split: str, labelled: Labelled | None = None) -> list[str]:
        """Names of the granted pictures, sorted. No label file is opened.

        Args:
            split: a key of `splits`.
            labelled: what is granted; None takes it from the configuration. `{count, seed}` is nested in `count`.

        Raises:
            DataError: a list that is missing or names an absent picture, a count above the number of pictures, or no
                label file where those that exist are granted.
        """
        granted = self.config.labelled if labelled is None else labelled
        pictures = self.pictures(split)
        names = [picture.name for picture in pictures]
        if isinstance(granted, Subset):
            if granted.count > len(names):
                raise DataError(
                    f"{self.config.name} {split}: {granted.count} labelled pictures asked for, {len(names)} exist; "
                    "lower `count`"
                )
            return sorted(_seeded(names, granted.seed)[: granted.count])
        if granted in ("all", "none"):
            return names if granted == "all" else []
        if granted == "existing":
            return self._with_label_file(split)
        return read_list(self._below_root(granted), pictures, f"{self.config.name} {split}")

    def _with_label_file(self, split: str) -> list[str]:
        if self.config.labels is None:
            raise DataError(f"{self.config.name} {split}: `labelled: existing`, but `labels` is not given")
        files = self._label_files(self.pictures(split))
        found = [name for name, file in files.items() if file.is_file()]
        if not found:
            example = next(iter(files.values()))
            raise DataError(f"{self.config.name} {split}: no label file exists, such as {example}; check `labels`")
        return found

    def unlabelled(self, split: str) -> PictureSet:
        """All pictures of a split, without any way to labels."""
        pictures = tuple(self.pictures(split))
        return PictureSet(self.config.name, pictures, len(self.taxonomy.classes), size=self.config.size)

    def labelled(self, split: str, labelled: Labelled | None = None) -> PictureSet:
        """The granted pictures of a split with their label files; arguments as in `labelled_names`.

        Raises:
            DataError: also when a label file does not exist or the configuration has no `labels`.
        """
        names = set(self.labelled_names(split, labelled))
        chosen = tuple(picture for picture in self.pictures(split) if picture.name in names)
        if chosen and self.config.labels is None:
            raise DataError(f"{self.config.name} {split}: pictures are granted as labelled, but `labels` is not given")
        files = self._label_files(chosen)
        if lost := [path for path in files.values() if not path.is_file()]:
            raise DataError(f"{lost[0]}: no such label file ({len(lost)} of {len(files)} are missing); check `labels`")
        granted = replace(self.unlabelled(split), pictures=chosen, labels=files)
        return replace(granted, label_map=self._label_map, channel=self.config.channel)

    def _label_files(self, pictures: Iterable[Picture]) -> dict[str, Path]:
        return {picture.name: self.root / self._layout.label(picture) for picture in pictures}

    def _list(self, split: str) -> list[Picture]:
        self._prepare()
        spec = self.config.splits[split]
        pictures = self._layout.find(self.root, split)
        if isinstance(spec, ListSplit) and pictures:
            names = set(read_list(self._below_root(spec.file), pictures, self.config.name))
        elif isinstance(spec, ShareSplit):
            order = _seeded([picture.name for picture in pictures], spec.seed)
            start, stop = (round(share * len(order)) for share in spec.share)
            names = set(order[start:stop])
        else:
            names = {picture.name for picture in pictures}
        if not names:
            where = f"{self._layout.tried(split)} in {self.root}"
            raise DataError(
                f"{self.config.name}: no picture in split {split!r}; looked for {where}; check `images` and `splits`"
            )
        return [picture for picture in pictures if picture.name in names]

    def _prepare(self) -> None:
        if self.config.streets is not None:
            from udas.data.streets import ensure

            ensure(self.config.streets, self.root)
        if not self.root.is_dir():
            raise DataError(
                f"{self.config.name}: the folder {self.root} does not exist; set `root` to the data set's folder"
            )

    def _below_root(self, file: str) -> Path:
        return self.root / Path(expand_environment(file)).expanduser()


def _seeded(names: list[str], seed: int) -> list[str]:
    """The names in an order that depends on the seed and on nothing else, so that it never changes between machines."""
    return sorted(names, key=lambda name: hashlib.blake2b(f"{seed}/{name}".encode()).digest())
