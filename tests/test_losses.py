"""Losses against the formula written pixel by pixel; ignored pixels count nowhere, and nothing is ever NaN."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from udas.losses import (
    binary_cross_entropy,
    cross_entropy,
    entropy,
    outputs_cross_entropy,
    robust_entropy,
    self_information,
    squared_distance,
)
from udas.taxonomy import IGNORE

CLASSES = 4


def drawn(seed, ignored=0.3, count=2, height=5, width=7):
    """Logits [B, C, H, W] and labels [B, H, W] of which a share is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, CLASSES, height, width, generator=generator)
    label = torch.randint(CLASSES, (count, height, width), generator=generator)
    label[torch.rand(label.shape, generator=generator) < ignored] = IGNORE
    return logits, label


def by_hand(logits, label, class_weight=None, pixel_weight=None, hard_share=1.0):
    """The mean over the labelled pixels that count, with loops and Python's floats."""
    terms = []
    for b, y, x in (label != IGNORE).nonzero().tolist():
        scores, truth = logits[b, :, y, x].double().tolist(), int(label[b, y, x])
        loss = math.log(sum(math.exp(s) for s in scores)) - scores[truth]
        loss *= 1 if class_weight is None else float(class_weight[truth])
        terms.append((loss, 1 if pixel_weight is None else float(pixel_weight[b, y, x])))
    terms = sorted(terms, reverse=True)[: len(terms) - math.floor(round((1 - hard_share) * len(terms), 4))]
    return sum(loss * weight for loss, weight in terms) / max(len(terms), 1)


@pytest.mark.parametrize("ignored", [0, 0.3])
def test_is_pytorchs_where_pytorch_has_it(ignored):
    logits, label = drawn(1, ignored)
    expected = F.cross_entropy(logits, label, ignore_index=IGNORE)
    torch.testing.assert_close(cross_entropy(logits, label), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([0, 0.3, 0.9]), st.booleans(), st.booleans(), st.sampled_from([1, 0.5, 0.2])
)
def test_is_the_formula(seed, ignored, by_class, by_pixel, hard_share):
    logits, label = drawn(seed, ignored)
    classes = torch.tensor([0.5, 1.0, 2.0, 7.0]) if by_class else None
    pixels = torch.rand(label.shape, generator=torch.Generator().manual_seed(seed)) if by_pixel else None
    found = cross_entropy(logits, label, classes, pixels, hard_share).item()
    assert found == pytest.approx(by_hand(logits, label, classes, pixels, hard_share), rel=1e-5, abs=1e-6)


def test_hard_share_keeps_the_hardest_valid_pixels():
    """Eight of ten pixels are labelled; the hardest quarter are two of them, not one in four of all ten."""
    losses = torch.tensor([0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5, 9.0, 9.0])
    logits = torch.stack([torch.zeros(10), (losses.exp() - 1).log()])[None, :, None].requires_grad_()
    label = torch.tensor([0] * 8 + [IGNORE] * 2)[None, None]
    loss = cross_entropy(logits, label, hard_share=0.25)
    loss.backward()
    assert loss.item() == pytest.approx((0.8 + 0.7) / 2, rel=1e-5)
    assert logits.grad.abs().sum((0, 1, 2)).nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize("ignored", [0, 30, 900])
@pytest.mark.parametrize(("hard_share", "kept"), [(0.1, 10), (0.2, 20), (0.7, 70), (0.9, 90), (0.055, 6), (1.0, 100)])
def test_hard_share_is_exact_however_many_pixels_are_ignored(hard_share, kept, ignored):
    logits = torch.randn(1, CLASSES, 1, 100 + ignored, generator=torch.Generator().manual_seed(3)).requires_grad_()
    label = torch.full((1, 1, 100 + ignored), IGNORE)
    label[..., :100] = 2
    cross_entropy(logits, label, hard_share=hard_share).backward()
    assert int((logits.grad.abs().sum(1) > 0).sum()) == kept


def test_confidence_does_not_decide_what_is_hard():
    logits, label = torch.tensor([[[[0.0, 0.0]], [[3.0, 1.0]]]]), torch.zeros(1, 1, 2).long()
    weight = torch.tensor([[[0.1, 1.0]]])
    expected = 0.1 * F.cross_entropy(logits[..., :1], label[..., :1])
    torch.testing.assert_close(cross_entropy(logits, label, pixel_weight=weight, hard_share=0.5), expected)


