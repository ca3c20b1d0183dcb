"""Weak augmentation: picture, label and confidence share one geometry; colours follow torchvision's definitions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from udas.config import AugmentConfig
from udas.data.batch import IGNORE
from udas.data.transforms import _recolour, augment

STILL = {"scale": (1, 1), "flip": False, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
PALETTE = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [40, 40, 40]], dtype=torch.uint8)

seeds = st.integers(0, 2**63 - 1)
sizes = st.tuples(st.integers(16, 60), st.integers(16, 60))


def settled(**changes):
    return AugmentConfig(**(STILL | changes))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(height, width, channels=3, seed=0):
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator(seed))


def regions(height, width, seed):
    """A label of four large regions with slanted borders, and the picture in its colours (colour 4 is the padding)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    label = np.zeros((height, width), np.uint8)
    for bit in (1, 2):
        angle, place = rng.uniform(0, np.pi), rng.uniform(0.3, 0.7, 2) * (height, width)
        beyond = (y - place[0]) * np.sin(angle) + (x - place[1]) * np.cos(angle) > 0
        label += beyond.astype(np.uint8) * np.uint8(bit)
    return PALETTE[label.astype(int)].permute(2, 0, 1).contiguous(), torch.from_numpy(label)


def away_from_edges(label, margin=3):
    """Where a label is constant within `margin` pixels, the picture's border included."""
    planes = label.float()[None, None]
    padded = torch.nn.functional.pad(planes, [margin] * 4, value=-1)
    high = torch.nn.functional.max_pool2d(padded, 2 * margin + 1, 1)
    low = -torch.nn.functional.max_pool2d(-padded, 2 * margin + 1, 1)
    return (high == low)[0, 0]


@settings(max_examples=80, deadline=None)
@given(seeds, st.floats(0.4, 2.5), st.floats(0.4, 2.5), st.none() | st.tuples(st.integers(20, 90), st.integers(20, 90)))
def test_picture_and_label_move_together(seed, low, high, crop):
    image, label = regions(70, 80, seed)
    config = settled(scale=sorted((low, high)), crop=crop, flip=True)
    image, moved, confidence = augment(image, label, label * 60, config, generator(seed))
    distance = (image[None] - PALETTE[:, :, None, None] / 255).abs().sum(1)
    black = image.sum(0) == 0
    shown = torch.where(black, IGNORE, distance.argmin(0).to(torch.uint8))
    safe = away_from_edges(moved)
    assert torch.equal(shown[safe], moved[safe])
    assert torch.equal(confidence, torch.where(moved == IGNORE, 0, moved * 60))


@pytest.mark.parametrize("zoom", [0.7, 0.77, 1.3, 1.9, 2.6])
@pytest.mark.parametrize("seed", range(4))
def test_the_geometry_agrees_to_a_fraction_of_a_pixel(zoom, seed):
    ramp = torch.arange(240, dtype=torch.uint8).expand(240, 240)
    for plane in (ramp, ramp.T):
        picture = plane.expand(3, -1, -1).contiguous()
        config = settled(scale=(zoom, zoom), crop=(60, 60), flip=True)
        image, label, _ = augment(picture, plane.contiguous(), None, config, generator(seed))
        difference = (label - image[0] * 255)[8:-8, 8:-8]
        assert difference.abs().max() < 1.05  # half a source pixel, and the rounding of the picture to whole values
        assert difference.mean().abs() < 0.15


def test_without_changes_the_picture_stays_as_it_is():
    image, label, confidence = noise(13, 17), noise(13, 17, 1)[0], noise(13, 17, 1, seed=1)[0]
    result = augment(image, label, confidence, settled(), generator())
    assert torch.equal(result[0], image / 255)
    assert torch.equal(result[1], label)
    assert torch.equal(result[2], confidence)
    assert [value.dtype for value in result] == [torch.float32, torch.uint8, torch.uint8]


def test_without_label_there_is_none():
    assert augment(noise(8, 8), None, None, AugmentConfig(), generator())[1:] == (None, None)


