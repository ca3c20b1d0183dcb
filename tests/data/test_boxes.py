"""Boxes of published shapes, partners in a batch, what is inside a picture, and channels dropped by seeds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from udas.config import AugmentConfig
from udas.data.batch import IGNORE
from udas.data.masks import box_masks, cutmix_boxes, cutout_masks, sized_boxes
from udas.data.mixing import channel_dropout, inside_picture, partners
from udas.data.sampling import seed_of
from udas.data.transforms import augment
from udas.errors import ConfigError

GENERATORS = {"box_masks": box_masks, "sized_boxes": sized_boxes}
both = pytest.mark.parametrize("boxes", GENERATORS.values(), ids=GENERATORS)


def many(count):
    return [seed_of("test", number) for number in range(count)]


def sides(boxes):
    """Height and width of each box, as shares of the picture's."""
    return boxes.any(3)[:, 0].float().mean(1), boxes.any(2)[:, 0].float().mean(1)


@both
def test_each_box_is_one_rectangle_of_its_own_seed(boxes):
    found = boxes(many(50), 30, 40)
    assert found.shape == (50, 1, 30, 40)
    assert found.dtype == torch.bool
    for box in found[:, 0]:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns[None])
        assert all(line.int().diff().abs().sum() <= 2 for line in (rows, columns))
    assert torch.equal(boxes(many(50)[7:9], 30, 40), found[7:9])
    assert len({tuple(box.flatten().tolist()) for box in found}) > 45


@both
def test_the_place_is_uniform_over_all_that_fit(boxes):
    found = boxes(many(6000), 40, 60)
    for axis, length in ((3, 40), (2, 60)):
        line = found.any(axis)[:, 0]
        start, free = line.int().argmax(1), length - line.sum(1)
        place = start[free > 10] / free[free > 10]
        assert place.min() < 0.05
        assert place.max() > 0.95
        assert place.mean().item() == pytest.approx(0.5, abs=0.02)
        assert place.std().item() == pytest.approx(12**-0.5, abs=0.02)


@pytest.mark.parametrize("boxes", [*GENERATORS.values(), cutmix_boxes, lambda *size: cutout_masks(*size, 0.3)[:, None]])
def test_rows_and_columns_are_drawn_apart(boxes):
    found = boxes(many(2000), 40, 60)[:, 0].float()
    lines = found.amax(2), found.amax(1)
    centres = [(line * torch.arange(line.shape[1])).sum(1) / line.sum(1).clamp(min=1) for line in lines]
    assert abs(torch.corrcoef(torch.stack(centres))[0, 1].item()) < 4 / 2000**0.5


def test_squares_are_shares_of_the_shorter_side():
    for height, width in ((80, 40), (40, 80)):
        masks = cutout_masks(many(200), height, width, 0.25)
        assert (masks.any(2).sum(1).max(), masks.any(1).sum(1).max()) == (10, 10)


def test_masks_cover_the_share_whatever_their_shape():
    found = box_masks(many(1500), 100, 100)
    assert found.float().mean((1, 2, 3)).sub(0.5).abs().max() < 0.02
    tall, wide = sides(found)
    shape = tall.log() / torch.tensor(0.5).log()  # u ~ U(0, 1)
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(shape.quantile(quartiles), quartiles, atol=0.04, rtol=0)
    assert tall.min() < 0.52
    assert wide.min() < 0.52


def test_the_share_of_masks_can_be_drawn():
    area = box_masks(many(1500), 80, 80, (0.0, 1.0)).float().mean((1, 2, 3))
    assert area.mean().item() == pytest.approx(0.5, abs=0.02)
    assert area.std().item() == pytest.approx(12**-0.5, abs=0.02)
    assert box_masks(many(50), 64, 64, 1.0).all()


def test_sized_boxes_keep_their_ranges():
    found = sized_boxes(many(1500), 120, 120)
    area, (tall, wide) = found.float().mean((1, 2, 3)), sides(found)
    assert 0.018 < area.min() < 0.03
    assert 0.38 < area.max() < 0.41
    assert area.mean().item() == pytest.approx(0.21, abs=0.01)
    assert 0.27 < (tall / wide).min() < 0.35
    assert 3.0 < (tall / wide).max() < 3.6
    assert (tall / wide)[area < 0.25].median().item() == pytest.approx((0.3 + 1 / 0.3) / 2, abs=0.15)


def test_large_sized_boxes_have_shapes_that_fit():
    area = sized_boxes(many(500), 100, 100, (0.6, 0.9)).float().mean((1, 2, 3))
    assert 0.58 < area.min() < area.max() < 0.92


def test_sized_boxes_come_with_their_probability():
    some, always = (sized_boxes(many(2000), 20, 20, probability=p) for p in (0.5, 1.0))
    there = some.flatten(1).any(1)
    assert 920 < there.sum() < 1080  # standard deviation 22
    assert torch.equal(some[there], always[there])
    assert not sized_boxes(many(9), 20, 20, probability=0.0).any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=8))
def test_a_picture_is_never_mixed_with_itself_while_there_is_another(names):
    found = partners(names).tolist()
    for place, other in enumerate(found):
        assert other != place
        assert names[other] != names[place] or len(set(names)) == 1


def test_the_partner_is_the_next_picture():
    assert partners("abcd").tolist() == [1, 2, 3, 0]
    assert partners("aab").tolist() == [2, 2, 0]
    with pytest.raises(ConfigError, match=r"batch of one.*training\.batch"):
        partners("a")


@pytest.mark.parametrize("zoom", [0.5, 0.8, 1.0, 1.7])
def test_what_is_inside_a_picture_is_what_has_a_label(zoom):
    generator = torch.Generator().manual_seed(3)
    label = torch.zeros(40, 60, dtype=torch.uint8)
    image = torch.randint(0, 60, (3, 40, 60), dtype=torch.uint8, generator=generator)  # dark: contrast clips to black
    config = AugmentConfig(scale=(zoom, zoom), crop=(38, 52), contrast=0.9)
    views = [augment(image, label, None, config, torch.Generator().manual_seed(k)) for k in range(20)]
    inside = inside_picture(torch.stack([view[0] for view in views]))
    assert torch.equal(inside, torch.stack([view[1] for view in views]) != IGNORE)
    assert inside.all() == (zoom >= 1)


def test_channels_are_dropped_whole_and_by_the_pictures_seed():
    features = torch.rand(6, 400, 3, 5) + 1
    dropped = channel_dropout(features, many(6), 0.3, "a")
    kept = dropped != 0
    assert (kept == kept[:, :, :1, :1]).all()
    torch.testing.assert_close(dropped[kept], features[kept] / 0.7)
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert torch.equal(channel_dropout(features[2:3], many(6)[2:3], 0.3, "a"), dropped[2:3])
    for others in (kept[[1, 2, 3, 4, 5, 0]], channel_dropout(features, many(6), 0.3, "b") != 0):
        assert (others == kept).float().mean().item() == pytest.approx(0.58, abs=0.05)  # 0.7^2 + 0.3^2
    assert torch.equal(channel_dropout(features, many(6), 0.0, "a"), features)
