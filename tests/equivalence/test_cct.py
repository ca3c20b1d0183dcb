"""Cross-consistency training against its step written a second time, and what its objects and target must never be."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from equivalence.small import CLASSES, block, naive_cross_entropy, task
from equivalence.stepping import advance, assert_same_weights, lend_engine
from equivalence.test_perturbations import drawn, naive_boxes, quotient
from udas.config import NetworkConfig
from udas.data.batch import IGNORE, Batch, Stream
from udas.data.sampling import seed_of
from udas.errors import ConfigError
from udas.methods.cct import CCT, CCTConfig, Decoders, unsure_labels
from udas.networks.segmenters import SEGMENTERS, build_segmenter
from udas.validation import validate

STEPS = 10
SGD = {"name": "sgd", "lr": 0.02, "head_factor": 3, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
SSL = (Stream.LABELLED, Stream.UNLABELLED)
ALL = (*SSL, Stream.SOURCE)
KINDS = ("dropout", "feature_drop", "noise", "cutout", "context", "objects", "adversarial")
NONE = dict.fromkeys(KINDS, 0)
OURS = {"name", "optimiser", "source", "auxiliary"}  # what the publication does not give


def make(streams=SSL, network="deeplabv3plus", norm="train", **settings):
    torch.manual_seed(3)
    config = {"optimiser": SGD, "foreground": ["car", "sky"], "outline": 10, "ramp_up": 0.3}
    return CCT(validate(CCTConfig, config | settings, "test"), task(streams, network, STEPS, norm)).train()


def batch(step, streams=SSL):
    seen = Batch(
        source=block(10 * step, 3) if Stream.SOURCE in streams else None,
        labelled=block(10 * step + 1, 2),
        unlabelled=block(10 * step + 2, 2, labelled=False),
    )
    seen.unlabelled.image[0, :, :, :10] = 0  # this picture was too small for its crop
    return seen


class Naive:
    """Decoder after decoder and picture after picture; every perturbation by loops over cells."""

    def __init__(self, method):
        self.c, self.net, self.heads = method.config, copy.deepcopy(method.segmenter), copy.deepcopy(method.heads)
        self.kinds = [kind for kind in KINDS for _ in range(getattr(self.c.decoders, kind))]
        fast = [*self.net.decoder.parameters(), *self.heads.parameters()]
        groups = [{"params": list(self.net.encoder.parameters())}, {"params": fast, "lr": 0.06}]
        self.sgd, self.objects = torch.optim.SGD(groups, 0.02, momentum=0.9, weight_decay=5e-4), []

    def step(self, batch, t):
        torch.manual_seed(t)
        c, terms = self.c, {}
        if batch.source:
            terms["source"] = c.source * self.learn(batch.source.image, batch.source.label)
        terms["labelled"] = self.learn(batch.labelled.image, batch.labelled.label, t, c.supervised)
        weight = c.consistency * math.exp(-5 * (1 - min(t / (c.ramp_up * STEPS), 1)) ** 2)
        terms["consistency"] = weight * self.agree(batch.unlabelled)
        self.sgd.zero_grad()
        sum(terms.values()).backward()
        self.sgd.step()
        return {name: term.item() for name, term in terms.items()}

    def learn(self, image, label, t=0, kind="cross_entropy"):
        outputs = self.net.levels(image)
        if kind == "bootstrapped":
            eta = 1 / 3 + (self.c.threshold - 1 / 3) * (1 - math.exp(-5 * min(t / (self.c.annealing * STEPS), 1)))
            label, probability = label.clone(), outputs[0].exp() / outputs[0].exp().sum(1, keepdim=True)
            for b, y, x in (label != IGNORE).nonzero().tolist():
                if probability[b, label[b, y, x], y, x] >= eta:
                    label[b, y, x] = IGNORE
        losses = [naive_cross_entropy(output, label) for output in outputs]
        return sum(share * loss for share, loss in zip((1.0, self.c.auxiliary), losses, strict=False))

    def agree(self, unlabelled):
        outputs = self.net.outputs(unlabelled.image)
        logits, z = outputs.levels[0].detach(), outputs.representation
        target = logits.exp() / logits.exp().sum(1, keepdim=True)
        objects, total = self.find(target, z), 0.0
        for k, (kind, head) in enumerate(zip(self.kinds, self.heads, strict=True)):
            noise = torch.empty(z.shape[1:]).uniform_(-self.c.strength, self.c.strength) if kind == "noise" else None
            start = torch.rand(z.shape) - 0.5 if kind == "adversarial" else None
            seen = []
            for b, seed in enumerate(seed_of(seed, "decoder", k) for seed in unlabelled.seeds):
                seen.append(self.perturb(kind, z[b], objects[b], seed))
                if kind == "noise":
                    seen[b] = z[b] * (1 + noise)
                if kind == "adversarial":
                    step = quotient(z[b : b + 1], head, start[b : b + 1])[0].float()
                    seen[b] = z[b] + self.c.epsilon * step
            scores = torch.nn.functional.interpolate(head(torch.stack(seen)), target.shape[2:], mode="bilinear")
            difference = scores.exp() / scores.exp().sum(1, keepdim=True) - target
            whole, narrow = difference[1:], difference[:1, :, :, 10:]
            total = total + ((whole**2).sum() + (narrow**2).sum()) / (whole.numel() + narrow.numel())
        return total / len(self.heads)

    def find(self, target, z):
        """Which cells of z lie on objects: the class of the picture's pixel in each cell's upper left corner."""
        (height, width), size = z.shape[2:], target.shape[2:]
        things = [CLASSES.classes.index(name) for name in self.c.foreground]
        objects = torch.zeros(len(z), height, width, dtype=torch.bool)
        for b, y, x in torch.ones_like(objects).nonzero().tolist():
            pixel = target[b, :, y * size[0] // height, x * size[1] // width]
            objects[b, y, x] = int(pixel.argmax()) in things
        self.objects.append(objects)
        return objects

    def perturb(self, kind, z, objects, seed):
        if kind == "dropout":
            kept = [float(draw >= self.c.drop) for draw in drawn(seed, "channels cct", len(z))]
            return torch.stack([channel * keep / (1 - self.c.drop) for channel, keep in zip(z, kept, strict=True)])
        if kind == "feature_drop":
            low, high = self.c.active
            share = low + (high - low) * drawn(seed, "most active features", 1)[0]
            return z * (z.mean(0) < share * z.mean(0).max())
        if kind == "cutout":
            return z * ~self.windows(objects, seed)
        return z * {"context": objects, "objects": ~objects}.get(kind, True)

    def windows(self, objects, seed):
        lost, places, erase = torch.zeros_like(objects), drawn(seed, "cutout", 128), self.c.erase
        for k, (top, left, bottom, right) in enumerate(naive_boxes(objects, 64, self.c.outline / 4)):
            tall, wide = erase * (bottom - top), erase * (right - left)
            y, x = top + places[k] * (bottom - top - tall), left + places[64 + k] * (right - left - wide)
            for row, column in torch.ones_like(objects).nonzero().tolist():
                lost[row, column] |= y <= row + 0.5 < y + tall and x <= column + 0.5 < x + wide
        return lost


CASES = {
    "every decoder": (SSL, {}),
    "two decoders of each kind": (SSL, {"decoders": dict.fromkeys(KINDS, 2)}),
    "synthetic pictures too": (ALL, {"source": 0.7, "decoders": NONE | {"dropout": 1, "adversarial": 1}}),
    "annealed": (SSL, {"supervised": "bootstrapped", "decoders": NONE | {"noise": 1}}),
    "two levels": (ALL, {"network": "deeplabv2_multi", "auxiliary": 0.3, "decoders": NONE | {"feature_drop": 1}}),
    "two levels, annealed": (
        SSL,
        {"network": "deeplabv2_multi", "supervised": "bootstrapped", "decoders": NONE | {"noise": 1}},
    ),
    "other numbers": (
        SSL,
        {"drop": 0.3, "active": [0.4, 0.6], "strength": 0.7, "erase": 0.8, "epsilon": 5.0, "consistency": 4.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_formula(case):
    streams, settings = CASES[case]
    method = make(streams, **settings)
    naive, engine = Naive(method), lend_engine(method, STEPS)
    for step in range(2):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=1e-4)
        for ours, theirs in ((method.segmenter, naive.net), (method.heads, naive.heads)):
            assert_same_weights(ours, theirs, rtol=1e-4, atol=5e-6)
            theirs.load_state_dict(ours.state_dict())  # on from equal weights: rounding can turn a ReLU later
    if "context" in naive.kinds:
        assert all(0.02 < objects.float().mean() < 0.98 for objects in naive.objects), "one of the masks is trivial"


def test_the_defaults_are_the_published_ones():
    """As released, with the numbers of decoders of a port of 11 with a like score."""
    assert CCTConfig(foreground=["car"]).model_dump(exclude=OURS) == {
        "decoders": {
            "dropout": 2,
            "feature_drop": 2,
            "noise": 2,
            "cutout": 2,
            "context": 1,
            "objects": 1,
            "adversarial": 1,
        },
        "foreground": ["car"],
        "consistency": 30,
        "ramp_up": 0.1,
        "supervised": "cross_entropy",
        "threshold": 0.9,
        "annealing": 0.4,
        "drop": 0.5,
        "active": (0.7, 0.9),
        "strength": 0.3,
        "erase": 0.4,
        "outline": 50,
        "epsilon": 2,
    }


def test_the_number_of_decoders_is_a_choice():
    assert len(make().heads) == 11
    published = {"dropout": 6, "feature_drop": 6, "noise": 6, "cutout": 6, "context": 2, "objects": 2, "adversarial": 2}
    assert len(make(decoders=published).heads) == 30


@pytest.mark.parametrize("network", SEGMENTERS)
def test_decoders_reach_the_size_of_the_picture(network):
    method = make(network=network, decoders=NONE | {"dropout": 1}).eval()
    with torch.no_grad():
        z = method.segmenter.representation(torch.rand(1, 3, 64, 96))
        assert method.heads[0](z).shape == (1, 3, 64, 96)


def test_an_encoder_of_one_size_is_enough():
    """Building the method shows the network no picture: Swin takes the size it was trained on and no other."""
    config = NetworkConfig(name="upernet", encoder="swin_tiny_patch4_window7_224", weights=None)
    given = replace(task(SSL), segmenter=lambda: build_segmenter(config, len(CLASSES.classes)))
    method = CCT(CCTConfig(decoders=Decoders(**NONE | {"dropout": 1})), given).eval()
    with torch.no_grad():
        z = method.segmenter.representation(torch.rand(1, 3, 224, 224))
        assert method.heads[0](z).shape == (1, 3, 224, 224)


def test_an_unknown_perturbation_is_none_of_the_known():
    method, z = make(), torch.ones(1, 4, 2, 2)
    with pytest.raises(AssertionError, match="unknown"):
        method._perturb("unknown", z, None, method.heads[0], [0])


def test_the_first_class_is_no_background():
    """Road is class 0: hiding all but the road keeps it, and hides what the released code would keep."""
    method, z = make(foreground=["road"]), torch.ones(1, 4, 2, 2)
    target = torch.eye(3)[[0, 1, 2, 0]].T.reshape(1, 3, 2, 2)
    objects = method._guide(target, z).objects
    assert objects.tolist() == [[[True, False], [False, True]]]
    kept = method._perturb("context", z, method._guide(target, z), method.heads[0], [0])
    assert kept[0, 0].tolist() == [[1, 0], [0, 1]]


def test_what_agrees_costs_nothing_and_the_target_has_no_gradient():
    """With neither perturbation nor disagreement L_u is 0; else it moves the decoders, not the main classifier."""
    method = make(decoders=NONE | {"noise": 1}, strength=0, network="deeplabv2")
    outputs = method.segmenter.outputs(torch.rand(2, 3, 64, 64))
    method.heads[0].forward = lambda z: outputs.levels[0]
    method.segmenter.outputs = lambda image: outputs
    assert float(method._consistency(torch.rand(2, 3, 64, 64), [0, 1]).detach()) == pytest.approx(0, abs=1e-12)
    other = make(decoders=NONE | {"noise": 1}, network="deeplabv2")
    other._consistency(torch.rand(2, 3, 64, 64), [0, 1]).backward()
    assert all(p.grad is None for p in other.segmenter.decoder_parameters())
    assert all(p.grad is not None for p in other.heads.parameters())
    assert any(p.grad is not None for p in other.segmenter.encoder_parameters())


def test_what_is_said_beyond_a_picture_changes_nothing():
    """The picture was too small for its crop and has a black border; what decoders say there counts nowhere."""
    method, image = make(decoders=NONE | {"feature_drop": 1}), torch.rand(2, 3, 64, 64)
    image[0, :, :, :16], image[1, :, 50:] = 0, 0
    with torch.no_grad():
        outputs, said = method.segmenter.outputs(image), torch.randn(2, 3, 64, 64)
    other = said.clone()
    other[0, 0, :, :16] += 5
    other[1, 1, 50:] -= 5
    method.segmenter.outputs = lambda _: outputs
    losses = []
    for logits in (said, other):
        method.heads[0].forward = lambda _, logits=logits: logits
        losses.append(float(method._consistency(image, [0, 1])))
    squares = (said.softmax(1) - outputs.levels[0].softmax(1)).square().mean(1)
    counted = torch.cat((squares[0, :, 16:].flatten(), squares[1, :50].flatten()))
    assert losses == pytest.approx([float(counted.mean())] * 2)


def test_the_weight_grows_within_its_share_of_the_training():
    method, seen = make(norm="frozen", optimiser=SGD | {"lr": 1e-12}, decoders=NONE | {"feature_drop": 1}), batch(0)
    engine = lend_engine(method, STEPS)
    method.eval()  # no dropout: every step has the same loss
    losses = [advance(engine, method, seen, step)["consistency"] for step in range(6)]
    expected = [math.exp(-5 * (1 - min(t / 3, 1)) ** 2) for t in range(6)]
    assert [loss / losses[-1] for loss in losses] == pytest.approx(expected, rel=1e-4)


def test_ramps_end_at_the_nearest_step():
    assert [make()._steps(share) for share in (0.1, 0.29, 0.31)] == [1, 3, 3]  # of 10; 0.29 x 10 is not exact


@pytest.mark.parametrize("network", ["deeplabv2", "deeplabv3plus"])
def test_outlines_are_in_pixels_of_the_picture(network):
    method = make(network=network, foreground=["car"], outline=50, decoders=NONE | {"cutout": 1})
    target, stride = torch.zeros(2, 3, 64, 64), method.segmenter.stride
    target[:, 0] = 0.5
    target[0, 1, 16:32, 16:32] = 1  # an outline of 64 pixels
    target[1, 1, 16:24, 16:24] = 1  # of 32
    boxes = method._guide(target, torch.zeros(2, 4, 64 // stride, 64 // stride)).boxes
    assert boxes.any(2).sum(1).tolist() == [1, 0]


def test_unsure_labels_are_those_that_count():
    logits = torch.tensor([[4.0, 0.0], [0.1, 0.0], [0.0, 3.0], [9.0, 0.0]]).T.reshape(1, 2, 1, 4)
    label = torch.tensor([[[0, 0, 0, IGNORE]]])
    assert unsure_labels(logits, label, 0.6).tolist() == [[[IGNORE, 0, 0, IGNORE]]]
    assert unsure_labels(logits, label, 0.5).tolist() == [[[IGNORE, IGNORE, 0, IGNORE]]]


def test_eta_grows_from_chance_to_its_end():
    method, found = make(), []
    engine = lend_engine(method, STEPS)
    for step in (0, 1, 4, 9):
        engine.begin(step)
        found.append(method._eta())
    growth = [0.0, 1 - math.exp(-5 / 4), 1 - math.exp(-5), 1 - math.exp(-5)]
    assert found == pytest.approx([1 / 3 + (0.9 - 1 / 3) * share for share in growth])


def test_the_network_alone_is_handed_on():
    method = make()
    assert method.model() is method.segmenter


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"foreground": []}, "`foreground` is missing"),
        ({"foreground": ["cat"]}, "foreground: three has no class 'cat'"),
        ({"decoders": NONE}, "are all 0"),
        ({"active": [0.9, 0.7]}, "active: the first share is larger than the second"),
        ({"active": [-0.1, 0.7]}, "active"),
        ({"active": [0.7, 1.1]}, "active"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_without_guided_decoders_no_foreground_is_needed():
    method = make(foreground=[], decoders=NONE | {"dropout": 1, "adversarial": 1})
    assert advance(lend_engine(method), method, batch(0))["consistency"] > 0