@settings(max_examples=80, deadline=None)
@given(seeds, sizes, st.none() | sizes, st.floats(0.25, 4), st.floats(0.25, 4))
def test_sizes_ranges_and_inputs(seed, size, crop, low, high):
    image, label = noise(*size, seed=seed), torch.zeros(size, dtype=torch.uint8)
    before = image.clone()
    config = AugmentConfig(scale=sorted((low, high)), crop=crop, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.4)
    picture, moved, _ = augment(image, label, None, config, generator(seed))
    assert picture.shape == (3, *(crop or size))
    assert moved.shape == (crop or size)
    assert 0 <= picture.min() <= picture.max() <= 1
    assert (picture[:, moved == IGNORE] == 0).all()
    assert (moved == 0).any(), "nothing of the picture is left"
    assert torch.equal(image, before)
    assert not label.any()
    again = augment(image, label, None, config, generator(seed))
    assert torch.equal(picture, again[0])
    assert torch.equal(moved, again[1])


def test_a_crop_larger_than_the_picture_pads():
    image, label = noise(10, 12) | 1, torch.zeros(10, 12, dtype=torch.uint8)
    picture, moved, confidence = augment(image, label, label + 9, settled(crop=(16, 20)), generator(4))
    rows, columns = (moved == 0).any(1).nonzero().flatten(), (moved == 0).any(0).nonzero().flatten()
    inside = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert torch.equal(picture[:, inside[0], inside[1]], image / 255)
    assert (moved == IGNORE).sum() == 16 * 20 - 10 * 12
    assert (confidence == 9).sum() == 10 * 12
    assert confidence[moved == IGNORE].sum() == 0


def test_zooming_out_pads_and_keeps_the_size():
    label = torch.zeros(40, 60, dtype=torch.uint8)
    picture, moved, _ = augment(noise(40, 60), label, None, settled(scale=(0.5, 0.5)), generator())
    assert picture.shape == (3, 40, 60)
    assert (moved == 0).sum() == 20 * 30


def test_zooming_in_enlarges_every_pixel():
    label = noise(20, 20, 1)[0] // 2
    moved = augment(noise(20, 20), label, None, settled(scale=(2, 2)), generator(1))[1]
    assert moved.shape == (20, 20)
    assert torch.equal(moved[::2, ::2], moved[1::2, 1::2])
    assert (label.unfold(0, 10, 1).unfold(1, 10, 1) == moved[::2, ::2]).all(-1).all(-1).any()


