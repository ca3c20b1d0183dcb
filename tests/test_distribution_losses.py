"""Losses against distributions instead of labels: symmetric cross-entropy, distillation, uniformity."""

from __future__ import annotations

import math

import pytest
import torch

from udas.losses import distillation, symmetric_cross_entropy, uniformity

CLASSES = 4
SHAPE = (2, CLASSES, 5, 7)


def drawn(seed):
    return 3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


VALID = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(9)) > 0.3


def test_symmetric_cross_entropy_pixel_by_pixel():
    logits, terms = drawn(0), []
    target = drawn(1).softmax(1) * torch.tensor([1, 1, 0, 1])[:, None, None]  # zeros are clamped
    for b, y, x in VALID.nonzero().tolist():
        p, t = logits[b, :, y, x].double().softmax(0).tolist(), target[b, :, y, x].tolist()
        ce = -sum(t_k * math.log(p_k) for t_k, p_k in zip(t, p, strict=True))
        rce = -sum(max(p_k, 1e-7) * math.log(max(t_k, 1e-4)) for t_k, p_k in zip(t, p, strict=True))
        terms.append(0.1 * ce + 0.7 * rce)
    found = symmetric_cross_entropy(logits, target, VALID, 0.1, 0.7)
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert symmetric_cross_entropy(logits, target, torch.zeros_like(VALID), 1, 1) == 0


def test_a_wrong_label_costs_a_bounded_reversed_cross_entropy():
    """At most -log 1e-4, where the network is sure of another class; next to nothing where it agrees."""
    logits = torch.tensor([100.0, 0, 0, 0]).view(1, CLASSES, 1, 1)
    one_hot, valid = torch.eye(CLASSES)[:, :, None, None], torch.ones(1, 1, 1, dtype=bool)
    costs = [symmetric_cross_entropy(logits, one_hot[k : k + 1], valid, 0, 1).item() for k in range(CLASSES)]
    assert costs[0] == pytest.approx(3e-7 * -math.log(1e-4), rel=1e-3)
    assert costs[1:] == pytest.approx([-math.log(1e-4)] * 3, rel=1e-5)


def test_distillation_by_hand_and_by_gradient():
    """KL of teacher and student in this order, from log-probabilities: the gradient is (s - t) / (pixels x classes)."""
    logits, teacher = drawn(0).requires_grad_(), drawn(1).softmax(1)
    loss = distillation(logits.log_softmax(1), teacher)
    student = logits.detach().softmax(1)
    assert loss.item() == pytest.approx((teacher * (teacher / student).log()).mean().item(), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(logits.grad, (student - teacher) / logits.numel())
    some = distillation(logits.log_softmax(1), teacher, VALID)
    kept = (teacher * (teacher / student).log()).sum(1)[VALID].mean() / CLASSES
    assert some.item() == pytest.approx(kept.item(), rel=1e-5)
    assert distillation(teacher.log(), teacher).item() == pytest.approx(0, abs=1e-7)
    assert distillation(teacher.log(), teacher, torch.zeros_like(VALID)) == 0


def test_a_teacher_that_is_sure_gives_no_nan():
    teacher = torch.nn.functional.one_hot(torch.zeros(1, 2, 2, dtype=torch.long), CLASSES).movedim(3, 1).float()
    logits = torch.zeros(1, CLASSES, 2, 2, requires_grad=True)
    loss = distillation(logits.log_softmax(1), teacher)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(CLASSES) / CLASSES)
    assert logits.grad.isfinite().all()


def test_uniformity_is_least_for_equal_probabilities():
    loss = uniformity(drawn(0))
    assert loss.item() == pytest.approx(-drawn(0).softmax(1).log().mean().item(), rel=1e-6)
    assert loss > uniformity(torch.zeros(SHAPE))
    assert uniformity(torch.zeros(SHAPE)).item() == pytest.approx(math.log(CLASSES))
