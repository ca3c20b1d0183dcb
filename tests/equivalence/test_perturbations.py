"""CCT's perturbations and the regions behind them, against loops over cells."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from udas.data.sampling import seed_of
from udas.methods import perturbations
from udas.methods.regions import connected_regions, region_boxes
from udas.networks.pixel_shuffle import PixelShuffleHead


def features(count=3, channels=4, height=9, width=12, seed=0):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


def drawn(seed, purpose, count):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed_of(seed, purpose))).tolist()


# ---------------------------------------------------------------------------------------------------------- regions


def flooded(mask):
    """The cells of each region of one mask [h, w], found with a stack."""
    left, found = {tuple(cell) for cell in mask.nonzero().tolist()}, []
    while left:
        stack, region = [left.pop()], []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
        found.append(sorted(region))
    return found


def naive_boxes(mask, count, minimum):
    """(top, left, bottom, right) of the regions of one mask with a long outline, longest first."""
    boxes = []
    for region in flooded(mask):
        ys, xs = [y for y, _ in region], [x for _, x in region]
        box = (min(ys), min(xs), max(ys) + 1, max(xs) + 1)
        outline = 2 * (box[2] - box[0] + box[3] - box[1])
        if outline > minimum:
            boxes.append((-outline, region[-1], box))
    return [box for *_, box in sorted(boxes)[:count]]


def spiral(side):
    """One path of a cell's width that winds inwards."""
    mask, y, x = torch.zeros(side + 4, side + 4, dtype=torch.bool), 2, 1
    for turn, length in enumerate([side, *(left for left in range(side - 1, 0, -2) for _ in range(2))]):
        dy, dx = ((0, 1), (1, 0), (0, -1), (-1, 0))[turn % 4]
        for _ in range(length):
            y, x = y + dy, x + dx
            mask[y, x] = True
    return mask