def test_zooming_out_averages_instead_of_skipping():
    stripes = ((torch.arange(64) + 1) // 2 % 2 * 255).to(torch.uint8).expand(3, 64, -1).contiguous()
    picture = augment(stripes, None, None, settled(scale=(0.25, 0.25), crop=(16, 16)), generator())[0]
    assert (picture[:, :, 2:-2] - 0.5).abs().max() < 0.1


@pytest.mark.parametrize(("length", "crop", "places"), [(8, 5, 4), (5, 8, 4)])
def test_the_crops_place_is_uniform_up_to_the_borders(length, crop, places):
    image = torch.arange(1, length + 1, dtype=torch.uint8).repeat(3, 1, 1)
    config = settled(crop=(1, crop))
    firsts = Counter(
        tuple((augment(image, None, None, config, generator(seed))[0][0, 0] * 255).round().int().tolist())
        for seed in range(400)
    )
    assert len(firsts) == places
    assert all(65 < count < 140 for count in firsts.values())  # 100 expected, standard deviation 9


def test_half_of_the_pictures_are_mirrored():
    image, label = noise(6, 9), noise(6, 9, 1)[0]
    results = [augment(image, label, None, settled(flip=True), generator(seed)) for seed in range(1500)]
    mirrored = [torch.equal(moved, label.flip(-1)) for _, moved, _ in results]
    for (picture, _, _), flipped in zip(results, mirrored, strict=True):
        assert torch.equal(picture, (image.flip(-1) if flipped else image) / 255)
    assert 675 < sum(mirrored) < 825  # 750 expected, standard deviation 19


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colours_follow_torchvision(name):
    image, adjust = noise(8, 12), getattr(F, f"adjust_{name}")
    neutral, spread = (0.0, 0.3) if name == "hue" else (1.0, 0.6)
    factors = []
    for seed in range(40):
        changed = augment(image, None, None, settled(**{name: spread}), generator(seed))[0]
        tried = torch.linspace(neutral - spread, neutral + spread, 121).tolist()
        errors = [(adjust(image / 255, factor) - changed).abs().max().item() for factor in tried]
        factors.append(tried[int(np.argmin(errors))])
        assert min(errors) < 0.02, "no factor of the range explains the picture"
    assert min(factors) < neutral - 0.8 * spread
    assert max(factors) > neutral + 0.8 * spread


def test_colours_change_one_after_the_other():
    image, draws = noise(8, 12) / 255, [0.9, 0.8, 0.9, 0.7]
    strengths = {"brightness": 0.6, "contrast": 0.6, "saturation": 0.9, "hue": 0.2}
    expected = image
    for name, strength in strengths.items():
        expected = _recolour(expected, settled(**{name: strength}), draws)
    torch.testing.assert_close(_recolour(image, settled(**strengths), draws), expected)


def uncorrelated(*measures):
    """Whether no two of the lists have more in common than chance gives independent ones."""
    count = len(measures[0])
    found = torch.corrcoef(torch.tensor(measures, dtype=torch.float64))
    return (found - torch.eye(len(measures))).abs().max() < 4 / count**0.5


def test_zoom_place_and_mirror_are_drawn_apart():
    y, x = torch.meshgrid(torch.arange(60), torch.arange(60), indexing="ij")
    image, config = torch.stack([x, y, x]).to(torch.uint8), settled(scale=(0.8, 1.25), crop=(20, 20), flip=True)
    crops = [augment(image, None, None, config, generator(seed))[0] for seed in range(800)]
    assert uncorrelated(
        [crop[0].mean().item() for crop in crops],
        [crop[1].mean().item() for crop in crops],
        [(crop[1].max() - crop[1].min()).item() for crop in crops],
        [float(crop[0, 0, 0] < crop[0, 0, -1]) for crop in crops],
    )


def test_the_factors_of_the_colours_are_drawn_apart():
    tinted = (102 + 0.2 * noise(8, 12) * torch.tensor([1.0, 0.9, 0.6]).view(3, 1, 1)).to(torch.uint8)
    strengths = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05}
    bright, hard, gaudy, turned = (
        [augment(tinted, None, None, settled(**{name: strength}), generator(seed))[0] for seed in range(800)]
        for name, strength in strengths.items()
    )
    assert uncorrelated(
        [picture.mean().item() for picture in bright],
        [picture.mean(0).std().item() for picture in hard],
        [(picture.amax(0) - picture.amin(0)).mean().item() for picture in gaudy],
        [(picture[1] - picture[2]).mean().item() for picture in turned],
    )


def test_colours_change_before_the_padding():
    bright = torch.full((3, 10, 10), 200, dtype=torch.uint8)
    config = settled(contrast=0.9, crop=(40, 40))
    picture = augment(bright, torch.zeros(10, 10, dtype=torch.uint8), None, config, generator(3))[0]
    assert torch.unique((picture * 255).round()).tolist() == [0, 200], "the mean of a flat picture is its value"


def test_values_do_not_depend_on_the_number_of_threads():
    image, label = noise(700, 900), noise(700, 900, 1)[0]
    config = AugmentConfig(scale=(0.9, 1.3), crop=(640, 800), brightness=0.4, contrast=0.4, saturation=0.4)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append([augment(image, label, None, config, generator(seed)) for seed in range(4)])
    finally:
        torch.set_num_threads(threads)
    for (one, label_one, _), (many, label_many, _) in zip(*results, strict=True):
        assert torch.equal(one, many)
        assert torch.equal(label_one, label_many)
