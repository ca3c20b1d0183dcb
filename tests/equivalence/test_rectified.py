"""Rectified pseudo-labels against the formula pixel by pixel."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from equivalence.small import block, naive_cross_entropy, task
from equivalence.stepping import advance, assert_same_weights, lend_engine
from udas.data.batch import IGNORE, Batch, Stream
from udas.errors import ConfigError
from udas.losses import balanced_cross_entropy, cross_entropy, kl_divergence, rectified_cross_entropy
from udas.methods.rectified import Rectified, RectifiedConfig
from udas.validation import validate

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
BOTH = (Stream.PSEUDO, Stream.LABELLED)


def make(streams=(Stream.PSEUDO,), network="deeplabv2_multi", **settings):
    config = validate(RectifiedConfig, {"optimiser": SGD, "rare_share": 0.27} | settings, "test")
    torch.manual_seed(3)
    return Rectified(config, task(streams, network))


def batch(step, streams):
    pseudo = block(10 * step, height=9, width=12)
    pseudo.label[pseudo.label == step % 3] = (step + 1) % 3
    return Batch(pseudo=pseudo, labelled=block(10 * step + 1) if Stream.LABELLED in streams else None)


class Naive:
    def __init__(self, method):
        self.config, self.net = method.config, copy.deepcopy(method.segmenter)
        self.sgd = torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        self.often = [1.0] * 3

    def step(self, batch, t):
        torch.manual_seed(t)
        c, label = self.config, batch.pseudo.label
        main, aux = self.net.levels(batch.pseudo.image)
        weights = []
        for k in range(3):
            count = int((label == k).sum())
            self.often[k] = 0.9 * self.often[k] + 0.1 * (c.rare_weight if count == 0 else 1)
            weights.append(self.often[k] * (c.rare_weight if count < c.rare_share * label.numel() else 1))
        if c.plain is None:
            losses = [rectified(main, aux, label, weights), rectified(aux, main, label, weights)]
        else:
            losses = [plain(z, label, weights) for z in (main, aux)]
        terms = {"pseudo": losses[0] + c.auxiliary * losses[1]}
        if batch.labelled is not None:
            main, aux = (naive_cross_entropy(z, batch.labelled.label) for z in self.net.levels(batch.labelled.image))
            terms["labelled"] = c.labelled * (main + c.auxiliary * aux)
        self.sgd.zero_grad()
        sum(terms.values()).backward()
        self.sgd.step()
        return {name: term.item() for name, term in terms.items()}


def rectified(logits, other, label, weights):
    """Pixel by pixel: how far the classifiers are apart, and what that makes of the cross-entropy."""
    terms = []
    for b, y, x in (label != IGNORE).nonzero().tolist():
        p, q = torch.softmax(logits[b, :, y, x], 0), torch.softmax(other[b, :, y, x], 0)
        distance = sum(q[k] * torch.log(q[k] / p[k]) for k in range(3))
        k = int(label[b, y, x])
        terms.append(torch.exp(-distance) * weights[k] * -torch.log(p[k]) + distance)
    return torch.stack(terms).mean()


def plain(logits, label, weights):
    """Pixel by pixel: sum of w_y l over the sum of w_y."""
    found = []
    for b, y, x in (label != IGNORE).nonzero().tolist():
        k = int(label[b, y, x])
        found.append((weights[k] * -torch.log(torch.softmax(logits[b, :, y, x], 0)[k]), weights[k]))
    return sum(loss for loss, _ in found) / sum(weight for _, weight in found)


@pytest.mark.parametrize(
    ("streams", "settings"),
    [
        ((Stream.PSEUDO,), {}),
        (BOTH, {"labelled": 0.3, "auxiliary": 0.8}),
        ((Stream.PSEUDO,), {"rare_weight": 1}),
        (BOTH, {"plain": 1}),
    ],
)
def test_step_is_the_formula(streams, settings):
    method = make(streams, **settings)
    naive, engine = Naive(method), lend_engine(method)
    for step in range(2):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=5e-5)
    assert_same_weights(method.segmenter, naive.net, rtol=1e-4, atol=5e-6)


def test_plain_pseudo_labels_are_learnt_on_the_hardest_pixels():
    few, every = (make(plain=share, rare_weight=1)._learn(batch(0, ()).pseudo) for share in (0.1, 1))
    assert few > 1.2 * every


def test_one_output_is_a_mistake():
    with pytest.raises(ConfigError, match="rectified compares two outputs"):
        make(network="deeplabv3plus")


def test_pictures_without_any_label_teach_nothing():
    method = make(optimiser=SGD | {"weight_decay": 0})
    before, seen = copy.deepcopy(list(method.segmenter.parameters())), batch(0, ())
    seen.pseudo.label.fill_(IGNORE)
    assert advance(engine := lend_engine(method), method, seen) == {"pseudo": 0}
    assert engine.failure() is None
    assert all(torch.equal(old, new) for old, new in zip(before, method.segmenter.parameters(), strict=True))


# -------------------------------------------------------------------------------------------------------- the losses


def test_equal_heads_give_the_plain_cross_entropy():
    logits, label = torch.randn(2, 3, 17, 24), block(1, height=17, width=24).label
    weight = torch.tensor([1.0, 7.0, 2.0])
    found = rectified_cross_entropy(logits, logits.clone(), label, weight)
    assert found.item() == pytest.approx(cross_entropy(logits, label, weight).item(), rel=1e-5)
    shifted = rectified_cross_entropy(logits, logits + 3, label)  # softmax does not see a common shift
    assert shifted.item() == pytest.approx(cross_entropy(logits, label).item(), rel=1e-5)


def test_disagreement_discounts_the_label_and_costs():
    """p = (1/2, 1/2), q = (3/4, 1/4): D = KL(q || p) = 3/4 log 3/2 + 1/4 log 1/2."""
    p, q = torch.zeros(1, 2, 1, 1), torch.tensor([3.0, 1.0]).log().view(1, 2, 1, 1)
    apart = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    expected = math.exp(-apart) * math.log(2) + apart
    found = rectified_cross_entropy(p, q, torch.zeros(1, 1, 1, dtype=torch.long))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_gradients_flow_into_both_heads():
    first, second = (torch.randn(1, 3, 4, 4, requires_grad=True) for _ in range(2))
    rectified_cross_entropy(first, second, torch.zeros(1, 4, 4, dtype=torch.long)).backward()
    assert first.grad.abs().min() > 0
    assert second.grad.abs().min() > 0


def test_kl_divergence_is_that_of_torch():
    q, p = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    found = kl_divergence(q, p)
    reference = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=z.movedim(1, -1)) for z in (q, p))
    )
    torch.testing.assert_close(found, reference)
    assert (found >= 0).all()
    sure = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1)
    assert kl_divergence(sure, -sure).isfinite().all()


def test_balanced_cross_entropy_is_that_of_torch():
    logits, label = torch.randn(2, 3, 17, 24), block(1, height=17, width=24).label
    weight = torch.tensor([1.0, 7.0, 0.01])
    expected = torch.nn.functional.cross_entropy(logits, label, weight, ignore_index=IGNORE)
    assert balanced_cross_entropy(logits, label, weight).item() == pytest.approx(expected.item(), rel=1e-5)
    assert balanced_cross_entropy(logits, label, 5 * weight).item() == pytest.approx(expected.item(), rel=1e-5)
    assert balanced_cross_entropy(logits, torch.full_like(label, IGNORE), weight).item() == 0
