"""AdaptSegNet and AdvEnt against their step written a second time, and what their adversary must never do."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from equivalence.adversarial import (
    CRITIC,
    MULTI,
    PSEUDO,
    SGD,
    SOURCE,
    STEPS,
    NaiveAdversary,
    assert_same_changes,
    batch,
    by_softmax,
    make,
    weights,
)
from equivalence.stepping import advance, lend_engine, turns
from udas.data.batch import IGNORE, Stream
from udas.methods.adaptsegnet import AdaptSegNet
from udas.methods.advent import AdvEnt
from udas.methods.adversary import FAKE, REAL, CriticOptimiser

LABELLED = Stream.LABELLED


def by_information(logits):
    """-P log2 P / log2 C, class by class."""
    probability = by_softmax(logits)
    classes = logits.shape[1]
    maps = [-probability[:, c] * torch.log2(probability[:, c]) / math.log2(classes) for c in range(classes)]
    return torch.stack(maps, 1)


SEEN = {AdaptSegNet: by_softmax, AdvEnt: by_information}
both = pytest.mark.parametrize("kind", SEEN)

CASES = {
    "one level, least squares": (SOURCE, {"gan": "least_squares", "adversarial": 0.1}),
    "two levels": (SOURCE, {"network": MULTI, "adversarial": 0.1, "adversarial_auxiliary": 0.03}),
    "two levels, least squares, affine frozen": (
        SOURCE,
        {"network": MULTI, "gan": "least_squares", "auxiliary": 0.3, "adversarial": 0.1, "norm": "affine_frozen"},
    ),
    "pseudo-labels in place of the source": (PSEUDO, {"network": MULTI, "adversarial": 0.1}),
    "real labels too": ((*SOURCE, LABELLED), {"adversarial": 0.1, "labelled": 0.7}),
    "two levels, real labels too": ((*SOURCE, LABELLED), {"network": MULTI, "auxiliary": 0.3, "labelled": 0.7}),
}


@both
@pytest.mark.parametrize("case", CASES)
def test_step_is_the_formula(kind, case):
    streams, settings = CASES[case]
    method = make(kind, streams, **settings)
    naive, engine = NaiveAdversary(method, SEEN[kind]), lend_engine(method, STEPS)
    start = weights(method.segmenter, *method.critics)
    for step in range(2):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=2e-5)
    found, expected = weights(method.segmenter, *method.critics), weights(naive.player.net, *naive.critics)
    assert_same_changes(start, found, expected)


@both
def test_each_player_moves_alone(kind):
    """The adversarial term has no gradient on the critics, nor the critics' losses one on the segmenter."""
    method = make(kind, SOURCE, MULTI)
    engine = lend_engine(method)
    players = {"segmenter": list(method.segmenter.parameters()), "critic": list(method.critics.parameters())}
    seen = turns(engine, players)
    advance(engine, method, batch(0, SOURCE))
    assert [name for name, _ in seen] == ["segmenter", "critic"]
    (_, first), (_, second) = seen
    assert True in first["segmenter"]
    assert first["critic"] == second["segmenter"] == {False}
    assert second["critic"] == {True}


@both
@pytest.mark.parametrize("gan", ["least_squares", "vanilla"])
def test_the_adversary_pulls_target_predictions_towards_the_labelled_domain(kind, gan):
    """Without any label, the critic as it was finds the target's predictions more real after the step."""
    gentle = SGD | {"lr": 1e-2, "momentum": 0, "weight_decay": 0}
    method = make(kind, SOURCE, gan=gan, adversarial=1.0, optimiser=gentle)
    critic, seen = copy.deepcopy(method.critics[0]), batch(0, SOURCE)
    seen.source.label.fill_(IGNORE)

    def verdict():
        torch.manual_seed(0)
        with torch.no_grad():
            return critic(SEEN[kind](method.segmenter(seen.unlabelled.image))).mean().item()

    before = verdict()
    losses = advance(lend_engine(method), method, seen)
    assert losses["source"] == 0
    assert FAKE < REAL
    assert before < REAL
    assert verdict() > before


@both
def test_the_critic_learns_to_tell_the_domains_apart(kind):
    method = make(
        kind,
        SOURCE,
        gan="least_squares",
        adversarial=1e-9,
        critic_optimiser=CRITIC | {"schedule": "constant"},
        optimiser=SGD | {"lr": 1e-9},
    )
    engine, seen = lend_engine(method), batch(0, SOURCE)
    losses = [advance(engine, method, seen) for _ in range(4)]
    totals = [loss["critic on source"] + loss["critic on target"] for loss in losses]
    assert totals[-1] < totals[0]


@pytest.mark.parametrize(("network", "count"), [("fcn", 1), (MULTI, 2)])
def test_one_critic_per_output(network, count):
    assert len(make(AdaptSegNet, SOURCE, network).critics) == count


def test_the_defaults_are_the_published_weights():
    """Multi-level AdaptSegNet and AdvEnt: 0.1 on the auxiliary cross-entropy, 0.001 and 0.0002 on the adversary."""
    for kind in SEEN:
        method = make(kind, SOURCE, MULTI)
        assert (method.config.auxiliary, method.lambda_adv, method.config.gan) == (0.1, [1e-3, 2e-4], "vanilla")


def test_the_critics_optimiser_is_the_published_one():
    config = CriticOptimiser()
    assert (config.name, config.lr, config.betas, config.weight_decay) == ("adam", 1e-4, (0.9, 0.99), 0)
