"""Labels are what the formula says, statistics are what is on the disk, and interruption changes nothing."""

from __future__ import annotations

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from udas.data.dataset import PictureSet
from udas.data.layout import Picture
from udas.data.views import draw_views, look, map_back
from udas.errors import RunError
from udas.evaluation.protocols import ProtocolConfig
from udas.pipeline.label import LabelConfig, label
from udas.pipeline.label_files import Journal
from udas.pipeline.label_maps import entropy, kept, most_confident
from udas.pipeline.label_thresholds import BINS, class_thresholds, histogram
from udas.pipeline.label_work import Work, ahead
from udas.taxonomy import IGNORE, Taxonomy

CPU = torch.device("cpu")
COLOURS = ((128, 64, 128), (70, 130, 180), (107, 142, 35), (255, 255, 255))
TOWN = Taxonomy("town", ("road", "sky", "tree", "snow"), COLOURS)
PREDICTED = 3  # classes: there is no snow
SIZES = [(20, 28), (20, 28), (16, 32), (20, 28), (20, 28), (16, 32), (20, 28)]


class Colours(nn.Module):
    """A model that judges by blurred colour, never sees snow, and remembers how many views it looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Dropout(0.5))
        self.views = 0

    def forward(self, image: Tensor) -> Tensor:
        self.views += len(image)
        logits = 6 * self.layers(image) + torch.tensor([-1.0, 0.3, 0.0]).view(1, 3, 1, 1)
        return nn.functional.pad(logits, (0, 0, 0, 0, 0, 1), value=-50.0)


class TwoLevels(Colours):
    """A model with a second output, which sees red as sky."""

    def levels(self, image: Tensor) -> tuple[Tensor, Tensor]:
        main = self(image)
        return main, main[:, [1, 0, 2, 3]]


class Company(Colours):
    """A model that lets the pictures of a batch influence each other, as the rounding of real networks does."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) * (1 + image.mean())


@pytest.fixture
def pictures(tmp_path: Path) -> PictureSet:
    """Seven pictures of two sizes with labels in run ids, one of them in a folder of its own."""
    random, found, labels = np.random.default_rng(0), [], {}
    for number, size in enumerate(SIZES):
        name = "street/5" if number == 5 else str(number)
        image, truth = tmp_path / "data" / f"{name}.png", tmp_path / "truth" / f"{name}.png"
        for path, shape, values in ((image, (*size, 3), range(256)), (truth, size, (0, 1, 2, IGNORE))):
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = random.choice(np.array(values, np.uint8), shape)[::4, ::4]
            Image.fromarray(coarse.repeat(4, 0).repeat(4, 1)).save(path)
        found.append(Picture(name, image))
        labels[name] = truth
    return PictureSet("town", tuple(found), 4, labels)


def unlabelled(pictures: PictureSet) -> PictureSet:
    return replace(pictures, labels={})


