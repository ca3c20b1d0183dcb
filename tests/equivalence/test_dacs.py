"""DACS against its step written a second time, and what its quality weight, teacher and mixing must never do."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from equivalence.small import CLASSES, block, naive_cross_entropy, task
from equivalence.stepping import advance, assert_same_weights, lend_engine
from udas.data.batch import IGNORE, Batch, Stream
from udas.data.masks import classmix_masks
from udas.data.mixing import strong
from udas.methods.dacs import DACS, DACSConfig
from udas.validation import validate

STEPS = 5
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
UDA = (Stream.SOURCE, Stream.UNLABELLED)
ALL = (*UDA, Stream.LABELLED)
PLAIN = {"jittered": 0, "blurred": 0}


def make(streams, network="fcn", norm="train", **settings):
    torch.manual_seed(3)
    config = validate(DACSConfig, {"optimiser": SGD, "threshold": 0.4} | settings, "test")
    return DACS(config, task(streams, network, STEPS, norm)).train()


def batch(step, streams, count=2, targets=2):
    return Batch(
        source=block(10 * step, count),
        labelled=block(10 * step + 1, 1) if Stream.LABELLED in streams else None,
        unlabelled=block(10 * step + 2, targets, labelled=False),
    )


class Naive:
    """One picture after the other, its pixels copied one by one; a teacher that is averaged by hand."""

    def __init__(self, method):
        self.config = method.config
        self.net, self.teacher = copy.deepcopy(method.segmenter), copy.deepcopy(method.segmenter)
        self.sgd = torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def step(self, batch, t):
        torch.manual_seed(t)
        c, terms = self.config, {}
        image, label, weight = self.mix(batch.source, batch.unlabelled)
        terms["source"] = self.learn(batch.source.image, batch.source.label)
        if batch.labelled:
            terms["labelled"] = c.labelled * self.learn(batch.labelled.image, batch.labelled.label)
        terms["mixed"] = c.consistency * self.learn(image, label, weight)
        self.sgd.zero_grad()
        sum(terms.values()).backward()
        self.sgd.step()
        self.follow(min(1 - 1 / (t + 2), c.decay))
        return {name: term.item() for name, term in terms.items()}

    def mix(self, source, target):
        c = self.config
        self.teacher.train(c.teacher_norm == "batch")
        with torch.no_grad():
            scores = self.teacher(target.image).double().exp()
        probability = scores / scores.sum(1, keepdim=True)
        image, label, weight = target.image.clone(), probability.argmax(1), torch.zeros(len(scores), *scores.shape[2:])
        partners = [b % len(source.image) for b in range(len(image))]
        masks = classmix_masks(source.label[partners], target.seeds, c.void)
        for b, partner in enumerate(partners):
            sure = [p > c.threshold for p in probability[b].max(0).values.flatten().tolist()]
            weight[b] = sum(sure) / len(sure)
            for y, x in masks[b, 0].nonzero().tolist():
                image[b, :, y, x], label[b, y, x] = source.image[partner, :, y, x], source.label[partner, y, x]
                weight[b, y, x] = 1.0
        colours = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), c.jitter)
        rates = {"jittered": c.jittered, "grey": 0, "blurred": c.blurred}
        return strong(image, target.seeds, **colours, **rates, sigma=(0.15, 1.15)), label, weight

    def learn(self, image, label, weight=None):
        losses = [naive_cross_entropy(output, label, None, weight) for output in self.net.levels(image)]
        return sum(share * loss for share, loss in zip((1.0, self.config.auxiliary), losses, strict=False))

    def follow(self, decay):
        for mine, theirs in zip(self.teacher.state_dict().values(), self.net.state_dict().values(), strict=True):
            mine.copy_(decay * mine + (1 - decay) * theirs if mine.is_floating_point() else theirs)


CASES = {
    "adaptation": (UDA, {}),
    "no colours": (UDA, PLAIN | {"consistency": 0.6}),
    "void is a class": (UDA, PLAIN | {"void": True}),
    "the teacher forgets slowly": (UDA, PLAIN | {"decay": 0.6, "threshold": 0.38}),
    "the teacher uses running statistics": (UDA, PLAIN | {"teacher_norm": "running"}),
    "real labels too": (ALL, {"labelled": 0.7}),
    "two levels": (ALL, PLAIN | {"network": "deeplabv2_multi", "auxiliary": 0.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_formula(case):
    streams, settings = CASES[case]
    method = make(streams, **settings)
    naive, engine = Naive(method), lend_engine(method, STEPS)
    for step in range(3):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=2e-5)
    for ours, theirs in ((method.segmenter, naive.net), (method.teacher.module, naive.teacher)):
        assert_same_weights(ours, theirs)


class Certain(nn.Module):
    """A teacher with the same class everywhere, surer of the left part of each picture."""

    def __init__(self, columns, label=2):
        super().__init__()
        self.columns, self.label = columns, label

    def forward(self, image):
        logits = torch.zeros(len(image), len(CLASSES.classes), *image.shape[-2:])
        logits[:, self.label] = 0.5
        for b, columns in enumerate(self.columns):
            logits[b, self.label, :, :columns] = 9.0
        return logits


def test_the_quality_is_one_weight_per_picture_and_no_mask():
    """12 and 36 of 48 columns are sure: weights of 1/4 and 3/4, on unsure pixels too; 1 on pasted ones."""
    method, seen = make(UDA, threshold=0.968, **PLAIN), batch(0, UDA)
    method.teacher.module = Certain([12, 36])
    image, label, weight = method._mix(seen.source, seen.unlabelled)
    pasted = classmix_masks(seen.source.label, seen.unlabelled.seeds)[:, 0]
    for b, quality in enumerate((0.25, 0.75)):
        assert (weight[b][~pasted[b]] == quality).all()
        assert (weight[b][pasted[b]] == 1).all()
        assert (label[b][~pasted[b]] == 2).all()
        assert torch.equal(label[b][pasted[b]], seen.source.label[b][pasted[b]])
        assert torch.equal(image[b][:, pasted[b]], seen.source.image[b][:, pasted[b]])
        assert torch.equal(image[b][:, ~pasted[b]], seen.unlabelled.image[b][:, ~pasted[b]])
    assert (label != IGNORE).all(), "void source pixels were pasted"


def test_void_pixels_are_pasted_where_they_count_as_a_class():
    method, seen = make(UDA, void=True, **PLAIN), batch(0, UDA, count=8, targets=8)
    _, label, _ = method._mix(seen.source, seen.unlabelled)
    assert (label == IGNORE).any()


@pytest.mark.parametrize(("count", "targets"), [(1, 3), (4, 2)])
def test_batches_of_any_size_are_mixed(count, targets):
    method, seen = make(UDA, **PLAIN), batch(0, UDA, count, targets)
    image, _, _ = method._mix(seen.source, seen.unlabelled)
    assert len(image) == targets
    partner = torch.arange(targets) % count
    pasted = classmix_masks(seen.source.label[partner], seen.unlabelled.seeds)
    assert torch.equal(image, torch.where(pasted, seen.source.image[partner], seen.unlabelled.image))


def test_labels_come_from_pictures_without_strong_colours():
    seen, asked = batch(0, UDA), []
    method = make(UDA, jittered=1, blurred=1)
    method.teacher.module.register_forward_pre_hook(lambda _, given: asked.append(given[0].clone()))
    kept = copy.deepcopy(seen)
    advance(lend_engine(method), method, seen)
    assert len(asked) == 1
    assert torch.equal(asked[0], kept.unlabelled.image)
    assert torch.equal(seen.source.image, kept.source.image)
    assert torch.equal(seen.unlabelled.image, kept.unlabelled.image)


def test_no_gradient_reaches_the_teacher():
    method = make(UDA)
    advance(lend_engine(method), method, batch(0, UDA))
    assert all(not p.requires_grad and p.grad is None for p in method.teacher.parameters())
    assert not {id(p) for p in method.optimised()["segmenter"].groups[0]["params"]} & {
        id(p) for p in method.teacher.parameters()
    }


def test_the_teacher_forgets_its_start_at_first():
    """d = 1/2, 2/3, 3/4, ... until alpha: after n steps the teacher is the mean of all n + 1 networks."""
    method = make(UDA, norm="frozen")
    engine, history = lend_engine(method), [copy.deepcopy(method.segmenter)]
    for step in range(4):
        advance(engine, method, batch(step, UDA), step)
        history.append(copy.deepcopy(method.segmenter))
    networks = zip(*(network.parameters() for network in history), strict=True)
    for average, weights in zip(method.teacher.module.parameters(), networks, strict=True):
        torch.testing.assert_close(average.data, torch.stack([w.data for w in weights]).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_the_teachers_statistics_are_a_choice(statistics):
    method = make(UDA, teacher_norm=statistics)
    norms = [m for m in method.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    method.eval()
    method.train()
    assert {norm.training for norm in norms} == {statistics == "batch"}
    assert method.segmenter.training


def test_the_kept_network_is_a_choice():
    student, teacher = make(UDA), make(UDA, keep="teacher")
    assert student.model() is student.segmenter
    assert teacher.model() is teacher.teacher.module
    assert math.isclose(student.teacher.decay, 0.99)


def test_black_borders_are_not_labelled_and_do_not_dilute_the_quality():
    """What a zoom leaves black of a target picture counts neither in the loss nor in q."""
    method, seen = make(UDA, threshold=0.0), batch(0, UDA)
    seen.unlabelled.image[:, :, :, 24:] = 0
    _, label, weight = method._mix(seen.source, seen.unlabelled)
    pasted = classmix_masks(seen.source.label, seen.unlabelled.seeds, False)[:, 0]
    assert (label[:, :, 24:][~pasted[:, :, 24:]] == IGNORE).all()
    assert (label[:, :, :24][~pasted[:, :, :24]] != IGNORE).all()
    assert (weight[~pasted] == 1).all(), "all pixels inside are surer than 0"
