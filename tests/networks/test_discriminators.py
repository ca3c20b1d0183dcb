from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from udas.errors import DataError
from udas.losses import squared_distance
from udas.networks.discriminators import (
    MultiScaleDiscriminator,
    NLayerDiscriminator,
    PatchDiscriminator,
    PixelDiscriminator,
)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (70, 129)])
def test_patch_scores_have_a_thirty_second_of_the_size(height, width):
    critic = PatchDiscriminator(5, width=4)
    assert critic(torch.rand(2, 5, height, width)).shape == (2, 1, height // 32, width // 32)


def test_patch_is_the_published_network():
    critic = PatchDiscriminator(19)
    widths = [19, 64, 128, 256, 512, 1]
    assert parameters(critic) == sum(16 * a * b + b for a, b in pairwise(widths))


def test_patch_is_linear_with_slope_a_fifth_below_zero():
    critic = PatchDiscriminator(1, width=1)
    convolutions = [m for m in critic.modules() if isinstance(m, torch.nn.Conv2d)]
    for convolution in convolutions:
        torch.nn.init.zeros_(convolution.bias)
        torch.nn.init.constant_(convolution.weight, 1 / convolution.weight[0].numel())
    inner = torch.full((1, 1, 512, 512), -1.0)
    score = critic(inner)[0, 0, 8, 8].item()
    assert score == pytest.approx(-(0.2**4), rel=1e-5)


@pytest.mark.parametrize(("side", "expected"), [(128, [16, 8, 4]), (100, [13, 7, 4]), (9, [2, 1, 1])])
def test_scales_halve(side, expected):
    scores = MultiScaleDiscriminator(3, width=4)(torch.rand(2, 3, side, side))
    assert [score.shape for score in scores] == [(2, 1, n, n) for n in expected]


def test_scales_see_averages_of_the_input():
    critic = MultiScaleDiscriminator(2, width=4)
    critic.scales[1].load_state_dict(critic.scales[0].state_dict())
    image = torch.rand(1, 2, 32, 32)
    halved = torch.nn.functional.avg_pool2d(image, 3, 2, 1, count_include_pad=False)
    torch.testing.assert_close(critic(image)[1], critic(halved)[0])


def test_scales_are_separate_networks_of_the_published_size():
    critic = MultiScaleDiscriminator(19)
    one = sum(9 * a * b + b for a, b in [(19, 32), (32, 32), (32, 32), (32, 32), (32, 64)] + 8 * [(64, 64)]) + 65
    assert parameters(critic) == 3 * one


def test_scales_have_the_published_strides_and_slopes():
    scale = MultiScaleDiscriminator(19).scales[0]
    assert [m.stride[0] for m in scale if isinstance(m, torch.nn.Conv2d)] == [2, 1, 2, 1, 2, 1]
    slopes = [m.negative_slope for m in scale.modules() if isinstance(m, torch.nn.LeakyReLU)]
    assert slopes == [0.2] * (4 + 4 * 2)


def test_blocks_of_a_scale_add_to_what_they_are_given():
    """With weights of zero in all four of them the score is still one of the picture."""
    critic = MultiScaleDiscriminator(3, width=4, scales=1)
    for block in critic.scales[0][9:13]:
        for parameter in block.parameters():
            torch.nn.init.zeros_(parameter)
    (score,) = critic(torch.rand(1, 3, 64, 64))
    assert score.std() > 0


def test_constant_pictures_have_no_border_in_the_pooled_scales():
    """A padding that counts would darken the border of every coarser scale."""
    seen = []
    critic = MultiScaleDiscriminator(1, width=2)
    for scale in critic.scales:
        scale.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    critic(torch.ones(1, 1, 33, 33))
    assert [tuple(x.shape[-2:]) for x in seen] == [(33, 33), (17, 17), (9, 9)]
    assert all(torch.equal(x, torch.ones_like(x)) for x in seen)


@pytest.mark.parametrize(("height", "width"), [(24, 24), (128, 128), (100, 256), (71, 65)])
def test_layers_give_an_eighth_less_two(height, width):
    critic = NLayerDiscriminator(3, width=4)
    assert critic(torch.rand(2, 3, height, width)).shape == (2, 1, height // 8 - 2, width // 8 - 2)


@pytest.mark.parametrize(("layers", "patch"), [(2, 34), (3, 70)])
def test_layers_judge_patches(layers, patch):
    """The gradient of one score reaches exactly patch x patch pixels (norms, which see the whole picture, left out)."""
    critic = NLayerDiscriminator(3, width=8, layers=layers)
    for place, module in enumerate(critic.layers):
        if isinstance(module, torch.nn.InstanceNorm2d):
            critic.layers[place] = torch.nn.Identity()
    image = torch.rand(1, 3, 160, 160, requires_grad=True)
    scores = critic(image)
    middle = scores.shape[-1] // 2
    scores[0, 0, middle, middle].backward()
    touched = image.grad.abs().sum((0, 1)) > 0
    assert touched.any(0).sum() == touched.any(1).sum() == patch


def test_layers_are_the_published_network():
    published = 2_764_737  # parameters, of which the biases before the three norms have no effect
    assert parameters(NLayerDiscriminator(3)) == published - (128 + 256 + 512)


def test_layers_refuse_pictures_without_a_score():
    critic = NLayerDiscriminator(3, width=2)
    critic(torch.rand(1, 3, 24, 24))
    with pytest.raises(DataError, match="a picture of 23 x 40: the discriminator needs sides of at least 24"):
        critic(torch.rand(1, 3, 23, 40))


def test_layers_are_normalised_but_for_the_first_and_last():
    layers = NLayerDiscriminator(3).layers
    normalised = ["Conv2d", "InstanceNorm2d", "LeakyReLU"]
    assert [type(m).__name__ for m in layers] == ["Conv2d", "LeakyReLU", *normalised * 3, "Conv2d"]
    assert {m.negative_slope for m in layers if isinstance(m, torch.nn.LeakyReLU)} == {0.2}


@pytest.mark.parametrize("kind", [NLayerDiscriminator, MultiScaleDiscriminator])
def test_weights_begin_small(kind):
    torch.manual_seed(0)
    weights = torch.cat([p.flatten() for p in kind(3).parameters() if p.dim() > 1])
    assert weights.mean().item() == pytest.approx(0, abs=1e-4)
    assert weights.std().item() == pytest.approx(0.02, rel=1e-2)


def test_pixels_are_judged_alone():
    torch.manual_seed(0)
    critic = PixelDiscriminator(5, width=8, dropout=0)
    image = torch.rand(2, 5, 3, 4)
    verdict = critic(image)
    assert verdict.shape == (2, 2, 3, 4)
    changed = image.clone()
    changed[0, :, 1, 2] += 1
    other = (critic(changed) != verdict).any(1)
    assert other.nonzero().tolist() == [[0, 1, 2]]


def test_pixel_critic_is_the_published_network():
    assert parameters(PixelDiscriminator(19)) == (19 + 1) * 512 + (512 + 1) * 256 + (256 + 1) * 2


def test_pixel_critic_drops_whole_channels_while_it_learns():
    torch.manual_seed(0)
    critic = PixelDiscriminator(3, width=64)
    critic.layers[-1] = torch.nn.Identity()
    features = critic(torch.rand(1, 3, 8, 8))[0]
    assert ((features == 0).all((1, 2)).float().mean() > 0.3).item()
    critic.eval()
    assert torch.equal(critic(image := torch.rand(1, 3, 8, 8)), critic(image))


@pytest.mark.parametrize(
    "critic",
    [
        PatchDiscriminator(3, 8),
        MultiScaleDiscriminator(3, 8),
        NLayerDiscriminator(3, 8),
        PixelDiscriminator(3, 8, dropout=0),
    ],
)
def test_scores_are_float32_in_mixed_precision_and_close_to_exact(critic):
    torch.manual_seed(0)
    image = torch.rand(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rough = critic(image)
    exact = critic(image)
    pairs = zip(rough, exact, strict=True) if isinstance(rough, list) else [(rough, exact)]
    for a, b in pairs:
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 0.05 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize(("target", "loss"), [(1.0, (0 + 1 + 4 + 1) / 4), (0.0, (1 + 0 + 9 + 4) / 4)])
def test_least_squares_by_hand(target, loss):
    assert squared_distance(torch.tensor([[1.0, 0.0], [3.0, 2.0]]), target).item() == pytest.approx(loss)
