"""Ranking: unlabelled pictures sorted by how sure a network is of them, and split into easy and hard ones.

Source: IntraDA (Pan et al., "Unsupervised Intra-domain Adaptation for Semantic Segmentation through Self-Supervision",
CVPR 2020, section 3.2); the weight for rare classes is that of its code.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from udas.data.dataset import PictureSet
from udas.errors import DataError
from udas.pipeline.label import Progress, counter
from udas.pipeline.label_files import Journal, in_colours, write_png
from udas.pipeline.label_maps import Labeller, Model, entropy
from udas.pipeline.label_work import Work
from udas.storage import write_atomically
from udas.taxonomy import Taxonomy

Part = Literal["easy", "hard"]

SHOWN = 3  # pictures of either end in the preview
BATCH = 4  # pictures per forward pass
HEAD = ("rank", "picture", "score", "part")


@dataclass(frozen=True)
class Ranked:
    """One picture with its score: the lower, the easier."""

    picture: str
    score: float
    part: Part


@torch.inference_mode()
def rank_pictures(
    model: Model,
    pictures: PictureSet,
    taxonomy: Taxonomy,
    easy: float,
    rare: Sequence[str],
    folder: Path,
    device: torch.device,
    progress: Progress | None = None,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Rank `pictures` by the score of each; work that is already in `folder` is kept.

    score = 1/(H W) sum_{h,w} E(h, w),  E = -sum_c p_c log p_c / log C: the mean entropy, in [0, 1]

    With rare classes it is multiplied by (n - r) / n + 1/2, n: rare classes there are, r: those that are predicted
    somewhere in the picture. The first share `easy` of the ascending order is easy, the rest hard.

    Writes `ranking.csv` (rank, picture, score, part), `easy.txt` and `hard.txt` (a picture's name per line), and
    `preview/{easy,hard}_<k>/*.png` of both ends.

    Args:
        model: RGB [B, 3, H, W] in [0, 1] -> logits [B, C, H, W]; a module is put into evaluation mode.
        pictures: what to rank; their labels, if there are any, are not read.
        taxonomy: the label space of the run.
        easy: lambda, in (0, 1].
        rare: names of the rare classes; with none, the score is the entropy alone.
        folder: of this stage.
        device: where the model is.
        progress: told about every finished picture of this process.
        rank: this process; with `world` > 1 a process group must be up. Pictures i with i mod world = rank are its own.
        world: number of processes.

    Raises:
        ConfigError: a rare class that the label space does not have.
        RunError: when the model is of another label space or not finite, or the disk is full.
        DataError: when a picture cannot be read.
    """
    if isinstance(model, nn.Module):
        model.eval()
    labeller = Labeller(model, taxonomy, views=1, temperature=1.0, seed=0, device=device)
    advance = counter(len(range(rank, len(pictures), world)), progress)
    work = Work(labeller, BATCH, folder, rank, world, advance)
    ids = torch.tensor([taxonomy.index(name) for name in rare], device=device)
    scores = _score(work, pictures, ids)
    if rank == 0:
        ranking = _ranking(scores, easy)
        _preview(work, pictures, ranking)
        _write(ranking, folder)


def restricted(pictures: PictureSet, folder: Path, part: Part) -> PictureSet:
    """The pictures that a finished rank stage in `folder` found easy, or hard.

    Raises:
        DataError: there are none, or the list cannot be read.
    """
    path = folder / f"{part}.txt"
    try:
        names = set(path.read_text(encoding="utf-8").split("\n"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    chosen = tuple(picture for picture in pictures.pictures if picture.name in names)
    if not chosen:
        raise DataError(f"{path}: no picture is {part}; change `easy` of the rank stage")
    return replace(pictures, pictures=chosen)


def _score(work: Work, pictures: PictureSet, rare: Tensor) -> dict[str, float]:
    """Score of every picture by name, those of other processes included."""
    journal = Journal(work.folder, "scores", work.rank)
    names, finished = [picture.name for picture in pictures.pictures], journal.names()
    for index, maps in work.walk(pictures, range(len(pictures)), lambda index: names[index] in finished):
        journal.append({"name": names[index], "score": score(maps, rare)})
        work.advance(1)
    work.wait()
    found = {line["name"]: line["score"] for line in journal.lines()}
    return {name: found[name] for name in names}


def score(probabilities: Tensor, rare: Tensor) -> float:
    """Of one picture: probabilities [C, H, W], ids of the rare classes [n] -> [0, 1], with rare classes [0, 1.5]."""
    mean = entropy(probabilities).double().mean().item()
    if not len(rare):
        return mean
    present = torch.isin(rare, probabilities.argmax(0)).sum().item()
    return mean * ((len(rare) - present) / len(rare) + 0.5)


def _ranking(scores: dict[str, float], easy: float) -> list[Ranked]:
    order = sorted(scores, key=lambda name: (scores[name], name))
    count = round(easy * len(order))
    return [Ranked(name, scores[name], "easy" if place < count else "hard") for place, name in enumerate(order)]


def _write(ranking: Sequence[Ranked], folder: Path) -> None:
    for part in ("easy", "hard"):
        names = [entry.picture for entry in ranking if entry.part == part]
        write_atomically(folder / f"{part}.txt", "".join(f"{name}\n" for name in names).encode())
    text = io.StringIO()
    rows: list[Sequence[Any]] = [(place, e.picture, e.score, e.part) for place, e in enumerate(ranking, 1)]
    csv.writer(text, lineterminator="\n").writerows([HEAD, *rows])
    write_atomically(folder / "ranking.csv", text.getvalue().encode())


def _preview(work: Work, pictures: PictureSet, ranking: Sequence[Ranked]) -> None:
    """Pictures of both ends, the most extreme one first: input, prediction, entropy."""
    index = {picture.name: place for place, picture in enumerate(pictures.pictures)}
    for end, entries in (("easy", ranking[:SHOWN]), ("hard", ranking[::-1][:SHOWN])):
        for place, entry in enumerate(entries):
            image, folder = pictures.image(index[entry.picture]), work.folder / "preview" / f"{end}_{place}"
            (maps,) = work.labeller([entry.picture], [image])
            prediction = work.labeller.taxonomy.colourise(maps.argmax(0).byte().cpu().numpy())
            write_png(folder / "input.png", image.permute(1, 2, 0).contiguous().numpy())
            write_png(folder / "prediction.png", prediction)
            write_png(folder / "entropy.png", in_colours(entropy(maps).cpu().numpy(), "magma"))
