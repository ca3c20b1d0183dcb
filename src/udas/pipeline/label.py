"""Pseudo-labels: what a network is sure of on unlabelled pictures, seen K times, written as PNGs.

Per picture: K views (`udas.data.views`), softmax(logits / T) of each mapped back, per pixel the view that is surest
(the maximum-confidence map of UDAS), its best class, and IGNORE where that is less sure than the class's threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from udas.config import Config, Share
from udas.data.dataset import PictureSet
from udas.evaluation.protocols import ProtocolConfig
from udas.pipeline.label_files import Journal, Pixels, write_json, write_png
from udas.pipeline.label_maps import Labeller, Model, kept
from udas.pipeline.label_quality import preview, quality
from udas.pipeline.label_thresholds import find_thresholds
from udas.pipeline.label_work import Work, ahead
from udas.taxonomy import IGNORE, Taxonomy

UNITS = 1 << 16  # confidences are summed as integers of this many units: sums are the same in any order

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all) of this process."""


class LabelConfig(Config):
    """How pictures are labelled by a network."""

    views: int = Field(3, ge=1, description="K, looks at each picture: itself, then draws from AutoAugment")
    temperature: float = Field(1.0, gt=0, description="T of softmax(logits / T); below 1 sharpens")
    rule: Literal["constant", "class"] = Field(
        "class", description="constant: one threshold; class: lowered for a class where fewer than `keep` would survive"
    )
    threshold: Share = Field(0.6, description="pixels less confident than this are left out")
    keep: float = Field(0.5, gt=0, le=1, description="rule class: share of every predicted class that survives")
    sample: int = Field(500, ge=1, description="rule class: evenly spaced pictures that thresholds are found on")
    confidence: bool = Field(False, description="also write the confidence of every pixel, 8 bit")
    batch: int = Field(4, ge=1, description="pictures per forward pass, each seen K times")
    seed: int = Field(0, description="seed of the views")
    protocol: ProtocolConfig | None = Field(
        None, description="look at a picture as this protocol does (scales, flips, fused outputs), instead of K views"
    )

    @model_validator(mode="after")
    def _one_look(self) -> Self:
        if self.protocol is not None and self.temperature != 1:
            raise ValueError("`temperature` belongs to `views`: a protocol averages plain probabilities")
        return self


@torch.inference_mode()
def label(
    model: Model,
    pictures: PictureSet,
    taxonomy: Taxonomy,
    config: LabelConfig,
    folder: Path,
    device: torch.device,
    progress: Progress | None = None,
    rank: int = 0,
    world: int = 1,
    validation: PictureSet | None = None,
) -> dict[str, Any]:
    """Label `pictures` with what `model` is sure of; work that is already in `folder` is kept.

    Writes `labels/<name>.png` (ids of `taxonomy`, IGNORE where unsure), `confidence/<name>.png` when asked for,
    `preview/<k>/*.png` and `statistics.json`.

    Args:
        model: RGB [B, 3, H, W] in [0, 1] -> logits [B, C, H, W]; a module is put into evaluation mode.
        pictures: what to label; its own labels, if it has any, are not read.
        taxonomy: the label space of the run.
        config: the settings.
        folder: of this stage, for one model and one config only.
        device: where the model is.
        progress: told about every finished picture of this process.
        rank: this process; with `world` > 1 a process group must be up. Pictures i with i mod world = rank are its own.
        world: number of processes.
        validation: labelled pictures on which the quality of such labels is measured; they choose nothing.

    Returns:
        The content of `statistics.json`: pictures; thresholds per class; share of pixels predicted as each class; kept,
        the share of those that survived, and kept_total over all; mean confidence per class before the threshold (null
        for a class that was never predicted); quality on `validation`, or null.

    Raises:
        RunError: when the model is of another label space or not finite, or the disk is full.
        DataError: when a picture cannot be read.
    """
    if isinstance(model, nn.Module):
        model.eval()
    sample = pictures.fixed(config.sample) if config.rule == "class" else []
    sizes = [len(sample), len(pictures), 0 if validation is None else len(validation)]
    advance = counter(sum(len(range(rank, size, world)) for size in sizes), progress)
    labeller = Labeller(model, taxonomy, config.views, config.temperature, config.seed, device, config.protocol)
    work = Work(labeller, config.batch, folder, rank, world, advance)
    thresholds = [config.threshold] * len(taxonomy.classes)
    if sample:
        thresholds = find_thresholds(work, pictures, sample, config.threshold, config.keep)
    limits = torch.tensor(thresholds, device=device)
    _write_labels(work, pictures, limits, config.confidence)
    scores = None if validation is None else quality(work, validation, limits)
    work.wait()
    statistics = _statistics(work, len(pictures), thresholds) | {"quality": scores}
    if rank == 0:
        preview(work, pictures if validation is None else validation, limits, truth=validation is not None)
        write_json(folder / "statistics.json", statistics)
    return statistics


def counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """Adds finished pictures of `total` and tells `progress`."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return advance


# ------------------------------------------------------------------------------------------ labels and statistics


@dataclass(frozen=True)
class _Labelled:
    """One picture's pseudo-label on its way to the disk, with its line in the journal."""

    label: Pixels
    confidence: Pixels
    line: dict[str, Any]


def _write_labels(work: Work, pictures: PictureSet, limits: Tensor, confidence: bool) -> None:
    """Label this process's pictures. A picture is done when its files exist and its line is in the journal."""
    journal, palette = Journal(work.folder, "pictures", work.rank), work.labeller.taxonomy.palette()
    names, finished = [picture.name for picture in pictures.pictures], journal.names()

    def file(kind: str, name: str) -> Path:
        return work.folder / kind / f"{name}.png"

    def done(index: int) -> bool:
        kinds = ["labels", "confidence"] if confidence else ["labels"]
        return names[index] in finished and all(file(kind, names[index]).exists() for kind in kinds)

    def write(labelled: _Labelled) -> dict[str, Any]:
        name = labelled.line["name"]
        if confidence:
            write_png(file("confidence", name), labelled.confidence)
        write_png(file("labels", name), labelled.label, palette)
        return labelled.line

    found = work.walk(pictures, range(len(pictures)), done)
    for line in ahead(write, (_labelled(names[index], maps, limits) for index, maps in found)):
        journal.append(line)
        work.advance(1)


def _labelled(name: str, probabilities: Tensor, limits: Tensor) -> _Labelled:
    confidence, chosen = probabilities.max(0)
    sure, classes = kept(chosen, confidence, limits), len(probabilities)
    units = (confidence * UNITS).round().double()  # whole numbers: their sum is exact in any order
    line = {
        "name": name,
        "predicted": torch.bincount(chosen.flatten(), minlength=classes).tolist(),
        "kept": torch.bincount(chosen[sure], minlength=classes).tolist(),
        "confidence": torch.bincount(chosen.flatten(), units.flatten(), minlength=classes).long().tolist(),
    }
    return _Labelled(_bytes(chosen.masked_fill(~sure, IGNORE)), _bytes((confidence * 255).round()), line)


def _bytes(values: Tensor) -> Pixels:
    pixels: Pixels = values.to(torch.uint8).cpu().numpy()
    return pixels


def _statistics(work: Work, pictures: int, thresholds: Sequence[float]) -> dict[str, Any]:
    """Sums over the lines of all processes' pictures."""
    classes = work.labeller.taxonomy.classes
    sums = Journal(work.folder, "pictures", work.rank).sums("predicted", "kept", "confidence")
    predicted, survived = sums["predicted"], sums["kept"]

    def shares(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> dict[str, float | None]:
        pairs = zip(classes, part.tolist(), whole.tolist(), strict=True)
        return {name: p / w if w else None for name, p, w in pairs}

    return {
        "pictures": pictures,
        "thresholds": dict(zip(classes, thresholds, strict=True)),
        "predicted": shares(predicted, np.full_like(predicted, predicted.sum())),
        "kept": shares(survived, predicted),
        "kept_total": int(survived.sum()) / int(predicted.sum()),
        "confidence": shares(sums["confidence"], predicted * UNITS),
    }
