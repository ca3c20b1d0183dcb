"""GCT against its step written a second time, and what its targets, flaw maps and ground truth must never do."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from equivalence.small import CLASSES, block, naive_cross_entropy, task
from equivalence.stepping import advance, assert_same_weights, lend_engine, turns
from udas.data.batch import IGNORE, Batch, Stream
from udas.data.mixing import inside_picture
from udas.errors import ConfigError
from udas.methods.gct import (
    GCT,
    GCTConfig,
    Prediction,
    blur,
    exchange,
    ground_truth,
    kernel_size,
    postprocess_flaws,
    with_new_head,
)
from udas.networks.encoders import batch_norms
from udas.networks.segmenters import Segmenter
from udas.validation import validate

STEPS = 10
SGD = {"name": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
SSL = (Stream.LABELLED, Stream.UNLABELLED)
ALL = (*SSL, Stream.SOURCE)
SIZE = {"height": 25, "width": 36}
SMALL = {"detector_width": 6, "detector_stages": 2}
# what the publication does not give
OURS = {"name", "optimiser", "detector_optimiser", "source", "auxiliary", "keep"}


def make(streams=SSL, network="fcn", **settings):
    torch.manual_seed(3)
    settings = {"optimiser": SGD, "detector_optimiser": SGD} | SMALL | settings
    method = GCT(validate(GCTConfig, settings, "test"), task(streams, network, STEPS)).train()
    method.detector.classifier.bias.data.fill_(0.4)  # maps with flaws and without any
    return method


def batch(step, streams=SSL, labelled=2, unlabelled=2):
    seen = Batch(
        source=block(10 * step, 2, **SIZE) if Stream.SOURCE in streams else None,
        labelled=block(10 * step + 1, labelled, **SIZE),
        unlabelled=block(10 * step + 2, unlabelled, labelled=False, **SIZE),
    )
    seen.labelled.image[0, :, 21:] = 0  # these two pictures were too small for their crops
    seen.labelled.label[0, 21:] = IGNORE
    seen.unlabelled.image[0, :, :, :6] = 0
    return seen


@pytest.fixture
def double(monkeypatch):
    """Networks in double precision: which map is smaller by 1e-7 decides what a pixel learns."""
    monkeypatch.setattr(
        Segmenter, "enlarge", lambda _, logits, image: F.interpolate(logits, image.shape[-2:], mode="bilinear")
    )
    return lambda seen: Batch(
        **{name: replace(getattr(seen, name), image=getattr(seen, name).image.double()) for name in seen.names()}
    )


class Naive:
    """Pixel after pixel; kernels, borders and the order of the published code written out."""

    def __init__(self, method):
        self.config, self.detector = method.config, copy.deepcopy(method.detector)
        self.nets = [copy.deepcopy(method.segmenter), copy.deepcopy(method.right)]
        self.sgds = [
            torch.optim.SGD(module.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
            for module in (*self.nets, self.detector)
        ]
        self.moved, self.corrected = [], []

    def step(self, batch, t):
        torch.manual_seed(t)
        c, terms, count = self.config, {}, len(batch.labelled.image)
        image = torch.cat((batch.labelled.image, batch.unlabelled.image), 0)
        outputs = [net.levels(image) for net in self.nets]
        p = [output[0].exp() / output[0].exp().sum(1, keepdim=True) for output in outputs]
        flaws = [self.detector(image, each) for each in p]
        targets, mask = self.targets([each.detach() for each in p], [postprocess(each.detach()) for each in flaws])
        inside = torch.ones(len(image), *image.shape[2:], dtype=torch.bool)
        inside[0, 21:], inside[count, :, :6] = False, False
        ramp = math.exp(-5 * (1 - min(1, t / max(1, round(c.ramp_up * STEPS)))) ** 2) if c.ramp_up else 1
        for k, side in enumerate(("left", "right")):
            labels = [naive_cross_entropy(level[:count], batch.labelled.label) for level in outputs[k]]
            mine = {
                "labelled": labels[0] + c.auxiliary * sum(labels[1:]),
                "consistency": ramp * c.consistency * ((p[k] - targets[k]).movedim(1, -1)[inside] ** 2).mean(),
                "correction": c.correction * (flaws[k][mask & inside[:, None]] ** 2).sum() / inside.sum(),
            }
            if batch.source:
                losses = [
                    naive_cross_entropy(level, batch.source.label) for level in self.nets[k].levels(batch.source.image)
                ]
                mine["source"] = c.source * (losses[0] + c.auxiliary * sum(losses[1:]))
            learn(self.sgds[k], self.nets[k], sum(mine.values()))
            if not c.correction:
                del mine["correction"]  # it is 0; nothing is told of it
            terms |= {f"{side} {name}": term.item() for name, term in mine.items()}
        losses = [self.detection(image, each.detach(), batch.labelled.label) for each in p]
        terms |= {f"detector {side}": loss.item() for side, loss in zip(("left", "right"), losses, strict=True)}
        learn(self.sgds[2], self.detector, sum(losses))
        return terms

    def targets(self, p, flaws):
        xi, targets = self.config.threshold, [each.clone() for each in p]
        mask = torch.zeros(flaws[0].shape, dtype=torch.bool)
        for b, _, y, x in torch.ones_like(flaws[0]).nonzero().tolist():
            left, right = (1.0 if flaw > xi else flaw for flaw in (each[b, 0, y, x].item() for each in flaws))
            if right < left:
                targets[0][b, :, y, x] = p[1][b, :, y, x]
            if left < right:
                targets[1][b, :, y, x] = p[0][b, :, y, x]
            mask[b, 0, y, x] = left == 1.0 and right == 1.0
        self.moved.append(
            [(target != own).any(1).float().mean().item() for target, own in zip(targets, p, strict=True)]
        )
        self.corrected.append(mask.float().mean().item())
        return targets, mask

    def detection(self, image, p, label):
        c, found = self.config, self.detector(image, p)
        squares = []
        for b in range(len(label)):
            squares.append((found[b, 0] - pipeline(p[b], label[b], c.nu)) ** 2)
        return c.detection * sum(square.sum() for square in squares) / (2 * label.numel())


def learn(optimiser, module, loss):
    parameters = list(module.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
        parameter.grad = gradient
    optimiser.step()


def mirrored(plane, reach):
    """The plane with `reach` more rows and columns on each side, mirrored at the border pixels."""
    for dim in (0, 1):
        size = plane.shape[dim]
        order = [abs(i) if i < size else 2 * (size - 1) - i for i in range(-reach, size + reach)]
        plane = plane.index_select(dim, torch.tensor(order))
    return plane


def gaussian(plane, part):
    side = int(min(plane.shape) / part)
    side += side % 2 == 0
    sigma, reach = 0.3 * ((side - 1) * 0.5 - 1) + 0.8, side // 2
    height, width = plane.shape
    wide, total, weights = mirrored(plane, reach), torch.zeros_like(plane), 0.0
    for i in range(-reach, reach + 1):
        for j in range(-reach, reach + 1):
            weight = math.exp(-(i * i + j * j) / (2 * sigma * sigma))
            weights += weight
            total += weight * wide[reach + i : reach + i + height, reach + j : reach + j + width]
    return total / weights


def dilated(plane):
    height, width = plane.shape
    wide = mirrored(plane, 1)
    return torch.stack([wide[i : i + height, j : j + width] for i in range(3) for j in range(3)]).max(0).values


def stretched(plane):
    return (plane - plane.min()) / (plane.max() - plane.min() + 1e-9)


def pipeline(p, label, nu):
    plane = torch.zeros(label.shape, dtype=p.dtype)
    for k in range(len(p)):
        plane += ((label == k).float() - p[k]).abs()
    plane[label == IGNORE] = 0
    plane = gaussian(plane / 2, 8)
    for _ in range(nu):
        plane = gaussian(dilated(plane), 4)
    return stretched(plane)


def postprocess(flaws):
    maps = []
    for (plane,) in flaws:
        plane = gaussian(torch.where(plane < 0, 0.0, plane), 16)
        maps.append(stretched(plane) if plane.max() > 0.1 else torch.zeros_like(plane))
    return torch.stack(maps)[:, None]


CASES = {
    "labelled and unlabelled": (SSL, 2, 2, {}),
    "synthetic pictures too": (ALL, 2, 2, {"source": 0.7, "threshold": 0.5}),
    "more unlabelled pictures, other weights": (
        SSL,
        1,
        3,
        {"consistency": 30, "correction": 3, "detection": 2, "ramp_up": 0, "threshold": 0.3},
    ),
    "another ground truth": (SSL, 2, 1, {"nu": 2, "batch_share": 0.25}),
    "no flaw correction": (SSL, 2, 2, {"correction": 0}),
    "two levels": (ALL, 2, 2, {"network": "deeplabv2_multi", "auxiliary": 0.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_formula(case, double):
    streams, labelled, unlabelled, settings = CASES[case]
    method = make(streams, **settings).double()
    naive, engine = Naive(method), lend_engine(method, STEPS)
    for step in range(2):
        seen = double(batch(step, streams, labelled, unlabelled))
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=1e-6)
    assert all(0.02 < share < 0.98 for shares in naive.moved for share in shares), naive.moved
    assert all(0.005 < share < 0.9 for share in naive.corrected), naive.corrected
    for ours, theirs in zip(
        (method.segmenter, method.right, method.detector), (*naive.nets, naive.detector), strict=True
    ):
        assert_same_weights(ours, theirs, rtol=1e-7, atol=1e-9)


def test_the_defaults_are_the_published_ones():
    """Those of the released scripts for segmentation; the ramp is 3 epochs of 20."""
    assert GCTConfig().model_dump(exclude=OURS) == {
        "consistency": 100,
        "correction": 1,
        "detection": 10,
        "threshold": 0.6,
        "ramp_up": 0.15,
        "nu": 1,
        "detector_width": 64,
        "detector_stages": 4,
        "batch_share": 0.5,
    }
    detector = GCTConfig().detector_optimiser
    assert (detector.name, detector.lr, detector.betas) == ("adam", 1e-4, (0.9, 0.99))
    assert (detector.schedule, detector.power) == ("poly", 0.9)


# ------------------------------------------------------------------------------------------------- the two networks


def test_the_networks_share_the_encoders_start_and_no_head():
    """The task gives the same network twice, as one checkpoint does."""
    method = make()
    left, right = method.segmenter.state_dict(), method.right.state_dict()
    heads = [key for key in left if key.startswith("decoder.") and left[key].is_floating_point() and left[key].ndim > 1]
    assert heads
    assert not any(torch.equal(left[key], right[key]) for key in heads)
    assert all(torch.equal(left[key], right[key]) for key in left if key.startswith("encoder."))
    assert not {id(p) for p in method.segmenter.parameters()} & {id(p) for p in method.right.parameters()}


def test_a_new_head_has_statistics_of_its_own():
    network = task(SSL, "fcn", STEPS).segmenter()
    for norm in batch_norms(network):
        norm.running_mean.fill_(3)
    with_new_head(network)
    assert batch_norms(network.decoder)
    assert all(not norm.running_mean.any() for norm in batch_norms(network.decoder))
    assert all((norm.running_mean == 3).all() for norm in batch_norms(network.encoder))


def test_the_kept_network_is_a_choice():
    left, right = make(), make(keep="right")
    assert left.model() is left.segmenter
    assert right.model() is right.right


def test_each_player_learns_by_its_own_settings():
    method = make(optimiser=SGD | {"head_factor": 10}, detector_optimiser=SGD | {"lr": 0.5})
    players = method.optimised()
    for side in ("left", "right"):
        assert players[side].config is method.config.optimiser
        assert [group["factor"] for group in players[side].groups] == [1, 10]
    assert players["detector"].config is method.config.detector_optimiser


def test_each_turn_moves_one_player():
    method = make(ALL)
    players = {name: list(getattr(method, name).parameters()) for name in ("segmenter", "right", "detector")}
    engine = lend_engine(method)
    seen = turns(engine, players)
    advance(engine, method, batch(0, ALL))
    assert [name for name, _ in seen] == ["left", "right", "detector"]
    for (_, moving), name in zip(seen, players, strict=True):
        assert [player for player in players if True in moving[player]] == [name]


def test_the_batch_may_have_no_label_at_all():
    method, seen = make(), batch(0)
    seen.labelled.label.fill_(IGNORE)
    losses = advance(lend_engine(method), method, seen)
    assert losses["left labelled"] == 0
    assert all(math.isfinite(loss) for loss in losses.values())


def test_pictures_of_two_sizes_are_named():
    seen = batch(0)
    seen = Batch(labelled=block(1, height=40), unlabelled=seen.unlabelled)
    with pytest.raises(ConfigError, match="40 x 48, unlabelled ones of 25 x 36"):
        make().step(seen)


def test_the_consistency_grows_and_then_stays():
    method = make(ramp_up=0.3, optimiser=SGD | {"lr": 1e-9}, detector_optimiser=SGD | {"lr": 1e-9})
    engine, seen = lend_engine(method, STEPS), batch(0)
    method.eval()  # no dropout: every step has the same loss
    losses = [advance(engine, method, seen, step)["left consistency"] for step in range(5)]
    expected = [math.exp(-5 * (1 - t / 3) ** 2) for t in (0, 1, 2, 3, 3)]
    assert [loss / losses[-1] for loss in losses] == pytest.approx(expected, rel=1e-3)


# -------------------------------------------------------------------------------------------------------- flaw maps


def predicted(flaws, share):
    """A network that gives the first class this share everywhere; flaws of a row of pixels, each 40 x 40 wide."""
    wide = torch.tensor(flaws).repeat_interleave(40)[None, None, None].expand(1, 1, 40, -1)
    probabilities = torch.empty(1, 2, *wide.shape[2:])
    probabilities[:, 0], probabilities[:, 1] = share, 1 - share
    return Prediction((), probabilities, wide)


def middles(maps):
    return maps[0, 0, 20, 20::40].tolist()


def test_the_less_flawed_prediction_is_learnt_and_the_own_one_where_both_are_equal():
    left = predicted([0.0, 0.2, 0.5, 0.9, 0.7, 1.0], 0.8)
    right = predicted([0.0, 0.5, 0.2, 0.3, 1.0, 0.9], 0.1)
    target_l, target_r, mask = exchange(left, right, 0.6)
    assert middles(target_l) == pytest.approx([0.8, 0.8, 0.1, 0.1, 0.8, 0.8])
    assert middles(target_r) == pytest.approx([0.1, 0.8, 0.1, 0.1, 0.1, 0.1])
    assert middles(mask) == [False, False, False, False, True, True]
    assert not target_l.requires_grad


def test_maps_are_clipped_and_scaled_each_by_itself():
    maps = torch.cat([predicted([-2.0, 0.2, 0.4], 1).flaws, predicted([1.0, 2.0, 5.0], 1).flaws])
    assert middles(postprocess_flaws(maps)) == pytest.approx([0, 0.5, 1], abs=1e-6)
    assert middles(postprocess_flaws(maps)[1:]) == pytest.approx([0, 0.25, 1], abs=1e-6)


def test_a_map_without_flaw_is_zero():
    """The released code leaves a constant below zero, by which one of two flawless networks would win everywhere."""
    maps = torch.cat([predicted([0.05, 0.08, -3.0], 1).flaws, predicted([0.05, 0.12, 0.08], 1).flaws])
    assert not postprocess_flaws(maps)[0].any()
    assert postprocess_flaws(maps)[1].max() == pytest.approx(1)


def test_flaw_maps_are_clipped_then_blurred_and_then_scaled():
    """At 64 pixels the kernel of side / 16 has 5 x 5, and that of other parts another size."""
    maps = torch.randn(3, 1, 64, 80, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(postprocess_flaws(maps), postprocess(maps), rtol=1e-6, atol=1e-8)


def test_a_flaw_reaches_its_neighbours_and_a_faint_one_of_a_pixel_is_none():
    """The kernel is 5 x 5, sigma 1.1: of 0.6 in one pixel 0.08 is left, of 0.9 0.12; up to 0.1 a map has no flaw."""
    maps = torch.zeros(2, 1, 64, 64)
    maps[0, 0, 30, 20], maps[1, 0, 30, 20] = 0.6, 0.9
    faint, clear = postprocess_flaws(maps)
    assert not faint.any()
    expected = [math.exp(-(i * i) / (2 * 1.1**2)) for i in (0, 1, 2)]
    assert clear[0, 30, 20:24].tolist() == pytest.approx([*expected, 0], rel=1e-4)


def test_flaws_are_blurred_by_shares_of_the_shorter_side_in_full_precision():
    maps = torch.rand(2, 1, 40, 64)
    torch.testing.assert_close(blur(maps.mT.contiguous(), 8), blur(maps, 8).mT)
    with torch.autocast("cpu", torch.bfloat16):
        inside = blur(maps, 8)
    assert torch.equal(inside, blur(maps, 8))


# ----------------------------------------------------------------------------------------------------- ground truth


def probabilities(label, wrong):
    """Certain and right, but for the `wrong` pixels, which are certain to be of the next class."""
    classes = torch.where(wrong, (label + 1) % len(CLASSES.classes), label)
    return F.one_hot(classes, len(CLASSES.classes)).movedim(-1, 1).float()


def square(height=64, width=96, at=(10, 60), side=12):
    wrong = torch.zeros(1, height, width, dtype=torch.bool)
    wrong[:, at[0] : at[0] + side, at[1] : at[1] + side] = True
    return wrong


def test_the_truth_peaks_where_the_prediction_is_wrong():
    label = torch.randint(0, 3, (1, 64, 96), generator=torch.Generator().manual_seed(0))
    truth = ground_truth(probabilities(label, square()), label, 1)[0, 0]
    assert (truth.min(), truth.max()) == (0, pytest.approx(1))
    y, x = divmod(truth.argmax().item(), 96)
    assert (abs(y - 15.5) < 4, abs(x - 65.5) < 4) == (True, True)
    assert truth[:, :40].max() == 0


def test_repetitions_widen_the_flaws():
    label = torch.zeros(1, 64, 96, dtype=torch.long)
    areas = [(ground_truth(probabilities(label, square()), label, nu) > 0.1).sum().item() for nu in (0, 1, 2)]
    assert areas[0] < areas[1] < areas[2]


def test_pixels_without_a_label_are_no_flaws():
    """All-zero one-hot vectors would make them half wrong."""
    label = torch.zeros(1, 64, 96, dtype=torch.long)
    p = probabilities(label, square())
    label[:, 40:] = IGNORE
    assert ground_truth(p, label, 1)[0, 0, 50:].max() < 1e-3


def test_without_a_label_the_detector_learns_to_find_no_flaw():
    """What it says there is believed when predictions are compared, so it must not be left to chance."""
    method, seen = make(), batch(0)
    seen.labelled.label[:, :, 5:] = IGNORE
    image = torch.cat((seen.labelled.image, seen.unlabelled.image))
    prediction = Prediction((), torch.rand(4, 3, 25, 36).softmax(1), torch.zeros(4, 1, 25, 36))
    flaws = torch.full((4, 1, 25, 36), 0.5, requires_grad=True)
    method.detector.forward = lambda *_: flaws
    method._detection(image, prediction, seen.labelled).backward()
    assert flaws.grad[:2, ..., 30:].flatten().tolist() == pytest.approx([2 * 0.5 / (2 * 25 * 36)] * (2 * 25 * 6))
    assert not flaws.grad[2:].any()


def test_predictions_beyond_a_picture_change_nothing():
    """The picture was too small for its crop and has a black border; predictions and flaws there count nowhere."""
    method, seen = make(ramp_up=0), batch(0)
    lend_engine(method)
    inside = torch.ones(4, 25, 36, dtype=torch.bool)
    inside[0, 21:], inside[2, :, :6] = False, False
    assert torch.equal(inside_picture(torch.cat((seen.labelled.image, seen.unlabelled.image))), inside)
    p, target, flaws, elsewhere = (torch.rand(4, k, 25, 36) for k in (3, 3, 1, 4))
    mask = flaws > 0.3
    logits = (torch.zeros(4, 3, 25, 36),)
    other = torch.where(inside[:, None], torch.cat((p, flaws), 1), elsewhere)
    found = [
        method._terms(Prediction(logits, *each), seen.labelled, target, mask, inside)
        for each in ((p, flaws), other.split((3, 1), dim=1))
    ]
    assert found[0]["consistency"] > 0
    for name, term in found[0].items():
        torch.testing.assert_close(term, found[1][name])
    torch.testing.assert_close(found[0]["correction"], (flaws[mask & inside[:, None]] ** 2).sum() / inside.sum())


@pytest.mark.parametrize(("part", "side"), [(8, 41), (4, 81), (16, 21)])
def test_kernels_are_those_of_the_release(part, side):
    assert kernel_size(321, part) == side
