"""The order is that of the entropies, the split is the share that was asked for, and interruption changes nothing."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from udas.data.dataset import PictureSet
from udas.data.layout import Picture
from udas.errors import ConfigError, DataError
from udas.pipeline.label_work import Work
from udas.pipeline.rank import rank_pictures, restricted, score
from udas.taxonomy import Taxonomy

CPU = torch.device("cpu")
COLOURS = ((128, 64, 128), (70, 130, 180), (107, 142, 35), (255, 255, 255))
TOWN = Taxonomy("town", ("road", "sky", "tree", "snow"), COLOURS)
COUNT = 7


class Judge(nn.Module):
    """Sees road, sky or tree by colour, the surer the stronger it is; pictures of a batch touch each other a little."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.seen = nn.Dropout(0.5), 0

    def forward(self, image: Tensor) -> Tensor:
        self.seen += len(image)
        logits = 8 * self.dropout(image) * (1 + 1e-4 * image.mean())
        return nn.functional.pad(logits, (0, 0, 0, 0, 0, 1))


@pytest.fixture
def pictures(tmp_path: Path) -> PictureSet:
    """Red, green and blue noise of different strength, so that entropies differ and classes are present or not."""
    random, found = np.random.default_rng(0), []
    for number in range(COUNT):
        colours = random.random((16, 20, 3)) * [1, number % 2, 0.5] * (1 + number) / COUNT
        path = tmp_path / "data" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((colours * 255).astype(np.uint8)).save(path)
        found.append(Picture(f"street/{number}" if number == 5 else str(number), path))
    return PictureSet("town", tuple(found), 4)


def ranked(pictures: PictureSet, folder: Path, easy: float = 0.5, rare: Sequence[str] = ()) -> list[dict[str, str]]:
    rank_pictures(Judge(), pictures, TOWN, easy, rare, folder, CPU)
    return table(folder)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "ranking.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def naive(pictures: PictureSet, rare: Sequence[str]) -> dict[str, float]:
    """Scores by a loop over pixels."""
    judge, scores = Judge().eval(), {}
    for index, picture in enumerate(pictures.pictures):
        found = judge(pictures.image(index)[None].float() / 255)[0].softmax(0)
        total, present = 0.0, set()
        for pixel in found.flatten(1).T.tolist():
            total += sum(-p * math.log2(p + 1e-30) / math.log2(4) for p in pixel)
            present.add(TOWN.classes[pixel.index(max(pixel))])
        mean = total / (16 * 20)
        weight = (len(rare) - len(present & set(rare))) / len(rare) + 0.5 if rare else 1
        scores[picture.name] = mean * weight
    return scores


@pytest.mark.parametrize("rare", [(), ("sky", "snow")])
def test_pictures_are_sorted_by_their_entropy(pictures: PictureSet, tmp_path: Path, rare: Sequence[str]) -> None:
    rows, expected = ranked(pictures, tmp_path / "out", rare=rare), naive(pictures, rare)
    assert [row["picture"] for row in rows] == sorted(expected, key=lambda name: expected[name])
    assert [float(row["score"]) for row in rows] == pytest.approx(sorted(expected.values()), rel=1e-3)
    assert [int(row["rank"]) for row in rows] == list(range(1, COUNT + 1))


def test_rare_classes_change_the_order(pictures: PictureSet, tmp_path: Path) -> None:
    plain, weighted = (ranked(pictures, tmp_path / name, rare=rare) for name, rare in (("a", ()), ("b", ("sky",))))
    assert [row["picture"] for row in plain] != [row["picture"] for row in weighted]


def test_a_score_is_one_for_no_idea_and_favours_rare_classes() -> None:
    nothing, none = torch.full((4, 2, 2), 0.25), torch.tensor([], dtype=torch.long)
    certain = nn.functional.one_hot(torch.tensor([[0, 0], [1, 2]]), 4).permute(2, 0, 1).float()
    assert score(nothing, none) == pytest.approx(1)
    assert score(certain, none) == 0
    half = torch.cat([certain[:, :1], nothing[:, :1]], 1)  # class 0 is predicted everywhere: entropy 1/2
    assert score(half, torch.tensor([0, 1])) == pytest.approx(0.5 * (1 / 2 + 1 / 2))
    assert score(half, torch.tensor([1, 3])) == pytest.approx(0.5 * (2 / 2 + 1 / 2))


