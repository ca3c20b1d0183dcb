"""Supervised training against its step written a second time: one summed loss, plain optimisers, the rate by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from equivalence.small import CLASSES, block, naive_cross_entropy, task
from equivalence.stepping import advance, lend_engine
from udas.data.batch import IGNORE, Batch, Stream
from udas.data.mixing import strong
from udas.errors import ConfigError
from udas.methods.supervised import Supervised, SupervisedConfig
from udas.validation import validate

STEPS = 5
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}


def make(streams, network="fcn", norm="train", **settings):
    config = validate(SupervisedConfig, settings, "test")
    return Supervised(config, task(streams, network, STEPS, norm))


def batch(step, streams):
    blocks = {stream: block(10 * step + n, confident=stream == "pseudo") for n, stream in enumerate(sorted(streams))}
    return Batch(**{str(stream): content for stream, content in blocks.items()})


class Naive:
    """L = sum over streams of w_k CE, written out; every setting is spelled as a number here."""

    def __init__(self, method, optimiser, rate, weights, losses, auxiliary=0.1, clip=None, decay=None):
        self.net = copy.deepcopy(method.segmenter)
        groups = [{"params": list(self.net.encoder.parameters())}, {"params": list(self.net.decoder.parameters())}]
        self.optimiser, self.rate = optimiser(groups), rate
        self.weights, self.losses, self.auxiliary, self.clip = weights, losses, auxiliary, clip
        self.decay, self.mean = decay, copy.deepcopy(self.net.state_dict())

    def step(self, batch, t):
        torch.manual_seed(t)
        terms = {}
        for stream in sorted(self.weights):
            shown = getattr(batch, stream)
            image = strong(shown.image, shown.seeds) if stream in self.losses.get("strong", ()) else shown.image
            confidence = shown.confidence if self.losses.get("confidence") else None
            total = 0.0
            for level, logits in enumerate(self.net.levels(image)):
                loss = naive_cross_entropy(
                    logits, shown.label, self.losses.get("classes"), confidence, self.losses.get("hard", 1.0)
                )
                total = total + (1.0 if level == 0 else self.auxiliary) * loss
            terms[stream] = self.weights[stream] * total
        self.optimiser.zero_grad()
        sum(terms.values()).backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        for group, rate in zip(self.optimiser.param_groups, self.rate(t), strict=True):
            group["lr"] = rate
        self.optimiser.step()
        for key, value in self.net.state_dict().items():
            kept = self.decay if self.decay and value.is_floating_point() else 0.0
            self.mean[key] = kept * self.mean[key] + (1 - kept) * value
        return {stream: term.item() for stream, term in terms.items()}


def plain_sgd(groups, **more):
    return torch.optim.SGD(groups, 1.0, momentum=0.9, weight_decay=5e-4, **more)


def adamw(groups):
    return torch.optim.AdamW(groups, 1.0, betas=(0.9, 0.999), weight_decay=0.01)


def poly_with_warmup(t):
    rate = 0.05 * (1 - t / STEPS) ** 0.9 * (0.1 + 0.9 * t / 2 if t < 2 else 1.0)
    return rate, 10 * rate


CASES = {
    # Adam turns the rounding noise of shifts before a batch norm, whose gradient is zero, into whole steps: none here.
    "source only, as by default": (
        {"network": "deeplabv2", "norm": "frozen"},
        {
            "optimiser": adamw,
            "rate": lambda t: [3e-4 * (1 - t / STEPS) ** 0.9] * 2,
            "weights": {"source": 1.0},
            "losses": {},
        },
    ),
    "three streams, weighted": (
        {"weights": {"pseudo": 0.5, "source": 2.0}, "confidence": False, "optimiser": SGD},
        {
            "optimiser": plain_sgd,
            "rate": lambda t: (0.05, 0.05),
            "weights": {"source": 2.0, "labelled": 1.0, "pseudo": 0.5},
            "losses": {},
        },
    ),
    "student with everything": (
        {
            "optimiser": SGD | {"schedule": "poly", "warmup": 2, "head_factor": 10, "nesterov": True, "clip": 0.2},
            "class_weights": {"sky": 3.0, "road": 0.5},
            "hard_share": 0.3,
            "confidence": True,
            "strong": True,
            "average": 0.9,
        },
        {
            "optimiser": lambda groups: plain_sgd(groups, nesterov=True),
            "rate": poly_with_warmup,
            "weights": {"labelled": 1.0, "pseudo": 1.0},
            "losses": {
                "classes": torch.tensor([0.5, 1.0, 3.0]),
                "hard": 0.3,
                "confidence": True,
                "strong": ("pseudo",),
            },
            "clip": 0.2,
            "decay": 0.9,
        },
    ),
    "two levels": (
        {"network": "deeplabv2_multi", "auxiliary": 0.3, "optimiser": SGD},
        {
            "optimiser": plain_sgd,
            "rate": lambda t: (0.05, 0.05),
            "weights": {"labelled": 1.0},
            "losses": {},
            "auxiliary": 0.3,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_formula(case):
    settings, written_out = CASES[case]
    streams = {Stream(name) for name in written_out["weights"]}
    method = make(streams, **settings)
    naive = Naive(method, **written_out)
    engine = lend_engine(method, STEPS)
    for step in range(3):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=1e-5)
    for net, expected in ((method.segmenter, naive.net.state_dict()), (method.model(), naive.mean)):
        found = net.state_dict()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value.to(found[key].dtype), rtol=1e-5, atol=2e-6, msg=key)


def test_the_average_is_the_model_and_learns_nothing_itself():
    method = make({Stream.SOURCE}, average=0.5)
    before = copy.deepcopy(method.model().state_dict())
    advance(lend_engine(method), method, batch(0, {Stream.SOURCE}))
    assert method.model() is not method.segmenter
    assert not any(parameter.requires_grad for parameter in method.model().parameters())
    for key, value in method.model().state_dict().items():
        now = method.segmenter.state_dict()[key]
        expected = (before[key] + now) / 2 if value.is_floating_point() else now
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=key)
    assert (plain := make({Stream.SOURCE})).model() is plain.segmenter


def test_pictures_without_any_label_change_nothing():
    method = make({Stream.SOURCE}, optimiser=SGD | {"weight_decay": 0})
    before = copy.deepcopy(list(method.segmenter.parameters()))
    void = block(0)
    void.label.fill_(IGNORE)
    assert advance(engine := lend_engine(method), method, Batch(source=void)) == {"source": 0}
    assert engine.failure() is None
    assert all(torch.equal(old, new) for old, new in zip(before, method.segmenter.parameters(), strict=True))


@pytest.mark.parametrize("weights", [{"weights": {"labelled": -1}}, {"class_weights": {"sky": -1}}])
def test_nothing_is_unlearnt(weights):
    with pytest.raises(ConfigError, match="greater than or equal to 0"):
        make([Stream.LABELLED], **weights)


def test_only_streams_with_labels_have_weights():
    with pytest.raises(ConfigError, match="unlabelled pictures have no loss here"):
        make([Stream.LABELLED], weights={"unlabelled": 1})


def test_a_stream_of_weight_0_does_not_pass():
    streams = [Stream.SOURCE, Stream.LABELLED]
    method = make(streams, weights={"source": 0})
    sizes = []
    method.segmenter.encoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    seen = batch(0, streams)
    assert advance(lend_engine(method), method, seen).keys() == {"labelled"}
    assert len(sizes) == 1


def test_class_weights_by_name():
    method = make({Stream.SOURCE}, class_weights={"sky": 4, "road": 0.25})
    assert method.class_weight.tolist() == [0.25, 1, 4]
    assert CLASSES.classes == ("road", "car", "sky")


def test_an_unknown_class_is_a_mistake_of_the_configuration():
    with pytest.raises(ConfigError) as caught:
        make({Stream.SOURCE}, class_weights={"raod": 4})
    assert str(caught.value) == "class_weights: three has no class 'raod'; did you mean 'road'?"