def test_further_outputs_are_weighted_as_the_main_one():
    (main, label), (second, _), (third, _) = drawn(1), drawn(2), drawn(3)
    classes, pixels = torch.tensor([0.5, 1.0, 2.0, 7.0]), torch.rand(label.shape)
    first, *others = (by_hand(logits, label, classes, pixels, 0.5) for logits in (main, second, third))
    found = outputs_cross_entropy((main, second, third), label, classes, pixels, 0.5, auxiliary=0.3)
    assert found.item() == pytest.approx(first + 0.3 * sum(others), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hard_share", [1.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_any_label_there_is_nothing_to_learn(dtype, hard_share, weighted):
    logits, label = drawn(4)
    logits, label = logits.to(dtype).requires_grad_(), torch.full_like(label, IGNORE)
    weights = (torch.rand(CLASSES).to(dtype), torch.rand(label.shape)) if weighted else (None, None)
    loss = cross_entropy(logits, label, *weights, hard_share)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_ignored_pixels_have_no_gradient():
    logits, label = drawn(5, 0.5)
    logits.requires_grad_()
    cross_entropy(logits, label).backward()
    assert torch.equal(logits.grad.abs().sum(1) > 0, label != IGNORE)


@pytest.mark.parametrize("target", [0.0, 0.9, 1.0])
def test_adversaries(target):
    output = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(6))
    values = output.flatten().tolist()
    squares = sum((v - target) ** 2 for v in values) / len(values)
    sure = [1 / (1 + math.exp(-v)) for v in values]
    entropies = sum(-target * math.log(s) - (1 - target) * math.log(1 - s) for s in sure) / len(values)
    assert squared_distance(output, target).item() == pytest.approx(squares, rel=1e-5)
    assert binary_cross_entropy(output, target).item() == pytest.approx(entropies, rel=1e-5)


@pytest.mark.parametrize("eta", [0.5, 2.0, 3.0])
def test_robust_entropy_is_the_formula(eta):
    logits, _ = drawn(3)
    total = 0.0
    for b, y, x in torch.ones(2, 5, 7).nonzero().tolist():
        powers = [math.exp(score) for score in logits[b, :, y, x].double().tolist()]
        shares = [power / sum(powers) for power in powers]
        share = -sum(p * math.log(p) for p in shares) / math.log(CLASSES)
        total += (share * share + 1e-8) ** eta / (2 * 5 * 7)
    assert robust_entropy(logits, eta).mean().item() == pytest.approx(total, rel=1e-5)


def test_robust_entropy_at_its_ends():
    same, sure = torch.zeros(1, CLASSES, 2, 3), torch.zeros(1, CLASSES, 2, 3)
    sure[:, 1] = 300.0
    assert robust_entropy(same).mean().item() == pytest.approx(1)
    assert 0 <= robust_entropy(sure).max().item() < 1e-15
    for logits in (same, sure):
        logits.requires_grad_()
        robust_entropy(logits).mean().backward()
        assert logits.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------------- entropy


def test_self_information_is_the_formula():
    probabilities = drawn(3)[0].softmax(1)
    expected = torch.zeros_like(probabilities)
    for place in torch.ones_like(probabilities).nonzero().tolist():
        share = probabilities[tuple(place)].item()
        expected[tuple(place)] = -share * math.log2(share) / math.log2(CLASSES)
    torch.testing.assert_close(self_information(probabilities), expected)


def test_self_information_adds_up_to_the_entropy():
    logits, _ = drawn(4)
    torch.testing.assert_close(self_information(logits.softmax(1)).sum(1), entropy(logits))


def test_entropy_of_equal_and_of_sure_predictions():
    """1 and 1/C in every channel where all classes are equal, exactly 0 where one has all; no NaN at log 0."""
    equal, sure = torch.zeros(1, CLASSES, 2, 3), torch.zeros(1, CLASSES, 2, 3)
    sure[:, 2] = 200.0
    torch.testing.assert_close(entropy(equal), torch.ones(1, 2, 3))
    torch.testing.assert_close(self_information(equal.softmax(1)), torch.full_like(equal, 1 / CLASSES))
    for information in (entropy, lambda logits: self_information(logits.softmax(1))):
        logits = sure.clone().requires_grad_()
        found = information(logits)
        assert found.abs().max() == 0
        found.sum().backward()
        assert logits.grad.isfinite().all()


def test_entropy_falls_towards_the_likelier_classes():
    """dE/dz_k = -p_k (log p_k + H) / log C, H the entropy in nats: descent raises what is likelier than exp(-H)."""
    logits = drawn(5)[0].requires_grad_()
    entropy(logits).sum().backward()
    share = logits.detach().softmax(1)
    nats = -(share * share.log()).sum(1, keepdim=True)
    torch.testing.assert_close(logits.grad, -share * (share.log() + nats) / math.log(CLASSES), atol=1e-6, rtol=1e-4)
    assert torch.equal(logits.grad < 0, share > (-nats).exp())
