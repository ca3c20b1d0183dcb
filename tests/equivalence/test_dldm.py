"""Dual-level domain mixing: the student and the region-level teacher against their steps written a second time."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from equivalence.small import CLASSES, block, naive_cross_entropy, task
from equivalence.stepping import advance, assert_same_weights, lend_engine
from udas.data.batch import IGNORE, Batch, Stream
from udas.data.masks import cutmix_boxes
from udas.errors import ConfigError
from udas.methods.dldm import DLDM, DLDMConfig
from udas.methods.region_mix import RegionMix, RegionMixConfig, region_mix
from udas.networks.ensemble import Ensemble
from udas.validation import validate

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
SEMI = (Stream.LABELLED, Stream.UNLABELLED)
SUPERVISED = (Stream.SOURCE, Stream.LABELLED)
OURS = {"name", "optimiser", "auxiliary"}  # what the publication does not give


def teachers():
    """Two networks that differ from the student and from each other, as one."""
    made = []
    for seed in (1, 2):
        network = task(SEMI).segmenter()
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.decoder.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        made.append(network)
    return Ensemble(made, "probabilities")


def student(streams=SEMI, network="fcn", **settings):
    given = replace(task(streams, network), teacher=teachers)
    return DLDM(validate(DLDMConfig, {"optimiser": SGD} | settings, "test"), given).train()


def regions(streams=SUPERVISED, network="fcn", **settings):
    return RegionMix(validate(RegionMixConfig, {"optimiser": SGD} | settings, "test"), task(streams, network)).train()


def batch(step, streams, sources=2):
    made = whole(step, streams, sources)
    if made.unlabelled and step:
        made.unlabelled.image[1, :, 25:] = 0  # a zoom left one picture smaller
    return made


def whole(step, streams, sources):
    return Batch(
        source=block(10 * step, sources) if Stream.SOURCE in streams else None,
        labelled=block(10 * step + 1) if Stream.LABELLED in streams else None,
        unlabelled=block(10 * step + 2, 3, labelled=False) if Stream.UNLABELLED in streams else None,
        pseudo=block(10 * step + 3, 3) if Stream.PSEUDO in streams else None,
    )


class Naive:
    """A network with its optimiser, and cross-entropies of it."""

    def __init__(self, method):
        self.c, self.net = method.config, copy.deepcopy(method.segmenter)
        self.sgd = torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def supervised(self, image, label):
        losses = [naive_cross_entropy(output, label) for output in self.net.levels(image)]
        return sum(share * loss for share, loss in zip((1.0, self.c.auxiliary), losses, strict=False))

    def step(self, batch, t):
        torch.manual_seed(t)
        terms = self.terms(batch)
        self.sgd.zero_grad()
        sum(terms.values()).backward()
        self.sgd.step()
        return {name: term.item() for name, term in terms.items()}


class NaiveStudent(Naive):
    """Probabilities of both teachers, added and halved; the divergence pixel by pixel and class by class."""

    def __init__(self, method):
        super().__init__(method)
        self.teachers = [copy.deepcopy(network).eval() for network in method.teachers.network.networks]

    def terms(self, batch):
        terms = {"labelled": self.c.labelled * self.supervised(batch.labelled.image, batch.labelled.label)}
        terms["distillation"] = self.c.distillation * self.divergence(batch.unlabelled.image)
        if batch.pseudo:
            terms["pseudo"] = self.c.pseudo * self.supervised(batch.pseudo.image, batch.pseudo.label)
        return terms

    def divergence(self, image):
        with torch.no_grad():
            q = sum(torch.softmax(teacher(image), 1) for teacher in self.teachers) / len(self.teachers)
        p, shown, total = torch.softmax(self.net(image), 1), (image > 0).any(1), 0.0
        for k in range(3):
            total = total + (q[:, k] * torch.log(q[:, k] / p[:, k]))[shown].sum()
        return total / shown.sum()


class NaiveRegions(Naive):
    """Pixels inside the boxes copied one by one."""

    def terms(self, batch):
        terms = {"mixed": self.supervised(*self.mix(batch.labelled, batch.source))}
        if batch.pseudo:
            terms["mixed pseudo"] = self.c.pseudo * self.supervised(*self.mix(batch.pseudo, batch.source))
        return terms

    @staticmethod
    def mix(real, source):
        image, label = real.image.clone(), real.label.clone()
        boxes = cutmix_boxes(real.seeds, *image.shape[-2:])
        for b in range(len(image)):
            for y, x in boxes[b, 0].nonzero().tolist():
                image[b, :, y, x] = source.image[b % len(source.image), :, y, x]
                label[b, y, x] = source.label[b % len(source.image), y, x]
        return image, label


TWO_LEVELS = {"network": "deeplabv2_multi", "auxiliary": 0.3}
CASES = {
    "student": (student, NaiveStudent, SEMI, {}),
    "student, weights": (student, NaiveStudent, SEMI, {"distillation": 2.0, "labelled": 0.7}),
    "student, pseudo-labels": (student, NaiveStudent, (*SEMI, Stream.PSEUDO), {"pseudo": 0.6}),
    "student, two levels": (student, NaiveStudent, (*SEMI, Stream.PSEUDO), TWO_LEVELS),
    "regions": (regions, NaiveRegions, SUPERVISED, {}),
    "regions, pseudo-labels": (regions, NaiveRegions, (*SUPERVISED, Stream.PSEUDO), {"pseudo": 0.6}),
    "regions, two levels": (regions, NaiveRegions, (*SUPERVISED, Stream.PSEUDO), TWO_LEVELS),
}


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_formula(case):
    make, plain, streams, settings = CASES[case]
    method = make(streams, **settings)
    naive, engine = plain(method), lend_engine(method)
    for step in range(2):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=2e-5)
    assert_same_weights(method.segmenter, naive.net)


def test_the_defaults_are_the_published_ones():
    """Pseudo-labels count as real ones do: in the publication both are one pool."""
    assert DLDMConfig().model_dump(exclude=OURS) == {"distillation": 0.5, "labelled": 1, "pseudo": 1}
    assert RegionMixConfig().model_dump(exclude=OURS) == {"pseudo": 1}


# --------------------------------------------------------------------------------------------------------- student


def test_the_teachers_stay_as_they_are():
    method = student()
    before = copy.deepcopy(method.teachers.state_dict())
    advance(lend_engine(method), method.train(), batch(0, SEMI))
    assert not any(module.training for module in method.teachers.modules())
    assert all(torch.equal(before[key], value) for key, value in method.teachers.state_dict().items())
    assert all(p.grad is None for p in method.teachers.parameters())
    optimised = {id(p) for group in method.optimised()["segmenter"].groups for p in group["params"]}
    assert optimised == {id(p) for p in method.segmenter.parameters()}


class Sure(nn.Module):
    """A network that is certain of one class, as float32 softmax gives it: the others round to 0."""

    def __init__(self, label):
        super().__init__()
        self.label = label

    def forward(self, image):
        logits = torch.full((len(image), len(CLASSES.classes), *image.shape[-2:]), -200.0)
        logits[:, self.label] = 200.0
        return logits


def test_teachers_that_contradict_each_other_teach_both():
    """q = (1/2, 1/2, 0); a student of equal probabilities is log 3 - log 2 away. No term is infinite."""
    method = student()
    method.teachers.network = Ensemble([Sure(0), Sure(1)], "probabilities")
    method.segmenter = nn.Identity()
    seen = replace(block(0), image=torch.ones(2, 3, 8, 8))
    assert method._divergence(seen).item() == pytest.approx(torch.log(torch.tensor(1.5)).item(), rel=1e-5)


def test_a_student_that_equals_its_only_teacher_learns_nothing_from_it():
    method = student()
    method.teachers.network = copy.deepcopy(method.segmenter).eval()
    method.segmenter.eval()
    assert method._divergence(block(0)).item() == pytest.approx(0, abs=1e-6)


def test_a_student_without_teachers_is_refused():
    with pytest.raises(ConfigError, match="teacher: missing"):
        DLDM(DLDMConfig(), task(SEMI))


def test_no_synthetic_picture_is_seen():
    assert Stream.SOURCE not in DLDM.needs | DLDM.optional


# --------------------------------------------------------------------------------------------------------- regions


@pytest.mark.parametrize(("pictures", "sources"), [(2, 1), (1, 4), (3, 2)])
def test_blocks_of_any_size_are_mixed_and_kept(pictures, sources):
    """Every pixel comes, with its label, from the real picture or from its synthetic partner at the same place."""
    real, source = block(1, pictures), block(2, sources)
    kept = copy.deepcopy((real, source))
    mixed = region_mix(real, source)
    assert mixed.image.shape == real.image.shape
    box = cutmix_boxes(real.seeds, *real.image.shape[-2:])[:, 0]
    for b in range(pictures):
        partner, inside = b % sources, box[b]
        assert torch.equal(mixed.image[b][:, inside], source.image[partner][:, inside])
        assert torch.equal(mixed.label[b][inside], source.label[partner][inside])
        assert torch.equal(mixed.image[b][:, ~inside], real.image[b][:, ~inside])
        assert torch.equal(mixed.label[b][~inside], real.label[b][~inside])
    for now, then in zip((real, source), kept, strict=True):
        assert torch.equal(now.image, then.image)
        assert torch.equal(now.label, then.label)


def test_unlabelled_pixels_are_mixed_as_such():
    real, source = block(1), block(2)
    source.label.fill_(IGNORE)
    label = region_mix(real, source).label
    box = cutmix_boxes(real.seeds, *label.shape[-2:])[:, 0]
    assert (label[box] == IGNORE).all()
    assert box.any()


def test_pictures_of_two_sizes_are_refused():
    with pytest.raises(ConfigError, match=r"augment\.crop"):
        region_mix(block(1), block(2, height=40))
