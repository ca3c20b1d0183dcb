from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from udas.errors import DataError
from udas.networks.flaw_detector import FlawDetector, IBNorm


def convolutions(detector):
    return [module for module in detector.modules() if isinstance(module, nn.Conv2d)]


def seen(detector, height, width):
    """Sizes behind every convolution."""
    sizes = []
    for convolution in convolutions(detector):
        convolution.register_forward_hook(lambda *given: sizes.append(tuple(given[2].shape[1:])))
    detector(torch.rand(2, 3, height, width), torch.rand(2, 3, height, width))
    return sizes


def test_it_is_the_published_network():
    detector = FlawDetector(19)
    widths = [22, 64, 128, 128, 256, 256, 512, 512, 1]
    layers = convolutions(detector)
    assert [(layer.in_channels, layer.out_channels) for layer in layers] == list(pairwise(widths))
    assert [layer.stride[0] for layer in layers] == [2, 2, 1, 2, 1, 2, 1, 2]
    assert {(layer.kernel_size, layer.padding) for layer in layers} == {((4, 4), (1, 1))}
    assert [m.num_features for m in detector.modules() if isinstance(m, nn.BatchNorm2d)] == [
        w // 2 for w in widths[1:-1]
    ]
    assert [type(layer) for layer in detector.layers] == [nn.Conv2d, IBNorm, nn.LeakyReLU] * 7
    assert {m.negative_slope for m in detector.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}


def test_convolutions_of_stride_1_take_a_pixel_off():
    sizes = [(4, 64, 80), (8, 32, 40), (8, 31, 39), (16, 15, 19), (16, 14, 18), (32, 7, 9), (32, 6, 8), (1, 3, 4)]
    assert seen(FlawDetector(3, width=4), 128, 160) == sizes


def test_flaws_have_the_pictures_size_with_their_corners_on_its_corners():
    detector = FlawDetector(3, width=4)
    scores = []
    detector.classifier.register_forward_hook(lambda *given: scores.append(given[2]))
    flaws = detector(torch.rand(2, 3, 90, 131), torch.rand(2, 3, 90, 131))
    assert flaws.shape == (2, 1, 90, 131)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(flaws[:, 0, *corner], scores[0][:, 0, *corner])


def test_flaws_are_found_in_full_precision():
    with torch.autocast("cpu", torch.bfloat16):
        flaws = FlawDetector(3, width=4, stages=2)(torch.rand(2, 3, 40, 64), torch.rand(2, 3, 40, 64))
    assert flaws.dtype == torch.float32


def test_flaws_are_not_bound_to_an_interval():
    detector = FlawDetector(3, width=4, stages=2)
    detector.classifier.bias.data.fill_(-7)
    assert detector(torch.rand(1, 3, 33, 48), torch.rand(1, 3, 33, 48)).max() < 0


@pytest.mark.parametrize(("stages", "smallest"), [(4, 60), (2, 12), (1, 4)])
def test_a_picture_that_is_too_small_is_named(stages, smallest):
    detector = FlawDetector(3, width=2, stages=stages)
    assert detector(*torch.rand(2, 2, 3, smallest, smallest)).shape == (2, 1, smallest, smallest)
    with pytest.raises(DataError, match=f"{smallest - 1} x 99.*at least {smallest}"):
        detector(*torch.rand(2, 2, 3, smallest - 1, 99))


def test_pictures_are_normalised_and_predictions_are_not():
    """ImageNet's mean is zero, a deviation above it one; nothing of it is in a checkpoint."""
    detector, given = FlawDetector(3, width=4, stages=2), []
    detector.layers.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    probabilities = torch.rand(2, 3, 33, 48)
    detector(torch.stack([mean, mean + std]).expand(2, 3, 33, 48), probabilities)
    expected = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 33, 48)
    torch.testing.assert_close(given[0], torch.cat([expected, probabilities], 1))
    assert not {"mean", "std"} & set(detector.state_dict())


def test_norm_is_over_the_batch_for_one_half_and_over_each_picture_for_the_other():
    x = torch.randn(3, 6, 5, 4) * torch.tensor([1.0, 5.0, 9.0])[:, None, None, None] + 2
    normed = IBNorm(6)(x)
    batch, instance = normed[:, :3], normed[:, 3:]
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-4, atol=0)
    assert batch[2].std() > 2 * batch[0].std()
    torch.testing.assert_close(instance.mean((2, 3)), torch.zeros(3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(instance.std((2, 3), correction=0), torch.ones(3, 3), rtol=1e-4, atol=0)


def test_only_batch_norm_has_scale_and_shift():
    assert {name: tuple(p.shape) for name, p in IBNorm(7).named_parameters()} == {
        "batch.weight": (4,),
        "batch.bias": (4,),
    }


def test_without_batch_norm_no_picture_sees_another():
    detector = FlawDetector(3, width=4, stages=2, batch_share=0)
    image, probabilities = torch.rand(2, 2, 3, 33, 48)
    torch.testing.assert_close(detector(image, probabilities)[:1], detector(image[:1], probabilities[:1]))
