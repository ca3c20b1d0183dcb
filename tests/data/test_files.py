from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from little_domain import mask, message
from picture_files import noise, write, write_palette, write_png16
from udas.data.files import image_size, read_image, read_label
from udas.errors import DataError

# ------------------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_picture(tmp_path: Path, suffix: str) -> None:
    content = write(tmp_path / f"whole.{suffix}", noise(24, 24)).read_bytes()
    whole = read_image(tmp_path / f"whole.{suffix}")
    refused = 0
    for cut in range(0, len(content), 29):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(content[:cut])
        try:
            assert torch.equal(read_image(path), whole)  # only the end mark may be lost
        except DataError as error:
            refused += str(path) in str(error)
    assert refused >= len(range(0, len(content), 29)) - 3


@pytest.mark.parametrize("kind", ["palette", "wide", "jpeg"])
def test_truncated_label(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("label.jpg" if kind == "jpeg" else "label.png")
    values = noise(24, 24)
    makers = {"palette": lambda: write_palette(path, values[..., 0]), "wide": lambda: write_png16(path, values)}
    makers.get(kind, lambda: write(path, values))()
    whole, content = read_label(path), path.read_bytes()
    refused = 0
    for cut in range(0, len(content), 31):
        path.write_bytes(content[:cut])
        try:
            assert (read_label(path) == whole).all()
        except DataError as error:
            refused += str(path) in str(error)
    assert refused >= len(range(0, len(content), 31)) - 3


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", zlib.compress(b"x")]
)
def test_files_that_are_no_pictures(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    for read in (read_image, read_label, image_size):
        text = message(DataError, read, path)
        assert text.startswith(f"{path}: cannot be read, perhaps truncated (")


def test_missing_files_and_folders_in_their_place(tmp_path: Path) -> None:
    for read in (read_image, read_label, image_size):
        assert message(DataError, read, tmp_path / "x.png") == f"{tmp_path}/x.png: no such file"
        assert "cannot be read" in message(DataError, read, tmp_path)


# --------------------------------------------------------------------------------------------------------- file forms


def test_palette_gives_indices(tmp_path: Path) -> None:
    ids = np.array([[7, 34, 0], [255, 11, 26]])
    assert read_label(write_palette(tmp_path / "x.png", ids)).tolist() == ids.tolist()


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_wide_png_keeps_sixteen_bits(tmp_path: Path, channels: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 65536, (5, 7, channels))
    path = write_png16(tmp_path / "x.png", pixels)
    for channel in range(channels):
        assert (read_label(path, channel) == pixels[..., channel]).all()
    plain = read_label(path)
    assert (plain == (pixels[..., 0] if channels == 2 else pixels[..., :3])).all()


def test_one_channel_of_sixteen_bits(tmp_path: Path) -> None:
    values = np.array([[26000, 7]], np.uint16)
    assert read_label(write(tmp_path / "x.png", values)).tolist() == [[26000, 7]]


def test_channels_of_eight_bits(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 4, 4), np.uint8)
    path = write(tmp_path / "x.png", pixels)
    assert (read_label(path) == pixels[..., :3]).all()
    assert (read_label(path, 2) == pixels[..., 2]).all()
    grey = write(tmp_path / "grey.png", pixels[..., 0])
    assert (read_label(grey, 0) == pixels[..., 0]).all()
    opened_file = write(tmp_path / "rgb.png", pixels[..., :3])
    text = message(DataError, read_label, opened_file, 3)
    assert text == f"{opened_file}: has 3 channels, so `channel: 3` does not exist (they count from 0)"


def test_grey_and_alpha_is_grey(tmp_path: Path) -> None:
    pixels = np.stack([mask(), mask() * 0], axis=-1)
    Image.fromarray(pixels, mode="LA").save(tmp_path / "x.png")
    assert (read_label(tmp_path / "x.png") == mask()).all()


def test_one_bit_labels_are_0_and_255(tmp_path: Path) -> None:
    Image.fromarray(mask() == 7).save(tmp_path / "x.png")
    assert read_label(tmp_path / "x.png").tolist() == [[0] * 8] + [[255] * 8] * 5


@pytest.mark.parametrize("form", ["L", "RGBA", "P", "CMYK", "bmp", "webp", "tif"])
def test_pictures_of_other_forms_come_as_rgb(tmp_path: Path, form: str) -> None:
    plain = Image.fromarray(np.full((6, 8, 3), 120, np.uint8))
    suffix = {"CMYK": "jpg"}.get(form, "png" if form.isupper() else form)
    converted = plain.quantize() if form == "P" else plain.convert(form if form.isupper() else "RGB")
    converted.save(tmp_path / f"x.{suffix}")
    image = read_image(tmp_path / f"x.{suffix}")
    assert image.shape == (3, 6, 8)
    assert image.dtype == torch.uint8
    assert (image.int() - 120).abs().max() <= 2
    assert image_size(tmp_path / f"x.{suffix}") == (6, 8)


def test_picture_of_sixteen_bits(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 65536, (5, 7, 3))
    image = read_image(write_png16(tmp_path / "x.png", pixels))
    assert image.dtype == torch.uint8
    assert torch.equal(image.permute(1, 2, 0).int(), torch.from_numpy(pixels // 256).int())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path: Path, orientation: int) -> None:
    halves = np.zeros((16, 32, 3), np.uint8)
    halves[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(halves).save(tmp_path / "x.jpg", exif=exif, quality=100)
    image = read_image(tmp_path / "x.jpg")
    assert image_size(tmp_path / "x.jpg") == tuple(image.shape[1:]) == ((16, 32) if orientation < 5 else (32, 16))
    bright = {1: (0, 0), 2: (0, 31), 3: (15, 31), 4: (15, 0), 5: (0, 0), 6: (0, 15), 7: (31, 15), 8: (31, 0)}
    assert image[0][bright[orientation]] > 200


def test_png_bytes_are_really_sixteen_bit(tmp_path: Path) -> None:
    """The writer of the tests: Pillow opens its files, and sees eight bits of the sixteen."""
    path = write_png16(tmp_path / "x.png", np.full((2, 2, 3), 0x1234))
    assert np.array(Image.open(path))[0, 0, 0] == 0x12


def test_grey_of_sixteen_bits_is_scaled_whatever_the_format(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    for suffix in ("png", "tif"):
        Image.fromarray(ramp).save(tmp_path / f"ramp.{suffix}")
    png, tif = (read_image(tmp_path / f"ramp.{suffix}").int() for suffix in ("png", "tif"))
    assert tif.shape == (3, 8, 8)
    assert (png - tif).abs().max() <= 1
    assert (int(tif.min()), int(tif.max())) == (0, 255)


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float.tif: .*no range that is known"):
        read_image(tmp_path / "float.tif")


def test_webp_stands_upright_too(tmp_path: Path) -> None:
    picture, exif = Image.new("RGB", (6, 4)), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.webp", exif=exif)
    assert read_image(tmp_path / "turned.webp").shape == (3, 6, 4)
    assert image_size(tmp_path / "turned.webp") == (6, 4)
