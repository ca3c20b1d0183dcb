"""FDA against its step written a second time, and what its entropy and its style must never do."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from equivalence.small import block, naive_cross_entropy, task
from equivalence.stepping import advance, assert_same_weights, lend_engine
from udas.data.batch import IGNORE, Batch, Stream
from udas.data.fourier import swap_amplitude
from udas.losses import robust_entropy
from udas.methods.fda import FDA, FDAConfig, _restyled
from udas.validation import validate

STEPS = 5
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
UDA, ALL = (Stream.SOURCE, Stream.UNLABELLED), tuple(Stream)
SELF = (*UDA, Stream.PSEUDO)


def make(streams, network="fcn", **settings):
    torch.manual_seed(3)
    return FDA(validate(FDAConfig, {"optimiser": SGD} | settings, "test"), task(streams, network, STEPS))


def batch(step, streams, count=2, targets=2):
    return Batch(
        source=block(10 * step, count),
        labelled=block(10 * step + 1, 1) if Stream.LABELLED in streams else None,
        unlabelled=block(10 * step + 2, targets, labelled=False),
        pseudo=block(10 * step + 3, targets) if Stream.PSEUDO in streams else None,
    )


class Naive:
    """Spectra as complex planes in NumPy, entropies class by class, losses summed before one backward."""

    def __init__(self, method):
        self.config, self.net = method.config, copy.deepcopy(method.segmenter)
        self.average = copy.deepcopy(method.segmenter)
        self.sgd = torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def step(self, batch, t):
        torch.manual_seed(t)
        c, terms = self.config, {}
        styled = [self.restyle(x, batch.unlabelled.image[i % 2]) for i, x in enumerate(batch.source.image)]
        terms["source"] = self.learn(self.net.levels(torch.stack(styled)), batch.source.label)
        if batch.labelled:
            terms["labelled"] = c.labelled * self.learn(self.net.levels(batch.labelled.image), batch.labelled.label)
        begun = 1.0 if t >= c.entropy_from * STEPS else 0.0
        if batch.pseudo:
            outputs = self.net.levels(batch.pseudo.image)
            terms["pseudo"] = c.pseudo * self.learn(outputs, batch.pseudo.label)
            terms["entropy"] = begun * self.unsure(outputs[0])
        elif c.entropy > 0:
            terms["entropy"] = begun * self.unsure(self.net(batch.unlabelled.image))
        self.sgd.zero_grad()
        sum(terms.values()).backward()
        self.sgd.step()
        if c.average:
            pairs = zip(self.average.state_dict().values(), self.net.state_dict().values(), strict=True)
            for mine, theirs in pairs:
                new = c.average * mine + (1 - c.average) * theirs if mine.is_floating_point() else theirs
                mine.copy_(new)
        return {name: term.item() for name, term in terms.items()}

    def restyle(self, image, other):
        planes, reach = [], int(self.config.beta * min(image.shape[-2:]))
        for mine, theirs in zip(image.double().numpy(), other.double().numpy(), strict=True):
            f, g = np.fft.fft2(mine), np.fft.fft2(theirs)
            made = f.copy()
            for v in range(-reach, reach + 1):
                for u in range(-reach, reach + 1):
                    made[v, u] = abs(g[v, u]) * np.exp(1j * np.angle(f[v, u]))
            planes.append(np.fft.ifft2(made if self.config.beta else f).real.clip(0, 1))
        return torch.from_numpy(np.stack(planes)).float()

    def learn(self, outputs, label):
        losses = [naive_cross_entropy(output, label) for output in outputs]
        return sum(share * loss for share, loss in zip((1.0, self.config.auxiliary), losses, strict=False))

    def unsure(self, logits):
        probability = logits.exp() / logits.exp().sum(1, keepdim=True)
        entropy = sum(-probability[:, k] * probability[:, k].log() for k in range(logits.shape[1]))
        share = entropy / math.log(logits.shape[1])
        return self.config.entropy * torch.mean((share**2 + 1e-8) ** self.config.eta)


CASES = {
    "adaptation": (UDA, {"beta": 0.05, "entropy": 0.5}),
    "mean colour and another power": (UDA, {"beta": 0.01, "entropy": 0.5, "eta": 1.5}),
    "no change of style": (UDA, {"beta": 0, "entropy": 0.5}),
    "style alone": (UDA, {"beta": 0.2, "entropy": 0}),
    "entropy from the third step on": (UDA, {"beta": 0.05, "entropy": 0.5, "entropy_from": 0.4}),
    "self-training": (SELF, {"beta": 0.05, "entropy": 0.5, "entropy_from": 0.4, "pseudo": 0.7}),
    "self-training without entropy": (SELF, {"beta": 0.05, "entropy": 0}),
    "real labels too, averaged": (ALL, {"beta": 0.05, "entropy": 0.5, "labelled": 0.6, "average": 0.8}),
    "two levels": (SELF, {"network": "deeplabv2_multi", "beta": 0.05, "entropy": 0.5, "auxiliary": 0.3}),
    "two levels, real labels": (
        (*UDA, Stream.LABELLED),
        {"network": "deeplabv2_multi", "beta": 0.05, "entropy": 0.5, "auxiliary": 0.3, "labelled": 0.6},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_formula(case):
    streams, settings = CASES[case]
    method = make(streams, **settings)
    naive, engine = Naive(method), lend_engine(method, STEPS)
    for step in range(3):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=2e-5)
    expected = naive.average if method.config.average else naive.net
    # the other FFT's pictures differ by 1e-7, which can switch a ReLU
    assert_same_weights(method.model(), expected, rtol=1e-4, atol=1e-4)


def test_fewer_target_pictures_lend_their_style_repeatedly():
    method, seen = make(UDA, beta=0.1), batch(0, UDA, count=5, targets=2)
    naive = Naive(method)
    assert advance(lend_engine(method), method, seen) == pytest.approx(naive.step(seen, 0), rel=2e-5)


def mean_entropy(network, image):
    with torch.no_grad():
        p = network(image).softmax(1)
    return -(p * p.log()).sum(1).mean().item()


def test_the_entropy_term_makes_the_target_surer():
    settings = {"entropy": 1.0, "optimiser": SGD | {"weight_decay": 0, "momentum": 0, "lr": 0.1}}
    method, seen = make(UDA, **settings), batch(0, UDA)
    seen.source.label.fill_(IGNORE)
    before = mean_entropy(method.segmenter, seen.unlabelled.image)
    losses = [advance(engine := lend_engine(method), method, seen) for _ in range(3)]
    assert engine.failure() is None
    assert [loss["source"] for loss in losses] == [0, 0, 0]
    assert mean_entropy(method.segmenter, seen.unlabelled.image) < before


@pytest.mark.parametrize("share", [0.4, 0.35])
def test_the_entropy_begins_at_its_step_also_in_a_training_that_is_resumed(share):
    """0.4 of five steps are two, 0.35 nearly so."""
    method, seen = make(UDA, entropy_from=share), batch(0, UDA)
    engine = lend_engine(method)
    assert [advance(engine, method, seen, step)["entropy"] > 0 for step in range(3)] == [False, False, True]
    resumed = make(UDA, entropy_from=share)
    assert advance(lend_engine(resumed), resumed, seen, step=2)["entropy"] > 0


def test_a_step_changes_no_picture():
    method, seen = make(ALL, beta=0.1), batch(0, ALL)
    kept = copy.deepcopy(seen)
    advance(lend_engine(method), method, seen)
    for stream in ALL:
        assert torch.equal(getattr(seen, stream).image, getattr(kept, stream).image)


def test_black_borders_are_no_place_to_be_sure():
    """What a zoom leaves black has no part in the entropy."""
    method, image = make(UDA, entropy=1.0), torch.rand(2, 3, 8, 12)
    lend_engine(method)
    image[:, :, :, 9:] = 0
    logits = torch.randn(2, 3, 8, 12)
    expected = robust_entropy(logits[:, :, :, :9], 2.0).mean()
    torch.testing.assert_close(method._penalty(logits, image), expected)


def test_black_borders_neither_lend_nor_take_style():
    """Pictures that a zoom leaves smaller than the crop: inside, the source takes the target's mean colour."""
    source, target = 0.3 + 0.4 * torch.rand(2, 3, 32, 32), 0.3 + 0.2 * torch.rand(2, 3, 32, 32)
    source[0, :, 20:], target[1, :, :, 24:] = 0, 0
    styled = _restyled(source, target, 0.01)
    assert not styled[0, :, 20:].any()
    inside = (styled[0, :, :20], target[0]), (styled[1], target[1, :, :, :24])
    for ours, theirs in inside:
        torch.testing.assert_close(ours.mean((1, 2)), theirs.mean((1, 2)), rtol=0, atol=1e-4)
    torch.testing.assert_close(_restyled(source[1:], target[:1], 0.1), swap_amplitude(source[1:], target[:1], 0.1))
