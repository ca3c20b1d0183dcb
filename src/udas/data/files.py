"""Decoding of pictures and label files. Whatever cannot be read completely is a `DataError` that names the file."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from udas.config import Size
from udas.errors import DataError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What counts as a picture; other files that a pattern meets are passed over."""

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 are the quarter turns
_UNREADABLE = (OSError, RuntimeError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)


def read_image(path: Path) -> Tensor:
    """A picture as uint8 [3, H, W], RGB, turned upright by its EXIF orientation as every viewer does.

    Raises:
        DataError: missing, unreadable or truncated file.
    """
    with _reading(path):
        content = path.read_bytes()
        if not content.startswith((_JPEG, _PNG)):
            with Image.open(path) as picture:
                return _upright_rgb(picture)
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        image = decode_image(data, ImageReadMode.RGB, apply_exif_orientation=True)
        shallow: Tensor = functional.to_dtype(image, torch.uint8, scale=True)  # 16-bit PNGs come as uint16
        return shallow


def _upright_rgb(picture: Image.Image) -> Tensor:
    """What Pillow opened, uint8 [3, H, W]; 16 bits are scaled to 8, as those of PNG are."""
    if picture.mode in ("I", "F"):
        raise ValueError(f"{picture.mode}: pixels of 32 bits have no range that is known")
    if picture.mode.startswith("I;16"):
        deep = np.array(picture).astype(np.float32) / 257
        picture = Image.fromarray(deep.round().astype(np.uint8))
    return torch.from_numpy(np.array(ImageOps.exif_transpose(picture).convert("RGB"))).permute(2, 0, 1)


def image_size(path: Path) -> Size:
    """Height and width of a picture, from its header and EXIF orientation alone.

    Raises:
        DataError: missing or unreadable file.
    """
    with _reading(path), Image.open(path) as picture:
        width, height = picture.size
        turned = picture.format in ("JPEG", "PNG", "WEBP") and picture.getexif().get(_ORIENTATION, 1) >= 5
        return (width, height) if turned else (height, width)


def read_label(path: Path, channel: int | None = None) -> NDArray[Any]:
    """The values of a label file: ids [H, W], or colours [H, W, 3] of a file with several channels.

    A palette PNG gives its indices. PNGs with several 16-bit channels (SYNTHIA) go through torchvision, since Pillow
    reduces them to 8 bits.

    Args:
        path: the label file.
        channel: the channel that holds the id; None keeps RGB as colours. A file with one channel ignores it.

    Raises:
        DataError: missing, unreadable or truncated file, or no such channel.
    """
    with _reading(path):
        raw = _decode_wide(path) if _is_wide_png(path) else _decode(path)
    if raw.ndim == 2:
        return raw
    if channel is not None and channel >= raw.shape[2]:
        raise DataError(
            f"{path}: has {raw.shape[2]} channels, so `channel: {channel}` does not exist (they count from 0)"
        )
    if channel is not None or raw.shape[2] == 2:  # two channels: grey and alpha
        return raw[..., channel or 0]
    return raw[..., :3]


def resize_image(image: Tensor, size: Size | None) -> Tensor:
    """The picture, uint8 [3, H, W], at `size` (height, width): bilinear, with antialiasing."""
    if size is None or tuple(image.shape[1:]) == tuple(size):
        return image
    resized: Tensor = functional.resize(image, list(size), antialias=True)
    return resized


def resize_label(label: Tensor, size: Size | None) -> Tensor:
    """The label, uint8 [H, W], at `size` (height, width): the nearest pixel by pixel centres."""
    if size is None or tuple(label.shape) == tuple(size):
        return label
    resized: Tensor = functional.resize(label[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
    return resized


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        reason = re.sub(r"^.*\.cpp:\d+, ", "", reason)  # torchvision begins with a place in its source
        raise DataError(f"{path}: cannot be read, perhaps truncated ({reason}); replace or remove it") from None


def _is_wide_png(path: Path) -> bool:
    with path.open("rb") as file:
        header = file.read(26)
    # Bytes 24 and 25 of the header: bits per channel, and colour type (2 RGB, 4 grey + alpha, 6 RGB + alpha).
    return header.startswith(_PNG) and header[24:25] == b"\x10" and header[25:26] in (b"\x02", b"\x04", b"\x06")


def _decode_wide(path: Path) -> NDArray[Any]:
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    image: Tensor = decode_image(data, ImageReadMode.UNCHANGED)
    return image.permute(1, 2, 0).numpy()


def _decode(path: Path) -> NDArray[Any]:
    with Image.open(path) as picture:
        if picture.mode == "1":  # grey with one bit is 0 and 255, as every other reader says
            return np.array(picture.convert("L"))
        if picture.mode in ("CMYK", "YCbCr"):
            return np.array(picture.convert("RGB"))
        return np.array(picture)
