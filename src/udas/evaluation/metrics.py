"""Scores from confusion matrices: rows are the truth, columns the prediction. Every score is a share in [0, 1].

IoU_c = M_cc / (row_c + col_c - M_cc). A class that occurs neither in the truth nor in the prediction has no IoU: it is
left out of the mean and named in `absent`. Pixels whose truth is no class (ignored ones) count nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from udas.errors import DataError

Reading = Literal["subset", "ignore"]
"""What a mean over some of the classes does with pixels whose truth is another class.

subset: they stay, and are errors of the class predicted there (choose rows of the full matrix).
ignore: they are dropped, which is easier.
"""

Counts = npt.NDArray[np.int64]


def confusion(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Count pixels by truth and prediction, picture by picture, on the device of the tensors.

    Args:
        prediction: [B, H, W] integer class ids in 0 .. classes-1.
        label: [B, H, W] integer class ids; pixels outside 0 .. classes-1 are not counted.
        classes: C, the number of classes.

    Returns:
        [B, C, C] int64 pixel counts.
    """
    known = (label >= 0) & (label < classes)
    truth = torch.where(known, label, classes).long()  # an extra row takes what does not count: no indexing by mask
    picture = torch.arange(len(label), device=label.device).view(-1, 1, 1)
    cell = (picture * (classes + 1) + truth) * classes + prediction
    counts = torch.bincount(cell.flatten(), minlength=len(label) * (classes + 1) * classes)
    return counts.view(len(label), classes + 1, classes)[:, :classes]


@dataclass(frozen=True)
class Scores:
    """What one confusion matrix says.

    iou: scored class -> IoU, or None where the class is absent from truth and prediction.
    miou: mean of the IoU over the classes that are present.
    pixel_accuracy: share of right pixels among those whose truth is a scored class.
    absent: the classes left out of the mean.
    """

    iou: dict[str, float | None]
    miou: float
    pixel_accuracy: float
    absent: tuple[str, ...]

    @classmethod
    def from_confusion(
        cls, matrix: Tensor, classes: Sequence[str], scored: Sequence[str] | None = None, reading: Reading = "subset"
    ) -> Scores:
        """Score a [C, C] matrix of pixel counts over the classes `scored` (all by default).

        Raises:
            DataError: when no pixel's truth is a scored class.
        """
        names = tuple(scored or classes)
        rows = [classes.index(name) for name in names]
        counts = matrix.cpu().numpy()
        labelled = int(counts[rows].sum())
        if not labelled:
            raise DataError("no labelled pixel of the scored classes: nothing to score; check the labels and `map`")
        right, union = _right_and_union(counts, rows, reading)
        iou = {n: float(r / u) if u else None for n, r, u in zip(names, right, union, strict=True)}
        present = [value for value in iou.values() if value is not None]
        absent = tuple(name for name, value in iou.items() if value is None)
        return cls(iou, sum(present) / len(present), float(right.sum() / labelled), absent)


def bootstrap(
    per_picture: Tensor,
    rows: Sequence[int] | None = None,
    reading: Reading = "subset",
    repeats: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of the mean IoU over pictures drawn with replacement (Efron and Tibshirani, 1993).

    It tells how far the score depends on which pictures were scored, not how far trainings differ.

    Args:
        per_picture: [N, C, C] pixel counts.
        rows: ids of the scored classes; None = all.
        reading: as in `Scores`.
        repeats: how many times N pictures are drawn.
        seed: of the draws; the same seed gives the same interval.
    """
    counts = per_picture.cpu().numpy()
    number = len(counts)
    right, union = _right_and_union(counts, list(range(counts.shape[-1])) if rows is None else list(rows), reading)
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=repeats)
    right, union = draws @ right, draws @ union
    present = union > 0
    scored = present.any(1)  # a draw of nothing but ignored pictures has no score
    means = (right / np.maximum(union, 1)).sum(1)[scored] / present.sum(1)[scored]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _right_and_union(counts: Counts, rows: list[int], reading: Reading) -> tuple[Counts, Counts]:
    """[..., C, C] counts -> pixels in the intersection and in the union, [..., K] each, of the K classes `rows`."""
    columns = counts[..., rows, :] if reading == "ignore" else counts
    right = counts[..., rows, rows]
    return right, counts[..., rows, :].sum(-1) + columns[..., :, rows].sum(-2) - right