def naive(model: nn.Module, image: Tensor, name: str, config: LabelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Label and confidence [H, W] of one picture by loops, view by view, pixel by pixel."""
    model.eval()
    height, width = image.shape[-2:]
    views = draw_views(config.views, config.seed, name, (height, width))
    maps = []
    with torch.no_grad():
        for view in views:
            logits = model(look(image, [view]))
            maps.append(map_back((logits / config.temperature).softmax(1), [view])[0].numpy())
    best, sure = np.zeros((height, width), int), np.zeros((height, width), np.float32)
    for y in range(height):
        for x in range(width):
            for found in maps:
                for c in range(found.shape[0]):
                    if found[c, y, x] > sure[y, x]:
                        best[y, x], sure[y, x] = c, found[c, y, x]
    return best, sure


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def tree(folder: Path) -> dict[str, bytes]:
    """Every result below `folder`; journals hold the same lines in another order after a resumption."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------------------- the maps


def test_maximum_confidence_takes_the_surest_view_of_every_pixel() -> None:
    maps = torch.rand(4, 5, 6, 7).softmax(1)
    chosen = most_confident(maps)
    for y in range(6):
        for x in range(7):
            surest = max(range(4), key=lambda k: float(maps[k, :, y, x].max()))
            assert torch.equal(chosen[:, y, x], maps[surest, :, y, x])


def test_a_pixel_that_just_reaches_its_class_threshold_is_kept() -> None:
    sure = kept(torch.tensor([[0, 0, 1]]), torch.tensor([[0.6, 0.5999, 0.5]]), torch.tensor([0.6, 0.4]))
    assert sure.tolist() == [[True, False, True]]


def test_entropy_is_one_for_no_idea_and_zero_for_certainty() -> None:
    maps = torch.stack([torch.full((4,), 0.25), torch.tensor([0.0, 1.0, 0.0, 0.0])], dim=1)[..., None]
    assert entropy(maps).flatten().tolist() == pytest.approx([1, 0], abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_labels_are_those_of_a_naive_loop(pictures: PictureSet, tmp_path: Path, temperature: float) -> None:
    config = LabelConfig(
        views=4, rule="constant", threshold=0.7, temperature=temperature, confidence=True, batch=3, seed=5
    )
    model = Colours()
    label(model, unlabelled(pictures), TOWN, config, tmp_path / "out", CPU)
    for index, picture in enumerate(pictures.pictures):
        best, sure = naive(model, pictures.image(index), picture.name, config)
        written = read(tmp_path / "out" / "labels" / f"{picture.name}.png")
        clear = abs(sure - 0.7) > 1e-4
        assert np.array_equal(written[clear], np.where(sure >= 0.7, best, IGNORE)[clear])
        confidence = read(tmp_path / "out" / "confidence" / f"{picture.name}.png")
        assert np.abs(confidence.astype(int) - sure * 255).max() <= 0.51


def test_a_protocol_takes_the_place_of_views(pictures: PictureSet, tmp_path: Path) -> None:
    """Mean of the softmax over two scales and flips, of two fused outputs, instead of the surest of K views."""
    protocol = ProtocolConfig(scales=(1.0, 0.5), flips=True, fusion=(1.0, 0.5))
    config = LabelConfig(rule="constant", threshold=0.7, confidence=True, protocol=protocol, batch=3)
    model = TwoLevels().eval()
    label(model, unlabelled(pictures), TOWN, config, tmp_path / "out", CPU)
    for index, picture in enumerate(pictures.pictures):
        image, found = pictures.image(index)[None].float() / 255, []
        for scale in (1.0, 0.5):
            size = [round(side * scale) for side in image.shape[-2:]]
            small = nn.functional.interpolate(image, size, mode="bilinear", antialias=True) if scale != 1 else image
            for turned in (False, True):
                main, second = model.levels(small.flip(-1) if turned else small)
                fused = main + 0.5 * second
                fused = fused.flip(-1) if turned else fused
                found.append(nn.functional.interpolate(fused, image.shape[-2:], mode="bilinear").softmax(1))
        sure, best = (sum(found) / 4)[0].detach().max(0)
        clear = ((sure - 0.7).abs() > 1e-4).numpy()
        expected = best.masked_fill(sure < 0.7, IGNORE).numpy()
        assert np.array_equal(read(tmp_path / "out" / "labels" / f"{picture.name}.png")[clear], expected[clear])


def test_a_protocol_may_forbid_classes(pictures: PictureSet, tmp_path: Path) -> None:
    protocol = ProtocolConfig(subset=("road", "tree"), restrict=True)
    config = LabelConfig(rule="constant", threshold=0, protocol=protocol)
    predicted = label(Colours(), unlabelled(pictures), TOWN, config, tmp_path, CPU)["predicted"]
    assert [predicted[name] for name in ("sky", "snow")] == [0, 0]
    assert predicted["road"] + predicted["tree"] == 1


def test_a_protocol_has_no_temperature() -> None:
    with pytest.raises(ValidationError, match="`temperature` belongs to `views`"):
        LabelConfig.model_validate({"protocol": "seg_uncertainty", "temperature": 0.5})


def test_labels_can_be_read_as_pseudo_labels(pictures: PictureSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    label(Colours(), unlabelled(pictures), TOWN, LabelConfig(confidence=True), out, CPU)
    made = unlabelled(pictures).with_labels(out / "labels", out / "confidence")
    assert len(made) == len(pictures)
    for index, picture in enumerate(made.pictures):
        assert set(np.unique(made.label(index))) <= {0, 1, 2, IGNORE}
        assert np.array_equal(made.label(index), read(out / "labels" / f"{picture.name}.png"))
        assert made.label(index).shape == made.image(index).shape[1:]


# ---------------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9, 1.0])
def test_every_predicted_class_keeps_its_share(pictures: PictureSet, tmp_path: Path, keep: float) -> None:
    config = LabelConfig(rule="class", threshold=0.999, keep=keep)
    statistics = label(Colours(), unlabelled(pictures), TOWN, config, tmp_path / "out", CPU)
    predicted = [name for name, share in statistics["predicted"].items() if share]
    assert len(predicted) == PREDICTED
    assert all(statistics["kept"][name] >= keep for name in predicted)


def test_a_sure_class_is_held_to_the_common_threshold() -> None:
    counts = np.zeros((3, BINS), np.int64)
    counts[0, 900:] = 5
    counts[1, [100, 200, 300, 400]] = 1
    assert class_thresholds(counts, threshold=0.6, keep=0.5) == [0.6, 0.3, 0.6]
    assert class_thresholds(counts, threshold=0.6, keep=0.51) == [0.6, 0.2, 0.6]
    assert class_thresholds(counts, threshold=0.6, keep=1.0) == [0.6, 0.1, 0.6]


def test_histogram_counts_every_pixel_where_the_threshold_would_cut() -> None:
    edges = torch.arange(BINS) / BINS
    sure = torch.cat([torch.rand(500) / 2 + 0.5, edges[500:], torch.ones(1)])
    maps = torch.stack([sure, 1 - sure])[..., None]
    counts = histogram(maps, edges)
    assert int(counts.sum()) == len(sure)
    for edge in range(500, BINS):
        assert int(counts[0, edge:].sum()) == int((sure >= torch.tensor(edge / BINS)).sum())


def test_thresholds_come_from_the_sample_alone(pictures: PictureSet, tmp_path: Path) -> None:
    config = LabelConfig(threshold=1.0, keep=0.3, sample=1, views=2)
    few = label(Colours(), unlabelled(pictures), TOWN, config, tmp_path / "few", CPU)
    (index,) = pictures.fixed(1)
    alone = replace(unlabelled(pictures), pictures=pictures.pictures[index : index + 1])
    one = label(Colours(), alone, TOWN, config, tmp_path / "one", CPU)
    assert few["thresholds"] == one["thresholds"]


# ------------------------------------------------------------------------------------------- statistics, quality


def test_statistics_are_those_of_brute_force(pictures: PictureSet, tmp_path: Path) -> None:
    config, model, out = LabelConfig(rule="constant", threshold=0.7, views=2), Colours(), tmp_path / "out"
    statistics = label(model, unlabelled(pictures), TOWN, config, out, CPU)
    assert statistics == json.loads((out / "statistics.json").read_text())
    found = [naive(model, pictures.image(k), p.name, config) for k, p in enumerate(pictures.pictures)]
    best, sure = (np.concatenate([pair[k].ravel() for pair in found]) for k in range(2))
    for c, name in enumerate(TOWN.classes[:PREDICTED]):
        here = best == c
        assert here.any()
        assert statistics["predicted"][name] == pytest.approx(here.mean(), abs=1e-3)
        assert statistics["kept"][name] == pytest.approx((sure[here] >= 0.7).mean(), abs=1e-3)
        assert statistics["confidence"][name] == pytest.approx(sure[here].mean(), abs=1e-3)
    assert [statistics[key]["snow"] for key in ("predicted", "kept", "confidence")] == [0, None, None]
    assert statistics["kept_total"] == pytest.approx((sure >= 0.7).mean(), abs=1e-3)
    assert statistics["thresholds"] == dict.fromkeys(TOWN.classes, 0.7)
    assert statistics["pictures"] == len(pictures)
    assert statistics["quality"] is None


def test_quality_is_measured_on_what_survives(pictures: PictureSet, tmp_path: Path) -> None:
    config, model, out = LabelConfig(rule="constant", threshold=0.8, views=2), Colours(), tmp_path / "out"
    quality = label(model, unlabelled(pictures), TOWN, config, out, CPU, validation=pictures)["quality"]
    truth = np.concatenate([pictures.label(k).numpy().ravel() for k in range(len(pictures))])
    written = np.concatenate([read(out / "labels" / f"{p.name}.png").ravel() for p in pictures.pictures])
    known, both = truth != IGNORE, (truth != IGNORE) & (written != IGNORE)
    assert quality["coverage"] == pytest.approx(both.sum() / known.sum())
    assert quality["accuracy"] == pytest.approx((truth == written)[both].mean())
    ious = {}
    for c, name in enumerate(TOWN.classes[:PREDICTED]):
        union = (both & ((truth == c) | (written == c))).sum()
        ious[name] = (both & (truth == c) & (written == c)).sum() / union
    assert quality["iou"] == pytest.approx(ious | {"snow": None})
    assert quality["miou"] == pytest.approx(np.mean(list(ious.values())))
    assert 0 < quality["coverage"] < 1
    assert quality["accuracy_all"] != quality["accuracy"]


def test_nothing_kept_is_no_error(pictures: PictureSet, tmp_path: Path) -> None:
    config = LabelConfig(rule="constant", threshold=1.0, views=1, temperature=9.0)
    statistics = label(Colours(), unlabelled(pictures), TOWN, config, tmp_path / "out", CPU, validation=pictures)
    assert statistics["kept_total"] == 0
    assert statistics["quality"]["coverage"] == 0
    assert statistics["quality"]["miou"] is None
    assert 0 < statistics["quality"]["miou_all"] < 1


def test_previews_show_truth_only_where_it_is_known(pictures: PictureSet, tmp_path: Path) -> None:
    kinds = {"input", "label", "confidence", "entropy"}
    for validation, extra in ((None, set()), (pictures, {"truth"})):
        out = tmp_path / f"out{len(extra)}"
        label(Colours(), unlabelled(pictures), TOWN, LabelConfig(), out, CPU, validation=validation)
        for k, index in enumerate(pictures.fixed(6)):
            shown = {path.stem: path for path in (out / "preview" / str(k)).iterdir()}
            assert set(shown) == kinds | extra
            assert {read(path).shape for path in shown.values()} == {(*SIZES[index], 3)}
            label_of_it = read(out / "labels" / f"{pictures.pictures[index].name}.png")
            assert (label_of_it == IGNORE).any()
            assert np.array_equal(read(shown["label"]), TOWN.colourise(label_of_it))


# ------------------------------------------------------------------------------------------------------ resumption


@pytest.fixture
def config() -> LabelConfig:
    return LabelConfig(views=2, threshold=0.9, keep=0.4, confidence=True, batch=2)


def test_lost_files_are_made_again_and_nothing_else(pictures: PictureSet, tmp_path: Path, config: LabelConfig) -> None:
    out, model = tmp_path / "out", Company()
    first = label(model, unlabelled(pictures), TOWN, config, out, CPU, validation=pictures)
    whole, times = tree(out), {path: path.stat().st_mtime_ns for path in out.glob("labels/**/*.png")}
    (out / "statistics.json").unlink()
    for name in ("1", "6"):
        (out / "labels" / f"{name}.png").unlink()
    (out / "confidence" / "street" / "5.png").unlink()
    assert label(model, unlabelled(pictures), TOWN, config, out, CPU, validation=pictures) == first
    assert tree(out) == whole
    touched = {path.stem for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert touched == {"1", "5", "6"}


@pytest.mark.parametrize("stop", [0, 1, 5, 9, 16])
def test_a_stop_at_any_picture_changes_nothing(
    pictures: PictureSet, tmp_path: Path, config: LabelConfig, stop: int
) -> None:
    whole = label(Company(), unlabelled(pictures), TOWN, config, tmp_path / "whole", CPU, validation=pictures)

    def interrupt(done: int, total: int) -> None:
        if done > stop:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        label(Company(), unlabelled(pictures), TOWN, config, out, CPU, interrupt, validation=pictures)
    for path in out.glob("*.jsonl"):  # killed in the middle of a line
        with path.open("a") as file:
            file.write('{"name":"0","pred')
    assert label(Company(), unlabelled(pictures), TOWN, config, out, CPU, validation=pictures) == whole
    assert tree(out) == tree(tmp_path / "whole")


def test_finished_work_is_not_computed_again(pictures: PictureSet, tmp_path: Path, config: LabelConfig) -> None:
    label(Colours(), unlabelled(pictures), TOWN, config, tmp_path, CPU, validation=pictures)
    model, seen = Colours(), []
    label(model, unlabelled(pictures), TOWN, config, tmp_path, CPU, lambda *state: seen.append(state), 0, 1, pictures)
    assert model.views == 6 * config.views  # the preview
    assert seen[-1] == (21, 21)


def test_progress_counts_every_picture_once(pictures: PictureSet, tmp_path: Path, config: LabelConfig) -> None:
    seen: list[tuple[int, int]] = []
    label(Colours(), unlabelled(pictures), TOWN, config, tmp_path, CPU, lambda *state: seen.append(state))
    assert sorted({done for done, _ in seen}) == list(range(15))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {14}


def test_processes_share_the_work(
    pictures: PictureSet, tmp_path: Path, config: LabelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"batch": 1})  # batches of one: the same forward passes in one process and two
    alone = label(Colours(), unlabelled(pictures), TOWN, config, tmp_path / "one", CPU, validation=pictures)
    meeting = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(Work, "wait", lambda self: meeting.wait() if self.world > 1 else None)

    def run(rank: int) -> dict[str, object]:
        set_ = unlabelled(pictures)
        return label(models[rank], set_, TOWN, config, tmp_path / "two", CPU, None, rank, 2, pictures)

    models = [Colours(), Colours()]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [alone, alone]
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert [model.views for model in models] == [(4 * 3 + 6) * config.views, 3 * 3 * config.views]
    names = {line["name"] for line in Journal(tmp_path / "two", "pictures", 0).lines()}
    assert names == {picture.name for picture in pictures.pictures}


def test_memory_is_steady() -> None:
    made: list[int] = []
    items = (made.append(item) or item for item in range(100))
    for taken, value in enumerate(ahead(lambda item: item, items, depth=3), start=1):
        assert value == taken - 1
        assert len(made) - taken <= 3
    assert taken == 100


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_network_of_other_classes_is_refused(pictures: PictureSet, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="predicts 5 classes, but the label space 'town' has 4"):
        label(
            lambda image: image.new_zeros(len(image), 5, *image.shape[2:]), pictures, TOWN, LabelConfig(), tmp_path, CPU
        )


def test_a_broken_network_is_refused(pictures: PictureSet, tmp_path: Path) -> None:
    def broken(image: Tensor) -> Tensor:
        logits = image.new_zeros(len(image), 4, *image.shape[2:])
        logits[1 * 3 + 2, 0, 0, 0] = torch.nan  # third view of the second picture
        return logits

    with pytest.raises(RunError, match="1: the network's output is not finite"):
        label(broken, pictures, TOWN, LabelConfig(views=3), tmp_path, CPU)


def test_a_full_disk_is_said(pictures: PictureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"labels/0\.png: cannot be written \(No space left on device\)"):
        label(Colours(), unlabelled(pictures), TOWN, LabelConfig(rule="constant"), tmp_path / "out", CPU)
    assert not list((tmp_path / "out").rglob("*.png"))
