"""Depthwise convolutions whose backward pass is fast on CPUs.

The CPU kernels that PyTorch has for the two gradients of a depthwise convolution take up to a hundred times as long as
its forward kernel where it is dilated, strided in bf16 or wider than 3x3, and with them two thirds of the training step
of an EfficientNet. Both gradients are depthwise convolutions themselves, which that fast forward kernel can compute:

    dx = z(dy) * flip(w)      z: zeros where stride 1 would have put a pixel
    dw = x * dy               stride and dilation exchanged, each picture by itself, then the sum over pictures
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

Pair = tuple[int, int]


class DepthwiseConv2d(nn.Conv2d):
    """A drop-in for a depthwise `nn.Conv2d` or timm's `Conv2dSame`; it takes over the parameters themselves."""

    def __init__(self, conv: nn.Conv2d) -> None:
        padding = conv.padding
        assert not isinstance(padding, str)
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            (conv.stride[0], conv.stride[1]),
            (padding[0], padding[1]),
            (conv.dilation[0], conv.dilation[1]),
            conv.groups,
            bias=False,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.same = isinstance(conv, Conv2dSame)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H', W'], values as of the convolution it replaces."""
        if self.same:
            input = pad_same(input, list(self.kernel_size), list(self.stride), list(self.dilation))
        if not (input.is_cpu and torch.is_grad_enabled()):
            return super().forward(input)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            input, weight = input.to(dtype), weight.to(dtype)
        output: Tensor = _Depthwise.apply(input, weight, self.stride, self.padding, self.dilation)
        return output if self.bias is None else output + self.bias.to(output.dtype).view(1, -1, 1, 1)


def use_fast_depthwise(module: nn.Module) -> None:
    """Replace the depthwise convolutions below `module` by `DepthwiseConv2d`, in place; names and values stay."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Conv2d, Conv2dSame) and _is_depthwise(cast(nn.Conv2d, child)):
                setattr(parent, name, DepthwiseConv2d(cast(nn.Conv2d, child)))


def _is_depthwise(conv: nn.Conv2d) -> bool:
    padded_with_zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return 1 < conv.groups == conv.in_channels == conv.out_channels and padded_with_zeros


class _Depthwise(torch.autograd.Function):
    """conv2d(x, w) with as many groups as channels, and the two gradients in the form that is fastest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation
        return F.conv2d(x, weight, None, stride, padding, dilation, len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        dx = _input_gradient(grad, x, weight, *ctx.geometry) if ctx.needs_input_grad[0] else None
        dw = _weight_gradient(grad, x, weight, *ctx.geometry) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Gradient z(dy) * flip(w), [B, C, H, W]."""
    margins = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[-2:], padding, strict=True)]
    fast_as_it_is = x.dtype == torch.float32 and stride != (1, 1)
    if fast_as_it_is or min(margins) < 0:
        return _library_gradients(grad, x, weight, stride, padding, dilation, [True, False, False])[0]
    if stride != (1, 1):
        reach = [size + p - m for size, p, m in zip(x.shape[-2:], padding, margins, strict=True)]
        grad = _spread(grad, stride, reach)
    return F.conv2d(grad, weight.flip(-1, -2), None, 1, margins, dilation, len(weight))


def _spread(grad: Tensor, stride: Pair, size: Sequence[int]) -> Tensor:
    """The gradient of an output of this size that stride 1 would have had: zero where the stride stepped over."""
    spread = grad.new_zeros(grad.shape[0], *size, grad.shape[1]).permute(0, 3, 1, 2)
    spread[..., :: stride[0], :: stride[1]] = grad
    return spread


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Gradient x * dy, [C, 1, k, k]."""
    kernel = weight.shape[-2:]
    if max(kernel) <= 3 and dilation == (1, 1):  # the library's own is as fast
        return _library_gradients(grad, x, weight, stride, padding, dilation, [False, True, False])[1]
    planes = x.contiguous().view(1, -1, *x.shape[-2:])
    kernels = grad.contiguous().view(-1, 1, *grad.shape[-2:])
    dw = F.conv2d(planes, kernels, None, dilation, padding, stride, planes.shape[1])
    return dw[..., : kernel[0], : kernel[1]].reshape(len(x), *weight.shape).sum(0)


def _library_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, wanted: list[bool]
) -> list[Tensor]:
    """PyTorch's own gradients with respect to x, weight and bias."""
    gradients: list[Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], len(weight), wanted
    )
    return gradients