def snake(side):
    """Rows that are joined at alternating ends."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    return mask


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.1, 0.9), st.integers(0, 10**6))
def test_regions_are_those_of_a_flood(height, width, share, seed):
    mask = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed)) < share
    number = connected_regions(mask)
    for b in range(2):
        expected = torch.arange(height * width).view(height, width)
        for region in flooded(mask[b]):
            y, x = region[-1]
            for cell in region:
                expected[cell] = y * width + x
        assert torch.equal(number[b], expected)


@pytest.mark.parametrize("shape", [spiral, snake])
@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_long_path_is_one_region(shape, turns, mirrored):
    mask = shape(61).rot90(turns)
    mask = mask.flip(1) if mirrored else mask
    assert len(flooded(mask)) == 1
    assert len(set(connected_regions(mask[None])[0][mask].tolist())) == 1


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5])
def test_boxes_surround_the_largest_regions(share):
    masks = torch.rand(3, 14, 17, generator=torch.Generator().manual_seed(1)) < share
    found = region_boxes(masks, 5, minimum=6)
    assert found.shape == (3, 5, 4)
    for mask, boxes in zip(masks, found.tolist(), strict=True):
        expected = naive_boxes(mask, 5, 6)
        assert expected
        assert [tuple(box) for box in boxes] == expected + [(0, 0, 0, 0)] * (5 - len(expected))


def test_a_mask_without_regions_has_no_boxes():
    assert not region_boxes(torch.zeros(2, 5, 6, dtype=torch.bool), 4, 0).any()


# ---------------------------------------------------------------------------------------------------- perturbations


def test_the_most_active_places_are_lost():
    z, seeds = features(), (5, 6, 7)
    found = perturbations.drop_active(z, seeds, 0.7, 0.9)
    for b, seed in enumerate(seeds):
        attention = z[b].mean(0)
        threshold = (0.7 + 0.2 * drawn(seed, "most active features", 1)[0]) * attention.max()
        for y in range(9):
            for x in range(12):
                lost = attention[y, x] >= threshold
                assert torch.equal(found[b, :, y, x], torch.zeros(4) if lost else z[b, :, y, x])
        assert 0 < (found[b] == 0).all(0).sum() < 9 * 12


def test_noise_is_in_proportion_and_shared_by_the_batch():
    z = features() + 0.1
    torch.manual_seed(0)
    ratio = perturbations.add_noise(z, 0.3) / z - 1
    torch.testing.assert_close(ratio[0], ratio[1])
    assert ratio[0].std() == pytest.approx(0.3 / math.sqrt(3), rel=0.1)
    assert ratio.abs().max() <= 0.3 + 1e-5


def test_context_and_objects_are_each_others_complement():
    z, objects = features(), features(channels=1)[:, 0] > 0.5
    context, rest = perturbations.hide_context(z, objects), perturbations.hide_objects(z, objects)
    assert torch.equal(context + rest, z)
    assert not context.permute(0, 2, 3, 1)[~objects].any()
    assert not rest.permute(0, 2, 3, 1)[objects].any()


def test_a_window_of_each_object_is_lost():
    z, seeds = features(2) + 0.1, (3, 4)
    boxes = torch.tensor([[[0, 0, 9, 12], [2, 5, 4, 9], [0, 0, 0, 0]], [[1, 1, 6, 4], [0, 0, 0, 0], [0, 0, 0, 0]]])
    found = perturbations.cut_objects(z, boxes.float(), seeds, 0.4)
    for b, seed in enumerate(seeds):
        places, lost = drawn(seed, "cutout", 6), torch.zeros(9, 12, dtype=torch.bool)
        for k, (top, left, bottom, right) in enumerate(boxes[b].tolist()):
            y, x = top + places[k] * 0.6 * (bottom - top), left + places[3 + k] * 0.6 * (right - left)
            for row in range(9):
                for column in range(12):
                    inside = y <= row + 0.5 < y + 0.4 * (bottom - top) and x <= column + 0.5 < x + 0.4 * (right - left)
                    lost[row, column] |= inside
        assert torch.equal(found[b], z[b] * ~lost)
        assert lost.any()


def test_windows_have_the_published_share_and_stay_inside():
    boxes, z = torch.tensor([[[10.0, 20.0, 60.0, 90.0]]]).expand(50, 1, 4), torch.ones(50, 1, 64, 100)
    lost = perturbations.cut_objects(z, boxes, range(50), 0.4)[:, 0] == 0
    assert lost.sum((1, 2)).float().mean() == pytest.approx(0.16 * 50 * 70, rel=0.02)
    lost[:, 10:60, 20:90] = False
    assert not lost.any()


def quotient(z, head, d, xi=1e-6):
    """The published direction, in double precision: the gradient of KL(p(z) || p(z + r)) at r = xi d."""
    head, z = copy.deepcopy(head).double(), z.detach().double()
    r = (xi * d.double() / d.double().flatten(1).norm(dim=1)[:, None, None, None]).requires_grad_()
    p, q = head(z).detach().softmax(1), head(z + r).softmax(1)
    (slope,) = torch.autograd.grad((p * (p.log() - q.log())).sum(), r)
    return slope / slope.flatten(1).norm(dim=1)[:, None, None, None]


def test_the_adversarial_step_is_the_limit_of_the_published_one():
    torch.manual_seed(0)
    head, z = PixelShuffleHead(4, 3, 2), features()
    torch.manual_seed(1)
    step = perturbations.add_adversarial(z, head, 2.0) - z
    torch.manual_seed(1)
    expected = 2 * quotient(z, head, torch.rand(z.shape) - 0.5)
    torch.testing.assert_close(step, expected.float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.full((3,), 2.0))


def test_the_adversarial_step_leaves_no_gradient_behind():
    head, z = PixelShuffleHead(4, 3, 1), features().requires_grad_()
    (gradient,) = torch.autograd.grad(perturbations.add_adversarial(z, head, 2.0).sum(), z)
    assert torch.equal(gradient, torch.ones_like(z)), "the step is a constant"
    assert all(p.grad is None for p in head.parameters())


def test_a_prediction_that_nothing_changes_has_no_adversary():
    head, z = PixelShuffleHead(4, 3, 1), features()
    torch.nn.init.zeros_(head[0].weight)
    torch.testing.assert_close(perturbations.add_adversarial(z, head, 2.0), z)


# ------------------------------------------------------------------------------------------------------------ heads


@pytest.mark.parametrize("stages", [0, 1, 3])
def test_a_head_doubles_its_size_per_stage(stages):
    torch.manual_seed(0)
    head = PixelShuffleHead(4, 3, stages)
    for number, value in enumerate(parameter for name, parameter in head.named_parameters() if "bias" in name):
        torch.nn.init.constant_(value, 0.1 * number)
    z = features()
    scores = torch.einsum("cd,bdyx->bcyx", head[0].weight[:, :, 0, 0], z)
    for stage in range(stages):
        convolution = head[stage + 1][0]
        wide = torch.einsum("kc,bcyx->bkyx", convolution.weight[:, :, 0, 0], scores) + 0.1 * stage
        scores = torch.zeros(3, 3, 2 * scores.shape[2], 2 * scores.shape[3])
        for k in range(12):
            scores[:, k // 4, k % 4 // 2 :: 2, k % 2 :: 2] = wide[:, k].clamp(min=0)
    torch.testing.assert_close(head(z), scores)


def test_a_head_begins_with_he_weights():
    """Else scores shrink with every stage."""
    head = PixelShuffleHead(256, 64, 1)
    assert head[0].weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert head[1][0].weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)


def test_a_head_begins_as_nearest_neighbour_upsampling():
    found = PixelShuffleHead(4, 3, 3)(features())
    coarse = found[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3)
    torch.testing.assert_close(found, coarse)
    assert found.std() > 0