@pytest.mark.parametrize(("easy", "count"), [(0.67, 5), (0.5, 4), (0.01, 0), (1.0, 7)])
def test_the_first_share_is_easy(pictures: PictureSet, tmp_path: Path, easy: float, count: int) -> None:
    rows = ranked(pictures, tmp_path / "out", easy)
    assert [row["part"] for row in rows] == ["easy"] * count + ["hard"] * (COUNT - count)
    for part in ("easy", "hard"):
        names = [row["picture"] for row in rows if row["part"] == part]
        assert (tmp_path / "out" / f"{part}.txt").read_text().split() == names
        if names:
            chosen = restricted(pictures, tmp_path / "out", part)
            assert sorted(picture.name for picture in chosen.pictures) == sorted(names)
        else:
            with pytest.raises(DataError, match=rf"{part}\.txt: no picture is {part}; change `easy`"):
                restricted(pictures, tmp_path / "out", part)


def test_both_ends_are_shown(pictures: PictureSet, tmp_path: Path) -> None:
    rows = ranked(pictures, tmp_path / "out")
    shown = {path.name for path in (tmp_path / "out/preview").iterdir()}
    assert shown == {f"{end}_{place}" for end in ("easy", "hard") for place in range(3)}
    hardest = next(k for k, p in enumerate(pictures.pictures) if p.name == rows[-1]["picture"])
    seen = np.array(Image.open(tmp_path / "out/preview/hard_0/input.png"))
    assert np.array_equal(seen, pictures.image(hardest).permute(1, 2, 0).numpy())
    assert {p.name for p in (tmp_path / "out/preview/easy_0").iterdir()} == {
        "input.png", "prediction.png", "entropy.png"
    }  # fmt: skip


@pytest.mark.parametrize("stop", [0, 3, 6])
def test_a_stop_at_any_picture_changes_nothing(pictures: PictureSet, tmp_path: Path, stop: int) -> None:
    whole = ranked(pictures, tmp_path / "whole")

    def interrupt(done: int, total: int) -> None:
        if done > stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rank_pictures(Judge(), pictures, TOWN, 0.5, (), tmp_path / "out", CPU, interrupt)
    judge = Judge()
    rank_pictures(judge, pictures, TOWN, 0.5, (), tmp_path / "out", CPU)
    assert table(tmp_path / "out") == whole
    assert judge.seen <= COUNT + 6  # the rest, whole groups of it, and the preview


def test_two_processes_rank_as_one(pictures: PictureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ranked(pictures, tmp_path / "one")
    monkeypatch.setattr(Work, "wait", lambda work: None)  # the second has finished when the first begins
    with pytest.raises(KeyError):
        rank_pictures(Judge(), pictures, TOWN, 0.5, (), tmp_path / "two", CPU, None, 1, 2)
    rank_pictures(Judge(), pictures, TOWN, 0.5, (), tmp_path / "two", CPU, None, 0, 2)
    found = table(tmp_path / "two")
    assert [row["picture"] for row in found] == [row["picture"] for row in alone]
    assert [float(row["score"]) for row in found] == pytest.approx([float(row["score"]) for row in alone], rel=1e-3)


def test_an_unknown_class_is_refused(pictures: PictureSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="town has no class 'skye'; did you mean 'sky'"):
        ranked(pictures, tmp_path, rare=["skye"])


def test_names_may_hold_what_only_some_take_for_the_end_of_a_line(tmp_path: Path) -> None:
    names = ["one\u2028two", "three\x85four"]
    (tmp_path / "easy.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    pictures = PictureSet("road", tuple(Picture(name, tmp_path / f"{name}.png") for name in [*names, "five"]), 4)
    assert [picture.name for picture in restricted(pictures, tmp_path, "easy").pictures] == names
