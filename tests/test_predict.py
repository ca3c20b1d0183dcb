from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from udas.config import NetworkConfig
from udas.errors import DataError, RunError
from udas.evaluation.protocols import ProtocolConfig
from udas.networks.segmenters import build_segmenter
from udas.networks.weights import load_segmenter, save_segmenter
from udas.predict import find_pictures, legend, predict
from udas.taxonomy import Taxonomy

SPACE = Taxonomy("three", ("road", "sky", "car"), ((128, 64, 128), (70, 130, 180), (0, 0, 142)))
CPU = torch.device("cpu")


def colour(image):
    return 10 * image


def draw(path, seed=0, size=(9, 13)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def run(inputs, out, **keys):
    return predict(colour, SPACE, [str(text) for text in inputs], out, CPU, **keys)


@pytest.fixture
def folder(tmp_path):
    for k, name in enumerate(("a.png", "b/c.png", "b/d.png")):
        draw(tmp_path / "in" / name, k, (9, 13 + k % 2))
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    return tmp_path / "in"


def test_masks_hold_ids_in_the_colours_of_the_classes(folder, tmp_path):
    masks = run([folder], tmp_path / "out")
    assert [mask.relative_to(tmp_path / "out").as_posix() for mask in masks] == [
        "masks/a.png",
        "masks/b/c.png",
        "masks/b/d.png",
    ]
    for name in ("a", "b/c", "b/d"):
        pixels = np.array(Image.open(folder / f"{name}.png"))
        mask = Image.open(tmp_path / "out" / "masks" / f"{name}.png")
        assert mask.mode == "P"
        assert np.array_equal(np.array(mask), pixels.argmax(2))
        assert np.array_equal(np.array(mask.convert("RGB")), SPACE.colourise(pixels.argmax(2)))
        assert Image.open(tmp_path / "out" / "overlays" / f"{name}.jpg").size == mask.size
    assert (tmp_path / "out" / "legend.png").exists()


def test_overlays_can_be_left_out(folder, tmp_path):
    run([folder], tmp_path / "out", overlay=False)
    assert not (tmp_path / "out" / "overlays").exists()


def test_masks_have_the_size_of_the_picture_whatever_the_network_sees(folder, tmp_path):
    run([folder / "a.png"], tmp_path / "out", protocol=ProtocolConfig(input=(32, 32), compare=(5, 5), flips=True))
    assert Image.open(tmp_path / "out" / "masks" / "a.png").size == (13, 9)


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (["."], ["a", "b/c", "b/d"]),
        (["b"], ["c", "d"]),
        (["a.png"], ["a"]),
        (["a.png", "b/c.png"], ["a", "b/c"]),
        (["b/c.png", "b/d.png"], ["c", "d"]),
        (["b/*.png"], ["c", "d"]),
        (["**/?.png"], ["a", "b/c", "b/d"]),
        (["*/c.png"], ["b/c"]),
        (["b", "b/c.png"], ["c", "d"]),
    ],
)
def test_names_keep_the_structure_below_what_was_given(folder, inputs, names):
    found = find_pictures([str(folder / text) for text in inputs])
    assert [source.name for source in found] == names


def test_relative_inputs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [source.name for source in find_pictures(["b/c.png", "a.png"])] == ["a", "b/c"]
    assert [source.name for source in find_pictures(["*.png"])] == ["a"]


@pytest.mark.parametrize("text", ["nothing", "b/*.jpg", "empty"])
def test_nothing_found_names_the_input(folder, text):
    (folder / "empty").mkdir()
    with pytest.raises(DataError) as error:
        find_pictures([str(folder / text)])
    assert str(folder / text) in str(error.value)


def test_two_pictures_of_one_name_are_refused(folder):
    draw(folder / "a.jpg")
    with pytest.raises(DataError, match="both results would be called a"):
        find_pictures([str(folder)])


