"""How good pseudo-labels are: scores where the truth is known, and a few pictures to look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from udas.data.dataset import PictureSet
from udas.evaluation.metrics import Scores, confusion
from udas.pipeline.label_files import Journal, in_colours, write_png
from udas.pipeline.label_maps import entropy, kept
from udas.pipeline.label_work import Work
from udas.taxonomy import IGNORE

SHOWN = 6  # pictures in the preview


def quality(work: Work, validation: PictureSet, limits: Tensor) -> dict[str, Any]:
    """How right such labels are where the truth is known.

    coverage: share of the labelled pixels that survive; miou, accuracy, iou: over those; miou_all, accuracy_all: over
    all labelled pixels, as if nothing were left out.
    """
    journal, classes = Journal(work.folder, "quality", work.rank), work.labeller.taxonomy.classes
    names, finished = [picture.name for picture in validation.pictures], journal.names()
    for index, maps in work.walk(validation, range(len(validation)), lambda index: names[index] in finished):
        journal.append({"name": names[index]} | _compare(maps, validation.label(index), limits))
        work.advance(1)
    work.wait()
    sums = journal.sums("all", "kept")
    every, sure = torch.from_numpy(sums["all"]), torch.from_numpy(sums["kept"])
    scores, best = Scores.from_confusion(every, classes), None
    if sure.sum():
        best = Scores.from_confusion(sure, classes)
    return {
        "miou": best and best.miou,
        "accuracy": best and best.pixel_accuracy,
        "coverage": int(sure.sum()) / int(every.sum()),
        "iou": best and best.iou,
        "miou_all": scores.miou,
        "accuracy_all": scores.pixel_accuracy,
    }


def _compare(probabilities: Tensor, truth: Tensor, limits: Tensor) -> dict[str, Any]:
    """Confusion matrices [C][C] over all labelled pixels and over those that survive."""
    confidence, chosen = probabilities.max(0)
    truth = truth.to(chosen.device).long()
    truths = torch.stack([truth, truth.masked_fill(~kept(chosen, confidence, limits), IGNORE)])
    every, sure = confusion(chosen.expand(2, -1, -1), truths, len(probabilities)).tolist()
    return {"all": every, "kept": sure}


def preview(work: Work, pictures: PictureSet, limits: Tensor, truth: bool) -> None:
    """Pictures of a few fixed ones: input, label, confidence, entropy, and the truth where it is known."""
    taxonomy = work.labeller.taxonomy
    for k, index in enumerate(pictures.fixed(SHOWN)):
        image, folder = pictures.image(index), work.folder / "preview" / str(k)
        (maps,) = work.labeller([pictures.pictures[index].name], [image])
        confidence, chosen = maps.max(0)
        label = chosen.masked_fill(~kept(chosen, confidence, limits), IGNORE)
        write_png(folder / "input.png", image.permute(1, 2, 0).contiguous().numpy())
        write_png(folder / "label.png", taxonomy.colourise(label.to(torch.uint8).cpu().numpy()))
        write_png(folder / "confidence.png", in_colours(confidence.cpu().numpy(), "viridis"))
        write_png(folder / "entropy.png", in_colours(entropy(maps).cpu().numpy(), "magma"))
        if truth:
            write_png(folder / "truth.png", taxonomy.colourise(pictures.label(index).numpy()))
