"""Mixing: picture and label agree, boxes have the areas of the formula, inputs stay, each seed rules one picture."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from udas.data import sampling
from udas.data.batch import IGNORE
from udas.data.masks import box_masks, classmix_masks, cutmix_boxes, cutout_masks, sized_boxes
from udas.data.mixing import jitter, paste, strong
from udas.data.sampling import seed_of
from udas.errors import ConfigError

seeds = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4)
sides = st.integers(1, 40)

OPERATIONS = {
    "jitter": lambda image, picture_seeds: jitter(image, picture_seeds, 0.5, 0.5, 0.5, 0.2),
    "strong": strong,
}


def many(count, purpose="test"):
    return [seed_of(purpose, number) for number in range(count)]


def noise(count=3, height=24, width=32):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(5))


@settings(max_examples=80, deadline=None)
@given(seeds, sides, sides)
def test_a_box_is_one_rectangle(picture_seeds, height, width):
    boxes = cutmix_boxes(picture_seeds, height, width)
    assert boxes.shape == (len(picture_seeds), 1, height, width)
    assert boxes.dtype == torch.bool
    for box in boxes[:, 0]:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns[None])
        for line in (rows, columns):
            assert line.int().diff().abs().sum() <= 2, "not one interval"


@settings(max_examples=60, deadline=None)
@given(seeds, sides, sides)
def test_pasted_pictures_and_labels_agree(picture_seeds, height, width):
    count = len(picture_seeds)
    label, other = torch.zeros(count, height, width).long(), torch.arange(1, height * width + 1).view(height, width)
    other = other.expand(count, -1, -1).contiguous()
    image, patch = (plane[:, None].expand(-1, 3, -1, -1).float().contiguous() for plane in (label, other))
    kept = [value.clone() for value in (image, patch, label, other)]
    boxes = cutmix_boxes(picture_seeds, height, width)
    mixed, mixed_label = paste(image, patch, boxes), paste(label, other, boxes)
    assert torch.equal(mixed[:, 0].long(), mixed_label)
    assert torch.equal(mixed_label != 0, boxes[:, 0])
    assert torch.equal(mixed_label[boxes[:, 0]], other[boxes[:, 0]])
    assert torch.equal(paste(label, other, boxes.squeeze(1)), mixed_label)
    for value, before in zip((image, patch, label, other), kept, strict=True):
        assert torch.equal(value, before), "an input was modified"
    mixed.fill_(-1)
    assert (image == 0).all(), "the result shares memory with its input"


def test_pictures_of_different_sizes_are_not_mixed():
    with pytest.raises(ConfigError, match=r"4 x 6 pixels cannot be mixed into 4 x 5.*augment\.crop"):
        paste(noise(1, 4, 5), noise(1, 4, 6), torch.ones(1, 1, 4, 5, dtype=torch.bool))


def labels_of(picture_seeds, classes, height=6, width=7):
    """Random labels of few classes, some of them void."""
    generator = torch.Generator().manual_seed(picture_seeds[0])
    labels = torch.randint(classes, (len(picture_seeds), height, width), generator=generator) * 3
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    return labels


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 12), st.booleans())
def test_classmix_takes_whole_classes_half_of_them_rounded_up(picture_seeds, classes, void):
    labels = labels_of(picture_seeds, classes)
    masks = classmix_masks(labels, picture_seeds, void)
    assert masks.shape == (len(labels), 1, *labels.shape[1:])
    assert masks.dtype == torch.bool
    for label, mask in zip(labels, masks[:, 0], strict=True):
        inside, outside = set(label[mask].tolist()), set(label[~mask].tolist())
        assert not inside & outside, "a class was cut"
        there = set(label.flatten().tolist()) - (set() if void else {IGNORE})
        assert inside <= there
        assert len(inside) == math.ceil(len(there) / 2)


def test_a_picture_without_classes_gives_nothing_and_one_class_everything():
    labels = torch.stack([torch.full((3, 4), IGNORE), torch.full((3, 4), 7)])
    assert classmix_masks(labels, many(2)).flatten(1).any(1).tolist() == [False, True]
    assert classmix_masks(labels, many(2), void=True).all()


def test_every_subset_of_classes_is_as_likely():
    labels = torch.arange(4).view(1, 1, 4).expand(3000, -1, -1).contiguous()
    drawn = classmix_masks(labels, many(3000)).flatten(1)
    _, counts = drawn.unique(dim=0, return_counts=True)
    assert len(counts) == 6  # of 4 over 2, each 500 times with a standard deviation of 20
    assert 400 < counts.min() <= counts.max() < 600


def test_classes_are_drawn_for_each_picture_from_its_own_seed():
    labels = torch.arange(12).view(1, 3, 4).repeat(5, 1, 1)
    masks = classmix_masks(labels, many(5))
    assert len(masks.flatten(1).unique(dim=0)) > 2, "one draw for the whole batch"
    labels[0] = IGNORE  # another picture of the batch plays no part
    assert torch.equal(classmix_masks(labels, many(5))[1:], masks[1:])
    assert torch.equal(classmix_masks(labels[3:4], many(5)[3:4]), masks[3:4])


def test_the_areas_of_boxes_follow_the_formula():
    boxes = cutmix_boxes(many(6000), 40, 60).float()
    # A side of share a around a uniform centre keeps a - a^2/4 of the axis on average; a^2 = 1 - lambda ~ U(0, 1), so
    # E[area] = int_0^1 (sqrt(u) - u/4)^2 du = 1/2 - 1/5 + 1/48.
    assert boxes.mean().item() == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.012)
    # Boxes that do not touch the border are not clipped: their sides show the same share of both axes.
    rows, columns = boxes.amax(3)[:, 0], boxes.amax(2)[:, 0]
    free = (rows[:, [0, -1]].sum(1) + columns[:, [0, -1]].sum(1)) == 0
    assert free.sum() > 500
    assert (rows.mean(1) - columns.mean(1))[free].abs().max() <= 1 / 40 + 1 / 60
    # The centre is uniform: every pixel's chance of being covered is symmetric, and largest in the middle.
    chance = boxes.mean((0, 1))
    assert (chance - chance.flip(0, 1)).abs().max() < 0.04
    assert chance[20, 30] > chance[0, 30] > chance[0, 0]


def test_the_unclipped_share_of_a_box_is_uniform():
    # Seen through its own definition: with the centre well inside and a small box, area = 1 - lambda exactly.
    boxes = cutmix_boxes(many(20000), 64, 64).float()
    rows, columns = boxes.amax(3)[:, 0], boxes.amax(2)[:, 0]
    free = (rows[:, [0, -1]].sum(1) + columns[:, [0, -1]].sum(1)) == 0
    area = boxes[free].mean((1, 2, 3))
    small, middle = ((area > 0.01) & (area <= 0.05)).sum(), ((area > 0.05) & (area <= 0.15)).sum()

    def expected(low, high):  # density of u = a^2 is 1, a free box has chance (1 - a)^2
        steps = torch.linspace(low, high, 1001)
        return ((1 - steps.sqrt()) ** 2).mean().item() * (high - low) * 20000

    assert small.item() == pytest.approx(expected(0.01, 0.05), rel=0.15)
    assert middle.item() == pytest.approx(expected(0.05, 0.15), rel=0.15)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_colours_stay_in_range_and_inputs_as_they_are(operation):
    image = noise(16)
    before = image.clone()
    changed = operation(image, many(16))
    assert changed.shape == image.shape
    assert changed.dtype == torch.float32
    assert 0 <= changed.min() <= changed.max() <= 1
    assert torch.equal(image, before)
    assert not torch.equal(changed, image)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_pictures_change_follows_from_its_own_seed(operation):
    image, picture_seeds = noise(6), many(6)
    together = operation(image, picture_seeds)
    assert torch.equal(together, operation(image, picture_seeds))
    alone = torch.cat([operation(image[k : k + 1], picture_seeds[k : k + 1]) for k in range(6)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    same = operation(image[:1].expand(6, -1, -1, -1), picture_seeds)
    assert len({tuple(picture.flatten()[:50].tolist()) for picture in same}) > 3


def test_boxes_follow_from_their_own_seed():
    boxes = cutmix_boxes(many(5), 20, 30)
    assert torch.equal(boxes[2:3], cutmix_boxes(many(5)[2:3], 20, 30))
    assert torch.equal(boxes, cutmix_boxes(many(5), 20, 30, torch.device("cpu")))


@pytest.mark.parametrize(
    ("name", "neutral", "spread"),
    [("brightness", 1, 0.6), ("contrast", 1, 0.6), ("saturation", 1, 0.6), ("hue", 0, 0.3)],
)
def test_jitter_is_torchvisions_with_a_factor_per_picture(name, neutral, spread):
    image = noise(30, 10, 12)
    strengths = {key: spread if key == name else 0.0 for key in ("brightness", "contrast", "saturation", "hue")}
    changed = jitter(image, many(30), **strengths)
    tried = torch.linspace(neutral - spread, neutral + spread, 121).tolist()
    table = torch.stack([getattr(F, f"adjust_{name}")(image, factor) for factor in tried])
    errors = (table - changed).abs().amax((2, 3, 4))
    assert errors.amin(0).max() < 0.02, "no factor of the range explains the picture"
    factors = torch.tensor(tried)[errors.argmin(0)]
    assert factors.min() < neutral - 0.75 * spread
    assert factors.max() > neutral + 0.75 * spread
    assert factors.mean() == pytest.approx(neutral, abs=0.35 * spread)


def test_jitter_is_its_four_changes_in_order():
    image = noise(30)
    expected = image
    for only in torch.eye(4):
        expected = jitter(expected, many(30), *(only * torch.tensor([0.5, 0.5, 0.5, 0.2])).tolist())
    torch.testing.assert_close(jitter(image, many(30), 0.5, 0.5, 0.5, 0.2), expected, rtol=0, atol=1e-5)


def test_the_factors_of_jitter_are_drawn_apart():
    tinted = 0.4 + 0.2 * noise(1).expand(1000, -1, -1, -1) * torch.tensor([1.0, 0.9, 0.6]).view(3, 1, 1)
    brighter, harder, gaudier, turned = (
        jitter(tinted, many(1000), *(only * torch.tensor([0.3, 0.3, 0.3, 0.05])).tolist()) for only in torch.eye(4)
    )
    measures = [
        brighter.mean((1, 2, 3)),
        harder.mean(1).std((1, 2)),
        (gaudier.amax(1) - gaudier.amin(1)).mean((1, 2)),
        (turned[:, 1] - turned[:, 2]).mean((1, 2)),
    ]
    assert (torch.corrcoef(torch.stack(measures)) - torch.eye(4)).abs().max() < 4 / math.sqrt(1000)


def test_a_strength_of_zero_changes_nothing():
    assert torch.equal(jitter(noise(), many(3), 0, 0, 0, 0), noise())
    assert torch.equal(strong(noise(), many(3), jittered=0, grey=0, blurred=0), noise())


def test_a_factor_is_never_negative():
    image = noise(40)
    assert (jitter(image, many(40), 1.5, 0, 0, 0).amax((1, 2, 3)) > 0).all()


def test_strong_steps_come_with_their_probabilities():
    image, count = noise(1, 8, 8).expand(600, -1, -1, -1), 600
    grey = strong(image, many(count), jittered=0, grey=0.2, blurred=0)
    assert 80 < (grey == grey[:, :1]).all(3).all(2).all(1).sum() < 160  # 120 expected, standard deviation 10
    blurred = strong(image, many(count), jittered=0, grey=0, blurred=0.5)
    assert 250 < (blurred != image).any(3).any(2).any(1).sum() < 350
    jittered = strong(image, many(count), jittered=0.8, grey=0, blurred=0)
    both = strong(image, many(count), jittered=0.5, grey=0.5, blurred=0)
    only_grey = strong(image, many(count), jittered=0, grey=1, blurred=0)
    assert 110 < (both == only_grey).all(3).all(2).all(1).sum() < 190, "the steps are not independent"
    assert 440 < (jittered != image).any(3).any(2).any(1).sum() < 520


@pytest.mark.parametrize("pair", combinations(("jittered", "grey", "blurred"), 2))
def test_strong_steps_are_independent(pair):
    image = noise(1, 8, 8).expand(600, -1, -1, -1)
    changed = strong(image, many(600), **{"jittered": 0, "grey": 0, "blurred": 0} | dict.fromkeys(pair, 0.5))
    assert 110 < (changed == image).flatten(1).all(1).sum() < 190  # 150 expected, standard deviation 11


def test_strong_is_jitter_and_then_grey():
    image, strengths = noise(8), (0.3, 0.4, 0.5, 0.1)
    coloured = jitter(image, many(8), *strengths)
    torch.testing.assert_close(strong(image, many(8), *strengths, jittered=1, grey=0, blurred=0), coloured)
    grey = F.rgb_to_grayscale(coloured, num_output_channels=3)
    found = strong(image, many(8), *strengths, jittered=1, grey=1, blurred=0)
    torch.testing.assert_close(found, grey, rtol=0, atol=1e-3)  # torchvision's luma has four digits


def test_grey_weighs_the_channels_as_luma():
    image = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 4, 4)
    grey = strong(image, many(3), jittered=0, grey=1, blurred=0)
    torch.testing.assert_close(grey[:, :, 0, 0], torch.tensor([[0.299], [0.587], [0.114]]).expand(3, 3))


def test_blur_is_gaussian_with_a_sigma_per_picture():
    point = torch.zeros(200, 3, 31, 31)
    point[:, :, 15, 15] = 1
    blurred = strong(point, many(200), jittered=0, grey=0, blurred=1)
    torch.testing.assert_close(blurred.sum((2, 3)), torch.ones(200, 3))
    distance = (torch.arange(31) - 15.0) ** 2
    sigma = (blurred[:, 0].sum(1) * distance).sum(1).sqrt()
    assert 1.9 < sigma.max() < 2.0
    assert sigma.min() < 0.2
    wide = blurred[sigma.argmax(), 0]
    expected = torch.exp(-torch.tensor([1, 4, 9, 16]) / (2 * sigma.max() ** 2))
    torch.testing.assert_close(wide[15, 16:20] / wide[15, 15], expected, rtol=0.05, atol=0)
    flat = torch.full((4, 3, 5, 6), 0.3)
    torch.testing.assert_close(strong(flat, many(4), jittered=0, grey=0, blurred=1), flat)


def test_the_range_of_the_blur_can_be_chosen():
    point = torch.zeros(100, 3, 31, 31)
    point[:, :, 15, 15] = 1
    blurred = strong(point, many(100), jittered=0, grey=0, blurred=1, sigma=(1.0, 1.5))
    sigma = (blurred[:, 0].sum(1) * (torch.arange(31) - 15.0) ** 2).sum(1).sqrt()
    assert 0.98 < sigma.min() < 1.05
    assert 1.44 < sigma.max() < 1.5


def test_autocast_does_not_lower_the_precision():
    with torch.autocast("cpu", torch.bfloat16):
        inside = strong(noise(), many(3), blurred=1)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, strong(noise(), many(3), blurred=1))


def test_the_uses_of_a_seed_are_independent():
    picture_seeds = many(2000)
    area = cutmix_boxes(picture_seeds, 20, 20).float().mean((1, 2, 3))
    flat = torch.full((2000, 3, 1, 1), 0.5)
    brightness = jitter(flat, picture_seeds, 0.5, 0, 0, 0)[:, 0, 0, 0]
    assert abs(torch.corrcoef(torch.stack([area, brightness]))[0, 1].item()) < 4 / math.sqrt(2000)


def test_each_use_of_a_seed_has_its_own_purpose(monkeypatch):
    def uniform_rows(seeds, purpose, *rest):
        asked.append(purpose)
        return original(seeds, purpose, *rest)

    asked, original = [], sampling.uniform_rows
    monkeypatch.setattr(sampling, "uniform_rows", uniform_rows)
    for boxes in (cutmix_boxes, box_masks, sized_boxes, lambda *size: cutout_masks(*size, 0.5)):
        boxes(many(2), 8, 8)
    strong(noise(2), many(2))
    assert len(set(asked)) == len(asked) == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_the_device_draws_the_same():
    cuda = torch.device("cuda")
    assert torch.equal(cutmix_boxes(many(8), 40, 50, cuda).cpu(), cutmix_boxes(many(8), 40, 50))
    labels = labels_of(many(8), 9)
    assert torch.equal(classmix_masks(labels.to(cuda), many(8)).cpu(), classmix_masks(labels, many(8)))
    for operation in OPERATIONS.values():
        here, there = operation(noise(8), many(8)), operation(noise(8).to(cuda), many(8)).cpu()
        torch.testing.assert_close(here, there, rtol=0, atol=1e-4)