def test_broken_pictures_are_reported_after_all_others_are_done(folder, tmp_path):
    (folder / "b" / "broken.png").write_bytes((folder / "b" / "c.png").read_bytes()[:200])
    (folder / "0.jpg").write_text("no picture at all")
    steps = []
    with pytest.raises(DataError) as error:
        run([folder], tmp_path / "out", progress=lambda done, total: steps.append((done, total)))
    text = str(error.value)
    assert text.startswith("2 of 5 pictures could not be read")
    assert str(folder / "b" / "broken.png") in text
    assert str(folder / "0.jpg") in text
    written = sorted(path.name for path in (tmp_path / "out" / "masks").rglob("*.png"))
    assert written == ["a.png", "c.png", "d.png"]


def test_where_no_picture_can_be_read_there_are_no_others(folder, tmp_path):
    (folder / "0.jpg").write_text("no picture at all")
    with pytest.raises(DataError, match=r"^no picture could be read\n  .*0\.jpg"):
        run([folder / "0.jpg"], tmp_path / "out")


def test_a_truncated_photo_is_broken_not_half_grey(folder, tmp_path):
    path = folder / "photo.jpg"
    draw(path, 0, (64, 64))
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match=r"photo\.jpg"):
        run([path], tmp_path / "out")


def test_long_lists_of_broken_pictures_are_cut(tmp_path):
    for k in range(30):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{k:02}.png").write_text("broken")
    with pytest.raises(DataError, match="and 10 more"):
        run([tmp_path / "in"], tmp_path / "out")


def test_pictures_are_never_replaced(tmp_path):
    draw(tmp_path / "masks" / "a.png")
    before = (tmp_path / "masks" / "a.png").read_bytes()
    with pytest.raises(DataError, match=r"a\.png: a result would replace this picture"):
        run([tmp_path / "masks"], tmp_path)
    with pytest.raises(DataError, match="would replace"):
        run([tmp_path / "masks" / "a.png"], tmp_path)
    assert (tmp_path / "masks" / "a.png").read_bytes() == before
    assert not (tmp_path / "legend.png").exists()


@pytest.mark.parametrize("text", [".", "**/*.png"])
def test_results_inside_the_searched_folder_are_refused(folder, text):
    with pytest.raises(DataError, match="choose a folder outside"):
        run([folder / text], folder / "out")


def test_results_beside_single_files_are_fine(folder):
    run([folder / "a.png", folder / "*.png"], folder / "out")
    assert (folder / "out" / "masks" / "a.png").exists()


def test_grey_and_transparent_pictures_are_read_as_rgb(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "grey.png")
    Image.new("RGBA", (4, 4), (0, 0, 255, 10)).save(tmp_path / "glass.png")
    run([tmp_path / "*.png"], tmp_path / "out")
    assert np.array(Image.open(tmp_path / "out" / "masks" / "glass.png")).tolist() == [[2] * 4] * 4


def test_a_full_disk_is_a_readable_error(folder, tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match=r"cannot be written \(No space left on device"):
        run([folder], tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_mask_that_cannot_be_written_stops_the_work(folder, tmp_path):
    (tmp_path / "out" / "masks" / "a.png").mkdir(parents=True)
    with pytest.raises(RunError, match=r"a\.png: cannot be written"):
        run([folder / "a.png"], tmp_path / "out")


def test_writing_threads_are_gone_afterwards(folder, tmp_path):
    run([folder], tmp_path / "out")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("write", "decode"))]


def test_a_saved_model_is_loaded_with_its_label_space(folder, tmp_path):
    config = NetworkConfig(name="deeplabv3plus", encoder="resnet10t", weights=None)
    torch.manual_seed(0)
    segmenter = build_segmenter(config, 3, pretrained=False).eval()
    save_segmenter(tmp_path / "model.safetensors", segmenter, SPACE)
    loaded, space = load_segmenter(tmp_path / "model.safetensors")
    (mask,) = predict(loaded, space, [str(folder / "a.png")], tmp_path / "out", CPU)
    with torch.no_grad():
        image = torch.from_numpy(np.array(Image.open(folder / "a.png"))).permute(2, 0, 1)[None] / 255
        assert np.array_equal(np.array(Image.open(mask)), segmenter(image).argmax(1)[0].numpy())


def test_legend_shows_every_colour():
    colours = {colour for _, colour in legend(SPACE).getcolors(100_000)}
    assert set(SPACE.colours) <= colours
