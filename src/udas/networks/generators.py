"""The generator of CycleGAN, and the translator made of it that repaints pictures of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from udas.config import Config
from udas.errors import DataError, WeightsError
from udas.networks.discriminators import full_precision, init_gan
from udas.storage import in_order, write_atomically
from udas.validation import validate

STRIDE = 4  # two halvings; the sides of a generator's input are multiples of this
SMALLEST = 8  # below, the innermost features have a side of 1 and cannot be reflected
FORMAT = "udas-translator-1"


class GeneratorConfig(Config):
    """A ResNet generator."""

    width: int = Field(64, gt=0, description="channels of the first convolution; four times that in the blocks")
    blocks: int = Field(9, ge=0, description="residual blocks; the paper takes 6 for sides of 128, 9 for 256 and more")
    upsample: Literal["transposed", "bilinear"] = Field(
        "transposed", description="transposed: the paper's; bilinear: resize then convolve, no checkerboard"
    )
    residual: bool = Field(
        False,
        description="paint the change of the picture: begins as the identity, for short trainings",
    )


class ResnetGenerator(nn.Module):
    """CycleGAN's generator (Zhu et al., ICCV 2017, appendix 7.2): c7s1-w, d2w, d4w, R4w x blocks, u2w, uw, c7s1-3.

    Reflection padding, instance norm without parameters, ReLU, tanh at the end. Weights from N(0, 0.02), biases zero.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        up = {"transposed": _transposed, "bilinear": _bilinear}[config.upsample]
        self.layers = nn.Sequential(
            *_normed(_reflected(3, width, 7), width),
            *_normed(_halved(width, 2 * width), 2 * width),
            *_normed(_halved(2 * width, 4 * width), 4 * width),
            *(_Residual(4 * width) for _ in range(config.blocks)),
            *_normed(up(4 * width, 2 * width), 2 * width),
            *_normed(up(2 * width, width), width),
            _reflected(width, 3, 7, bias=True),
        )
        self.apply(init_gan)

    def forward(self, image: Tensor) -> Tensor:
        """Repaint RGB [B, 3, H, W] in [-1, 1]; the result is float32 of the same size.

        Its range is (-1, 1), except of a `residual` generator: cut off there, what is once painted white or black
        would have no gradient and stay so. The translator cuts.

        Raises:
            DataError: when H or W is not a multiple of 4, or below 8.
        """
        height, width = image.shape[-2:]
        if height % STRIDE or width % STRIDE or min(height, width) < SMALLEST:
            raise DataError(
                f"a picture of {height} x {width}: the generator is trained on sides that are multiples of {STRIDE} "
                f"and at least {SMALLEST}; set the crop so"
            )
        painted = full_precision(self.layers(image))  # bfloat16 has too few steps near white and black
        return image + painted if self.config.residual else torch.tanh(painted)


class Translator(nn.Module):
    """A generator as the rest of the program sees it: RGB [0, 1] in, RGB [0, 1] out, any size."""

    def __init__(self, generator: ResnetGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, image: Tensor) -> Tensor:
        """Repaint [B, 3, H, W] in [0, 1]; the result is float32 of the same size, aligned pixel for pixel.

        The picture is continued at the right and bottom by reflection up to sides the generator takes, and cut back.

        Raises:
            DataError: when a side is below 5 pixels.
        """
        height, width = image.shape[-2:]
        if min(height, width) <= SMALLEST // 2:
            raise DataError(
                f"a picture of {height} x {width}: a translator needs sides of at least {SMALLEST // 2 + 1}"
            )
        padded = F.pad(image, (0, _missing(width), 0, _missing(height)), mode="reflect")
        result: Tensor = self.generator(2 * padded - 1)[..., :height, :width]
        return ((result + 1) / 2).clamp(0, 1)


def save_translator(path: Path, translator: Translator) -> None:
    """Write weights (safetensors, float32) with the generator's settings in the header; replaces `path` in one move.

    Raises:
        RunError: when the file cannot be written.
    """
    state = {name: value.float().cpu().contiguous() for name, value in translator.generator.state_dict().items()}
    metadata = {"format": FORMAT, "generator": translator.generator.config.model_dump_json()}
    write_atomically(path, in_order(save(state, metadata)))


def load_translator(path: Path) -> Translator:
    """Read what `save_translator` wrote, on the CPU.

    Raises:
        WeightsError: when the file is missing, damaged, or no translator of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"{path}: not a translator ({FORMAT}); its format is {metadata.get('format', 'unknown')}")
    generator = ResnetGenerator(validate(GeneratorConfig, json.loads(metadata["generator"]), str(path)))
    try:
        generator.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"{path}: its weights do not fit its settings: {error}") from None
    return Translator(generator)


def _missing(side: int) -> int:
    return max(SMALLEST - side, -side % STRIDE)


# The convolutions below have no bias where an instance norm follows, which would subtract it again.


def _normed(convolution: nn.Module, channels: int) -> tuple[nn.Module, ...]:
    return convolution, nn.InstanceNorm2d(channels), nn.ReLU()


def _reflected(before: int, after: int, kernel: int, bias: bool = False) -> nn.Module:
    return nn.Conv2d(before, after, kernel, padding=kernel // 2, padding_mode="reflect", bias=bias)


def _halved(before: int, after: int) -> nn.Module:
    return nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)


def _transposed(before: int, after: int) -> nn.Module:
    return nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1, bias=False)


def _bilinear(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), _reflected(before, after, 3))


class _InstanceNorm(nn.InstanceNorm2d):
    """Instance norm that may stand before something else than an activation.

    On CPUs PyTorch (2.15) reads the gradient of a single picture as if it were contiguous, and so gives a wrong one
    when it is in channels_last; an activation behind the norm happens to make it contiguous.
    """

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x)
        if result.requires_grad:
            result.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]
        return result


class _Residual(nn.Module):
    """x + norm(conv(relu(norm(conv(x)))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = _reflected(width, width, 3), _reflected(width, width, 3)
        self.body = nn.Sequential(*_normed(first, width), second, _InstanceNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result
