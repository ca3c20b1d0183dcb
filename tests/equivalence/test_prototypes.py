"""Prototypes by hand: distances, weights that sum to one, moving means, and classes that nobody has seen."""

from __future__ import annotations

import pytest
import torch

from udas.config import NetworkConfig
from udas.data.batch import IGNORE
from udas.methods.prototypes import FAR, Prototypes, class_means
from udas.networks.segmenters import Outputs, build_segmenter

VECTORS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [5.0, 5.0]])  # class 2 was never seen


def made(**settings):
    return Prototypes(VECTORS, **settings)


def features(*points):
    """[1, D, 1, N] of points."""
    return torch.tensor(points, dtype=torch.float32).T[None, :, None]


def test_distances_are_euclidean_and_not_squared():
    found = made().distances(features((4.0, 4.0), (1.0, 0.0)))[0, :, 0]
    torch.testing.assert_close(found[:, 0], torch.tensor([5.0, 5.0, FAR, 2**0.5]))
    torch.testing.assert_close(found[:, 1], torch.tensor([0.0, 2**0.5, FAR, 41**0.5]))


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_weights_sum_to_one_and_are_equal_at_equal_distances(tau):
    prototypes = made(temperature=tau)
    weights = prototypes.weights(torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 3, 5))
    tie = prototypes.weights(features((0.5, 0.5)))[0, :, 0, 0]
    assert tie[0] == tie[1]
    ratio = (prototypes.weights(features((1.0, 0.0)))[0, :, 0, 0]).log()
    assert (ratio[0] - ratio[1]).item() == pytest.approx(tau * 2**0.5, rel=1e-5)


def test_a_class_that_was_never_seen_attracts_nothing():
    """Not even a feature that sits on its row of zeros; and gradients stay finite."""
    at = features((0.0, 0.0), (0.1, 0.0)).requires_grad_()
    prototypes = made()
    assert (prototypes.weights(at)[:, 2] == 0).all()
    target = prototypes.weights(at).detach().flip(3)
    (target * prototypes.log_weights(at)).sum().backward()
    assert at.grad.isfinite().all()
    assert at.grad.any()


def test_with_no_class_seen_all_weigh_the_same():
    weights = Prototypes(torch.zeros(4, 2)).weights(features((3.0, 1.0)))
    torch.testing.assert_close(weights, torch.full((1, 4, 1, 1), 0.25))


def test_a_feature_on_its_prototype_has_a_finite_gradient():
    at = features((1.0, 0.0)).requires_grad_()
    made().log_weights(at)[:, 1].sum().backward()
    assert at.grad.isfinite().all()


def test_update_by_hand():
    """Two pictures in turn; class 0 has too few pixels in the second, class 2 is new, void counts nowhere."""
    prototypes = made(decay=0.9, minimum=2)
    label = torch.tensor([[[0, 0, 2, 2, 2, IGNORE]], [[0, 3, 3, 2, 2, IGNORE]]])
    points = torch.arange(24, dtype=torch.float32).view(2, 2, 1, 6)
    prototypes.update(points, label)
    expected = VECTORS.clone()
    expected[0] = 0.9 * VECTORS[0] + 0.1 * torch.tensor([0.5, 6.5])  # pixels 0, 1 of picture 0
    first, second = torch.tensor([3.0, 9.0]), torch.tensor([15.5, 21.5])
    expected[2] = 0.9 * first + 0.1 * second
    expected[3] = 0.9 * VECTORS[3] + 0.1 * torch.tensor([13.5, 19.5])
    torch.testing.assert_close(prototypes.vectors, expected)
    assert prototypes.seen.all()


def test_what_it_remembers_is_in_the_state():
    prototypes, other = made(decay=0.5, minimum=1), made(decay=0.5, minimum=1)
    prototypes.update(torch.ones(1, 2, 1, 3), torch.full((1, 1, 3), 2))
    other.load_state_dict(prototypes.state_dict())
    assert torch.equal(other.vectors[2], torch.ones(2))
    assert other.seen[2]
    assert torch.equal(VECTORS[2], torch.zeros(2)), "the tensor it was made of is not its own"


def test_half_precision_features_are_compared_in_full_precision():
    at = torch.full((1, 2, 2, 16), 100.0)
    vectors = torch.tensor([[100.0, 100.5], [100.5, 100.0]])
    with torch.autocast("cpu", torch.bfloat16):
        distance = Prototypes(vectors).distances(at.bfloat16())
        means, _ = class_means(at.bfloat16(), torch.zeros(1, 2, 16, dtype=torch.long), 1)
    torch.testing.assert_close(distance, torch.full((1, 2, 2, 16), 0.5), rtol=0.02, atol=0)
    torch.testing.assert_close(means, torch.full((1, 1, 2), 100.0))


def test_labels_at_the_features_size():
    logits = torch.zeros(1, 3, 8, 12)
    logits[:, 1, :, :6], logits[:, 2, :, 6:] = 1, 1
    assert Outputs((logits,), torch.zeros(1, 7, 2, 4)).labels().tolist() == [[[1, 1, 2, 2]] * 2]


@pytest.mark.parametrize("align_corners", [True, False])
def test_maps_are_resized_as_the_logits_were(align_corners):
    """The places of the features lie where the logits were enlarged from."""
    small = torch.randn(1, 3, 4, 7)
    shape = (4 * 8 - 7, 7 * 8 - 7) if align_corners else (4 * 9, 7 * 9)  # on whole pixels
    large = torch.nn.functional.interpolate(small, shape, mode="bilinear", align_corners=align_corners)
    outputs = Outputs((large,), small, align_corners)
    assert torch.equal(outputs.labels(), small.argmax(1))
    torch.testing.assert_close(outputs.resized(small, shape), large)


def test_a_network_says_how_it_enlarges():
    for align_corners in (True, False):
        config = NetworkConfig(name="fcn", encoder="test_resnet", weights=None, align_corners=align_corners)
        assert build_segmenter(config, 3).eval().outputs(torch.rand(1, 3, 64, 64)).align_corners == align_corners
