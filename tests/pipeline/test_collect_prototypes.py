"""Collecting prototypes: the mean of the pictures' means, one sample whoever draws it, a plot."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tiny_run import make_world, same_tensors, streams, street, tensors_below
from udas.data.batch import Stream
from udas.errors import ConfigError, RunError, WeightsError
from udas.networks.segmenters import Outputs
from udas.pipeline import prototypes as module
from udas.pipeline.prototypes import PrototypesConfig, collect_prototypes, load_prototypes
from udas.reporting.scatter import choose, scatter
from udas.validation import validate

CPU = torch.device("cpu")
CLASSES = len(street().classes)
SIDE = 16  # of the stub's features


class Stub:
    """Features: mean colours of 4 x 4 pixels. Classes: 1 for bright blue, 9 for red, 7 for the rest; 4 at one place."""

    def __init__(self, classes=CLASSES, broken=False):
        self.classes, self.broken = classes, broken

    def outputs(self, image):
        features = torch.nn.functional.avg_pool2d(image, 4)
        red, _, blue = features.unbind(1)
        chosen = torch.where(blue > red + 0.1, 1, torch.where(red > blue + 0.1, 9, 7))
        chosen[:, 0, 0] = 4
        logits = torch.nn.functional.one_hot(chosen, CLASSES).movedim(3, 1).float()[:, : self.classes]
        logits = logits.repeat_interleave(4, 2).repeat_interleave(4, 3)
        return Outputs((logits, logits.flip(1)), features * torch.nan if self.broken else features)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return streams(make_world(tmp_path_factory.mktemp("world")))[Stream.UNLABELLED]


def collect(pictures, folder, model=None, rank=0, world=1, progress=None, **settings):
    config = validate(PrototypesConfig, settings, "test")
    return collect_prototypes(model or Stub(), pictures, street(), config, folder, CPU, progress, rank, world)


def seen(pictures):
    """(features [N, D], classes [N]) of every picture."""
    for index in range(len(pictures)):
        outputs = Stub().outputs(pictures.image(index)[None].float() / 255)
        yield outputs.representation[0].flatten(1).T, outputs.levels[0][0, :, 1::4, 1::4].argmax(0).flatten()


def test_prototypes_are_means_of_the_pictures_means(pictures, tmp_path):
    told = []
    statistics = collect(pictures, tmp_path, minimum=10, progress=lambda *place: told.append(place))
    means = {k: [] for k in range(CLASSES)}
    for features, label in seen(pictures):
        for k in range(CLASSES):
            if (label == k).sum() >= 10:
                means[k].append(features[label == k].mean(0))
    assert {1, 7, 9} <= {k for k in means if means[k]}
    assert not means[4], "one pixel is too few"
    vectors, count = load_prototypes(tmp_path), load_file(tmp_path / "prototypes.safetensors")["count"]
    for k, parts in means.items():
        expected = torch.stack(parts).mean(0) if parts else torch.zeros(3)
        torch.testing.assert_close(vectors[k], expected, atol=1e-5, rtol=1e-5)
        assert count[k] == len(parts)
    assert told == [(k, 6) for k in range(1, 7)]
    assert statistics == json.loads((tmp_path / "statistics.json").read_text())
    assert statistics["pictures"] == 6
    assert statistics["count"] == dict(zip(street().classes, count.tolist(), strict=True))
    assert Image.open(tmp_path / "scatter.png").size == (960, 720)


def test_one_pixel_is_enough_where_the_minimum_says_so(pictures, tmp_path):
    collect(pictures, tmp_path, minimum=1)
    assert load_file(tmp_path / "prototypes.safetensors")["count"][4] == 6


def test_the_sample_is_small_true_and_repeatable(pictures, tmp_path):
    for name in ("one", "two"):
        collect(pictures, tmp_path / name, sample=5)
    collect(pictures, tmp_path / "other", sample=5, seed=1)
    sample, other = (load_file(tmp_path / name / "features.safetensors") for name in ("one", "other"))
    assert same_tensors(tensors_below(tmp_path / "one"), tensors_below(tmp_path / "two"))
    assert not torch.equal(sample["features"], other["features"])
    assert torch.bincount(sample["label"], minlength=CLASSES).max() == 5
    assert (sample["label"] == 4).sum() == 5, "rare pixels are kept, too"
    all_seen = [torch.cat(parts) for parts in zip(*seen(pictures), strict=True)]
    there = {(k, tuple(f)) for f, k in zip(*(part.tolist() for part in all_seen), strict=True)}
    found = list(zip(sample["label"].tolist(), map(tuple, sample["features"].tolist()), strict=True))
    assert set(found) <= there


def test_every_pixel_is_as_likely(pictures, tmp_path):
    """With a sample larger than the class, all of it is there."""
    collect(pictures, tmp_path, sample=10**6)
    sample = load_file(tmp_path / "features.safetensors")
    assert len(sample["label"]) == len(pictures) * SIDE**2


def test_two_processes_collect_what_one_does(pictures, tmp_path, monkeypatch):
    collect(pictures, tmp_path / "one", sample=7)
    meeting = threading.Barrier(2)
    monkeypatch.setattr(module.dist, "barrier", lambda: meeting.wait(timeout=60))
    results = {}

    def work(rank):
        results[rank] = collect(pictures, tmp_path / "two", rank=rank, world=2, sample=7)

    other = threading.Thread(target=work, args=(1,))
    other.start()
    work(0)
    other.join()
    assert results[0] == results[1]
    alone, shared = tensors_below(tmp_path / "one"), tensors_below(tmp_path / "two")
    assert alone.keys() == shared.keys(), "the parts are gone"
    for key, value in alone.items():
        torch.testing.assert_close(shared[key], value, msg=key)
    assert not list((tmp_path / "two").glob("part*"))


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        (Stub(classes=3), {}, RunError, "predicts 3 classes, but the label space has 11"),
        (Stub(broken=True), {}, RunError, r"0: the network's features are not finite"),
        (Stub(), {"classes": ["roud"]}, ConfigError, "no class 'roud'.*road"),
        (Stub(), {"projection": "tsne"}, ConfigError, "tsne needs scikit-learn; pip install scikit-learn"),
    ],
)
def test_what_cannot_be_collected(pictures, tmp_path, monkeypatch, model, settings, error, message):
    monkeypatch.setattr("udas.reporting.scatter.find_spec", lambda name: None)
    with pytest.raises(error, match=message):
        collect(pictures, tmp_path, model, **settings)
    assert not list(tmp_path.iterdir())


def test_prototypes_that_cannot_be_read(tmp_path):
    with pytest.raises(WeightsError, match="not a readable file of prototypes"):
        load_prototypes(tmp_path)
    Path(tmp_path / "prototypes.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="not a readable file of prototypes"):
        load_prototypes(tmp_path)


# ------------------------------------------------------------------------------------------------------- the plot


def test_auto_takes_what_is_installed(monkeypatch):
    monkeypatch.setattr("udas.reporting.scatter.find_spec", lambda name: object() if name == "umap" else None)
    assert choose("auto") == "umap"
    monkeypatch.setattr("udas.reporting.scatter.find_spec", lambda name: None)
    assert choose("auto") == choose("pca") == "pca"


def test_the_plot_shows_the_chosen_classes_in_their_colours(tmp_path):
    random = torch.Generator().manual_seed(0)
    label = torch.arange(300) % 3
    features = torch.randn(300, 8, generator=random) + 20 * torch.nn.functional.one_hot(label, 8)
    vectors = torch.zeros(CLASSES, 8)
    vectors[:2] = 20 * torch.eye(8)[:2]
    drawn = {}
    for shown in ([0, 1], [2], []):
        path = tmp_path / "plot.png"
        path.write_bytes(scatter(features, label, vectors, street(), shown, "pca"))
        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        drawn[tuple(shown)] = {k for k in range(3) if (pixels == street().colours[k]).all(1).sum() > 60}
    assert drawn == {(0, 1): {0, 1}, (2,): set(), (): set()}  # dots are translucent; only prototypes have pure colours
