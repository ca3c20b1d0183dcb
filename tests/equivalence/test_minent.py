"""MinEnt against its step written a second time, and the direction of its gradient."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from equivalence.adversarial import (
    MULTI,
    PSEUDO,
    SGD,
    SOURCE,
    STEPS,
    NaiveNetwork,
    assert_same_changes,
    batch,
    by_softmax,
    make,
    weights,
)
from equivalence.stepping import advance, lend_engine
from udas.data.batch import IGNORE, Stream
from udas.losses import entropy
from udas.methods.minent import MinEnt


def naive_entropy(logits):
    """Sum over classes and pixels of -P log2 P / log2 C, divided by the number of pixels."""
    probability, total = by_softmax(logits), 0.0
    for c in range(logits.shape[1]):
        total = total - (probability[:, c] * torch.log2(probability[:, c])).sum() / math.log2(logits.shape[1])
    return total / logits[:, 0].numel()


def naive_step(player, batch, t):
    torch.manual_seed(t)
    player.sgd.zero_grad()
    _, losses, _ = player.learn_all(batch)
    target = player.net.levels(batch.unlabelled.image)
    loss = player.config.entropy * naive_entropy(target[0])
    if len(target) == 2:
        loss = loss + player.config.entropy_auxiliary * naive_entropy(target[1])
    loss.backward()
    player.sgd.step()
    return losses | {"entropy": loss.item()}


def test_black_borders_are_no_place_to_be_sure():
    """What a zoom leaves black has no part in the entropy."""
    method, seen = make(MinEnt, SOURCE, entropy=1.0).eval(), batch(0, SOURCE)
    seen.unlabelled.image[:, :, :, 32:] = 0
    with torch.no_grad():
        logits = copy.deepcopy(method.segmenter)(seen.unlabelled.image)
    losses = advance(lend_engine(method, STEPS), method, seen)
    assert losses["entropy"] == pytest.approx(entropy(logits)[:, :, :32].mean().item())
    assert losses["entropy"] != pytest.approx(entropy(logits).mean().item(), rel=1e-4)


CASES = {
    "one level": (SOURCE, {"entropy": 0.1}),
    "two levels": (SOURCE, {"network": MULTI, "auxiliary": 0.3, "entropy": 0.1, "entropy_auxiliary": 0.05}),
    "pseudo-labels in place of the source": (PSEUDO, {"entropy": 0.1}),
    "real labels too": ((*SOURCE, Stream.LABELLED), {"entropy": 0.1, "labelled": 0.7}),
    "two levels, real labels too": (
        (*SOURCE, Stream.LABELLED),
        {"network": MULTI, "auxiliary": 0.3, "entropy": 0.1, "labelled": 0.7},
    ),
    "real labels that are not used": ((*SOURCE, Stream.LABELLED), {"entropy": 0.1, "labelled": 0}),
}


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_formula(case):
    streams, settings = CASES[case]
    method = make(MinEnt, streams, **settings)
    naive, engine = NaiveNetwork(method), lend_engine(method, STEPS)
    start = weights(method.segmenter)
    for step in range(2):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive_step(naive, seen, step), rel=2e-5)
    assert_same_changes(start, weights(method.segmenter), weights(naive.net))


def test_target_predictions_get_surer():
    """Without any label, a step lowers the entropy of the target's predictions."""
    gentle = SGD | {"lr": 1e-2, "momentum": 0, "weight_decay": 0}
    method, seen = make(MinEnt, SOURCE, entropy=1.0, optimiser=gentle), batch(0, SOURCE)
    seen.source.label.fill_(IGNORE)

    def unsure():
        torch.manual_seed(0)
        with torch.no_grad():
            return entropy(method.segmenter(seen.unlabelled.image)).mean().item()

    before = unsure()
    assert advance(lend_engine(method), method, seen)["source"] == 0
    assert unsure() < before


def test_the_defaults_are_the_published_weights():
    method = make(MinEnt, SOURCE, MULTI)
    assert (method.config.auxiliary, method.lambda_ent) == (0.1, [1e-3, 2e-4])
