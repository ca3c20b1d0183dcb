"""Several networks as one: the mean is the mean, of what was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiny_run import tiny_segmenter
from udas.networks.ensemble import Ensemble
from udas.networks.segmenters import Segmenter


@pytest.fixture
def networks() -> list[Segmenter]:
    made = []
    for seed, name in ((0, "fcn"), (1, "deeplabv2_multi"), (2, "deeplabv2_multi")):
        torch.manual_seed(seed)
        made.append(tiny_segmenter(name=name).eval())
    return made


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_logits_or_probabilities_are_averaged(networks: list[Segmenter], image: Tensor) -> None:
    logits = [network(image) for network in networks]
    mean = (logits[0] + logits[1] + logits[2]) / 3
    assert torch.allclose(Ensemble(networks, "logits").eval()(image), mean, atol=1e-6)
    probability = (logits[0].softmax(1) + logits[1].softmax(1) + logits[2].softmax(1)) / 3
    found = Ensemble(networks, "probabilities").eval()(image)
    assert torch.allclose(found.softmax(1), probability, atol=1e-6)
    assert not torch.allclose(mean.softmax(1), probability, atol=1e-4)


@torch.no_grad()
def test_levels_are_averaged_as_far_as_all_have_them(networks: list[Segmenter], image: Tensor) -> None:
    (main,) = Ensemble(networks, "logits").eval().levels(image)
    assert torch.equal(main, Ensemble(networks, "logits").eval()(image))
    two = Ensemble(networks[1:], "logits").eval().levels(image)
    second = (networks[1].levels(image)[1] + networks[2].levels(image)[1]) / 2
    assert len(two) == 2
    assert torch.allclose(two[1], second, atol=1e-6)


@torch.no_grad()
def test_a_class_that_no_network_sees_has_finite_logits(image: Tensor) -> None:
    sure = tiny_segmenter().eval()
    sure.decoder.load_state_dict({key: 1e4 * value for key, value in sure.decoder.state_dict().items()})
    assert sure(image).softmax(1).min() == 0
    assert Ensemble([sure, sure], "probabilities").eval()(image).isfinite().all()
