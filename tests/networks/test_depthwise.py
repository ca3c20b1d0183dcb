"""The fast depthwise convolution computes what PyTorch's own computes, gradients included, and changes no names."""

import itertools

import pytest
import torch
from segmentation_models_pytorch.decoders.deeplabv3.decoder import SeparableConv2d
from timm.layers import Conv2dSame
from torch import nn

from udas.config import NetworkConfig
from udas.networks.depthwise import DepthwiseConv2d, use_fast_depthwise
from udas.networks.segmenters import build_segmenter

GEOMETRIES = [
    (kernel, stride, dilation, padding)
    for kernel, stride, dilation, padding in itertools.product((2, 3, 5), (1, 2), (1, 2), (0, 1, 4, 9))
    if dilation * (kernel - 1) < 13
]


def outcome(conv: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of input, weight and bias."""
    image = image.clone().requires_grad_()
    output = conv(image)
    parameters = [parameter for parameter in (conv.weight, conv.bias) if parameter is not None]
    cotangent = torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, [image, *parameters], cotangent)]


@pytest.mark.parametrize(("kernel", "stride", "dilation", "padding"), GEOMETRIES)
def test_output_and_gradients_are_those_of_pytorch(kernel: int, stride: int, dilation: int, padding: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups=4).double()
    image = torch.randn(3, 4, 14, 13, dtype=torch.double)
    for expected, got in zip(outcome(conv, image), outcome(DepthwiseConv2d(conv), image), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_of_timm(stride: int) -> None:
    conv = Conv2dSame(4, 4, 5, stride, groups=4, bias=False)
    image = torch.randn(2, 4, 12, 15)
    for expected, got in zip(outcome(conv, image), outcome(DepthwiseConv2d(conv), image), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 2, 1), (5, 1, 2)])
def test_under_autocast_gradients_stay_close_to_float32(kernel: int, stride: int, dilation: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, kernel, stride, kernel // 2 * dilation, dilation, groups=8)
    image = torch.randn(2, 8, 16, 16)
    expected = outcome(conv, image)
    with torch.autocast("cpu", torch.bfloat16):
        got = outcome(DepthwiseConv2d(conv), image)
    assert got[0].dtype == torch.bfloat16
    assert got[2].dtype == torch.float32
    for reference, value in zip(expected, got, strict=True):
        assert (value.float() - reference).norm() < 0.02 * reference.norm()


def test_a_second_derivative_is_that_of_pytorch() -> None:
    conv = nn.Conv2d(3, 3, 5, 1, 4, 2, groups=3, bias=False).double()
    image = torch.randn(1, 3, 7, 7, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(DepthwiseConv2d(conv), (image,))


def test_only_depthwise_convolutions_are_replaced_and_the_parameters_stay_the_same_objects() -> None:
    block = SeparableConv2d(6, 8, 3, padding=1)
    before = dict(block.named_parameters())
    use_fast_depthwise(block)
    assert [type(layer) for layer in block] == [DepthwiseConv2d, nn.Conv2d]
    after = dict(block.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


def test_a_network_uses_them_in_encoder_and_decoder() -> None:
    network = NetworkConfig(name="deeplabv3plus", encoder="tf_efficientnet_lite0", weights=None)
    segmenter = build_segmenter(network, classes=5)
    halves = [segmenter.encoder, segmenter.decoder]
    assert all(any(isinstance(part, DepthwiseConv2d) for part in half.modules()) for half in halves)
    slow = [m for m in segmenter.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    assert all(isinstance(conv, DepthwiseConv2d) for conv in slow)
