"""A threshold per class, lowered where a class would lose too many of its pixels.

Source: FDA (Yang and Soatto, CVPR 2020) takes per class the confidence that the best 66 % of its pixels reach (34 % in
its code), capped at 0.9; here share and cap are settings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from udas.data.dataset import PictureSet
from udas.pipeline.label_files import write_array, write_json
from udas.pipeline.label_work import Work

BINS = 1000  # of the confidence histograms: thresholds are exact to 0.001


def find_thresholds(
    work: Work, pictures: PictureSet, sample: Sequence[int], threshold: float, keep: float
) -> list[float]:
    """Thresholds of all classes, in order, from the confidences on the pictures with the indices `sample`.

    They are found once per folder, with one file of counts per picture, so that the search resumes at the picture too.
    """
    path, classes = work.folder / "thresholds.json", work.labeller.taxonomy.classes
    found = path.exists()
    _count(work, pictures, sample, found)
    work.wait()
    if work.rank == 0 and not found:
        total = np.zeros((len(classes), BINS), np.int64)
        for index in sample:
            total += np.load(_counts(work, index))
        write_json(path, dict(zip(classes, class_thresholds(total, threshold, keep), strict=True)))
    work.wait()
    thresholds: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return [thresholds[name] for name in classes]


def _count(work: Work, pictures: PictureSet, sample: Sequence[int], found: bool) -> None:
    edges = (torch.arange(BINS) / BINS).to(work.labeller.device)
    for index, maps in work.walk(pictures, sample, lambda index: found or _counts(work, index).exists()):
        write_array(_counts(work, index), histogram(maps, edges).to(torch.int32).cpu().numpy())
        work.advance(1)


def _counts(work: Work, index: int) -> Path:
    return work.folder / "counts" / f"{index}.npy"


def histogram(probabilities: Tensor, edges: Tensor) -> Tensor:
    """Pixels by class and confidence: [C, H, W] probabilities -> [C, BINS]; bin b has edges[b] <= p < edges[b + 1]."""
    confidence, chosen = probabilities.max(0)
    bins = torch.bucketize(confidence, edges, right=True) - 1
    flat = torch.bincount((chosen * BINS + bins).flatten(), minlength=len(probabilities) * BINS)
    return flat.view(len(probabilities), BINS)


def class_thresholds(counts: npt.NDArray[np.int64], threshold: float, keep: float) -> list[float]:
    """theta_c = min(threshold, t_c), t_c the largest bin edge that at least a share `keep` of class c's pixels reach.

    Args:
        counts: [C, BINS] pixels by predicted class and confidence.
        threshold: the highest threshold; also that of classes without pixels.
        keep: share of every class that survives.
    """
    reaching = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    survives = reaching >= keep * reaching[:, :1]
    highest = BINS - 1 - survives[:, ::-1].argmax(axis=1)
    return [min(threshold, int(edge) / BINS) for edge in highest]
