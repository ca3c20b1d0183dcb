from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from little_domain import message
from udas.config import StreetsConfig
from udas.data.dataset import Domain, load_domain
from udas.data.streets import ensure, render
from udas.data.streets.camera import Camera, make_camera
from udas.data.streets.canvas import Canvas, Label, Layer
from udas.data.streets.looks import LOOKS
from udas.data.streets.sensor import Fog, in_fog
from udas.data.streets.shading import make_scene, shade
from udas.data.streets.street import draw_street
from udas.errors import DataError, RunError
from udas.taxonomy import load_taxonomy

SMALL = (32, 64)
LOOK_NAMES = pytest.mark.parametrize("look", ["game", "camera"])


@cache
def town(look: str) -> tuple[np.ndarray, np.ndarray]:
    pictures, labels = zip(*(render(look, 0, index, (64, 128)) for index in range(16)), strict=True)
    return np.stack(pictures), np.stack(labels)


# ------------------------------------------------------------------------------------------------------------ pictures


@LOOK_NAMES
def test_a_picture_is_a_function_of_look_seed_and_index(look: str) -> None:
    picture, label = render(look, 3, 7, SMALL)
    render(look, 3, 8, SMALL)
    again, label_again = render(look, 3, 7, SMALL)
    assert np.array_equal(picture, again)
    assert np.array_equal(label, label_again)
    for other in (render(look, 3, 8, SMALL), render(look, 4, 7, SMALL), render(look, -3, 7, SMALL)):
        assert (label != other[1]).mean() > 0.1


@pytest.mark.parametrize("size", [(128, 256), (48, 50), (31, 97)])
def test_any_size(size: tuple[int, int]) -> None:
    picture, label = render("camera", 0, 0, size)
    assert (picture.shape, picture.dtype) == ((*size, 3), np.uint8)
    assert (label.shape, label.dtype) == (size, np.uint8)


@LOOK_NAMES
def test_the_place_is_the_same_at_every_size(look: str) -> None:
    for index in range(4):
        large, small = render(look, 0, index, (128, 256))[1], render(look, 0, index, (64, 128))[1]
        assert (large[::2, ::2] == small).mean() > 0.9


@LOOK_NAMES
def test_all_classes_are_in_most_pictures_and_nothing_else(look: str) -> None:
    _, labels = town(look)
    shares = np.stack([np.bincount(label.ravel(), minlength=256) / label.size for label in labels])
    assert not shares[:, 11:].any()
    assert ((shares > 0).mean(0)[:11] > 0.6).all()
    assert (shares[:, :11] > 0).all(1).mean() > 0.5
    assert (shares.mean(0)[[Label.ROAD, Label.BUILDING]] > 0.15).all()
    assert (shares.mean(0)[[Label.WALL, Label.FENCE, Label.POLE, Label.SIGN, Label.PERSON]] > 0.003).all()


def test_classes_are_those_of_the_label_space() -> None:
    classes = load_taxonomy("street11").classes
    names = [{"sign": "traffic sign or light"}.get(label.name.lower(), label.name.lower()) for label in Label]
    assert names == list(classes)


@LOOK_NAMES
def test_pictures_look_like_streets_from_far_away(look: str) -> None:
    """Road below, sky above, and the road is grey in both looks: what a person recognises."""
    pictures, labels = town(look)
    rows = np.arange(64)[None, :, None] / 64
    places = {label: (rows * (labels == label)).sum() / (labels == label).sum() for label in Label}
    assert places[Label.SKY] + 0.05 < places[Label.BUILDING] < 0.4 < 0.7 < places[Label.ROAD]
    road = pictures[labels == Label.ROAD].astype(float)
    assert np.ptp(np.median(road, 0)) < 30


def nearest_mean(pictures: np.ndarray, labels: np.ndarray, means: np.ndarray) -> float:
    """Mean recall of giving each pixel the class with the nearest mean colour."""
    guess = ((pictures[..., None, :] - means) ** 2).sum(-1).argmin(-1)
    return float(np.mean([(guess[labels == label] == label).mean() for label in Label]))


def test_what_colours_say_in_one_look_is_wrong_in_the_other() -> None:
    data = {look: town(look) for look in LOOKS}
    means = {k: np.stack([pictures[labels == c].mean(0) for c in Label]) for k, (pictures, labels) in data.items()}
    own, foreign = nearest_mean(*data["game"], means["game"]), nearest_mean(*data["camera"], means["game"])
    assert own > 1.6 * foreign
    assert nearest_mean(*data["camera"], means["camera"]) > 1.2 * foreign


def test_the_camera_is_dull_and_noisy_and_the_game_is_not() -> None:
    saturation, grain = {}, {}
    for look in LOOKS:
        pictures, labels = town(look)
        wide = pictures.astype(float)
        saturation[look] = np.ptp(wide, axis=-1).mean()
        inside = (labels[:, :, 1:] == Label.SKY) & (labels[:, :, :-1] == Label.SKY)
        grain[look] = np.abs(np.diff(wide.mean(-1), axis=2))[inside].mean()
    assert saturation["game"] > 2 * saturation["camera"]
    assert grain["camera"] > 2 * grain["game"]


# ------------------------------------------------------------------------------------------------------------ geometry


def straight(size: tuple[int, int] = (100, 200)) -> Camera:
    """1.5 m above the ground, level, 90 degrees wide: the focal length is half the width."""
    return make_camera((0.0, 1.5, 0.0), (0.0, 0.0, 0.0), 90.0, size)


def board(z: float, x: tuple[float, float] = (-2, 2), y: tuple[float, float] = (0, 3)) -> np.ndarray:
    return np.array([[(x[0], y[0], z), (x[1], y[0], z), (x[1], y[1], z), (x[0], y[1], z)]], np.float32)


RED, BLUE = np.array([1, 0, 0], np.float32), np.array([0, 0, 1], np.float32)


@settings(max_examples=50, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-20, 20, allow_subnormal=False)] * 3),  # a training of another test flushes these
    column=st.integers(0, 63),
    row=st.integers(0, 31),
    depth=st.floats(1, 200),
)
def test_projection_undoes_the_ray(angles: tuple[float, float, float], column: int, row: int, depth: float) -> None:
    camera = make_camera((1.0, 2.0, 3.0), angles, 70.0, (32, 64))
    point = camera.position + depth * np.array([axis[row, column] for axis in camera.rays()])
    view = camera.to_view(point[None].astype(np.float32))
    assert view[0, 2] == pytest.approx(depth, rel=1e-3)
    assert camera.to_pixels(view)[0] == pytest.approx([column + 0.5, row + 0.5], abs=0.05)


def test_a_positive_yaw_looks_right_and_a_positive_pitch_down() -> None:
    ahead = np.array([[0, 0, 10]], np.float32)
    right = make_camera((0, 0, 0), (10, 0, 0), 90, (100, 200))
    down = make_camera((0, 0, 0), (0, 10, 0), 90, (100, 200))
    assert right.to_pixels(right.to_view(ahead))[0][0] < 100
    assert down.to_pixels(down.to_view(ahead))[0][1] < 50


def test_a_board_covers_exactly_the_pixels_that_it_projects_to() -> None:
    canvas = Canvas()
    canvas.add(board(10), RED, Label.SIGN, Layer.STREET, 10)
    ids, table = canvas.finish(straight(), 0.0)
    rows, columns = np.nonzero(table.label[ids] == Label.SIGN)
    assert (columns.min(), columns.max() + 1) == pytest.approx((80, 120), abs=1)  # 100 -+ 2 m * 100 px / 10 m
    assert (rows.min(), rows.max() + 1) == pytest.approx((35, 65), abs=1)
    assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_the_nearer_hides_the_farther_in_whatever_order_they_come() -> None:
    for order in ((10, 20), (20, 10)):
        canvas = Canvas()
        for z in order:
            canvas.add(board(z), RED, Label.WALL if z == 10 else Label.POLE, Layer.STREET, z)
        ids, table = canvas.finish(straight(), 0.0)
        assert set(np.unique(table.label[ids][40:60, 85:115])) == {Label.WALL}


def test_what_lies_behind_the_camera_is_cut_off() -> None:
    canvas = Canvas()
    beside = np.array([[(3, 0, -5), (3, 0, 50), (3, 3, 50), (3, 3, -5)]], np.float32)
    canvas.add(beside, RED, Label.WALL, Layer.PLOT, -5)
    canvas.add(board(-10), RED, Label.FENCE, Layer.PLOT, -10)
    ids, table = canvas.finish(straight(), 0.0)
    label = table.label[ids]
    assert (label[50, 140:] == Label.WALL).all()
    assert not (label[:, :100] == Label.WALL).any()
    assert Label.FENCE not in label


def test_a_slanting_wall_is_cut_where_it_passes_the_camera() -> None:
    canvas = Canvas()
    slanting = np.array([[(1, 0, -4), (13, 0, 20), (13, 3, 20), (1, 3, -4)]], np.float32)
    canvas.add(slanting, RED, Label.WALL, Layer.PLOT, 0)
    ids, table = canvas.finish(straight(), 0.0)
    label = table.label[ids]
    # In column 190 the ray x = 0.9 z meets the wall x = 3 + z / 2 at z = 7.5: its foot is 150 / 7.5 rows below row 50.
    assert (label[50:69, 190] == Label.WALL).all()
    assert not (label[72:, 190] == Label.WALL).any()


def test_the_far_side_of_a_body_is_not_drawn() -> None:
    canvas = Canvas()
    faces = np.concatenate([board(10), board(14)])
    canvas.add(faces, np.stack([BLUE, RED]), Label.VEHICLE, Layer.STREET, 10, centre=np.float32([0, 1, 12]))
    ids, table = canvas.finish(straight(), 0.0)
    assert np.array_equal(np.unique(table.colour[ids[table.label[ids] == Label.VEHICLE]], axis=0), BLUE[None])


def test_colour_class_and_depth_of_a_pixel_are_those_of_one_surface() -> None:
    canvas, camera, rng = Canvas(), straight(), np.random.default_rng(0)
    canvas.add(board(10), RED, Label.SIGN, Layer.STREET, 10)
    canvas.add(board(5, (1, 3)), BLUE, Label.PERSON, Layer.STREET, 5)
    ids, table = canvas.finish(camera, 0.0)
    look = LOOKS["game"]
    scene = make_scene(table, camera, look, draw_street(rng, look), rng)
    colour, label, depth = shade(scene, ids)
    for kind, channel, z in ((Label.SIGN, 0, 10), (Label.PERSON, 2, 5)):
        pixels = label == kind
        assert pixels.any()
        assert np.array_equal(pixels, (colour[..., channel] > 0) & (np.delete(colour, channel, -1) == 0).all(-1))
        assert depth[pixels] == pytest.approx(z, rel=1e-4)
    rows = np.arange(90, 100)  # the ground: height * focal / rows below the horizon
    assert depth[rows, 0] == pytest.approx(1.5 * 100 / (rows + 0.5 - 50), rel=1e-4)


def test_fog_follows_koschmieder() -> None:
    colour, depth = np.full((1, 2, 3), 0.2, np.float32), np.array([[10, 100]], np.float32)
    seen = in_fog(colour, depth, Fog(0.01, np.float32([0.8, 0.8, 0.8])))
    assert seen[0, :, 0] == pytest.approx(0.2 * np.exp([-0.1, -1]) + 0.8 * (1 - np.exp([-0.1, -1])), rel=1e-5)
    assert in_fog(colour, depth, None) is colour


# --------------------------------------------------------------------------------------------------------------- files


def config(**changes: object) -> StreetsConfig:
    return StreetsConfig(**({"look": "game", "pictures": {"train": 3, "val": 2}, "size": SMALL} | changes))


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@LOOK_NAMES
def test_files_hold_the_rendered_pictures(tmp_path: Path, look: str) -> None:
    seen: list[tuple[int, int]] = []
    ensure(config(look=look), tmp_path, lambda done, total: seen.append((done, total)))
    suffix = "png" if look == "game" else "jpg"
    names = [f"{split}/{number:05}" for split, count in (("train", 3), ("val", 2)) for number in range(count)]
    expected = {"streets.json", *(f"images/{n}.{suffix}" for n in names), *(f"labels/{n}.png" for n in names)}
    assert set(content(tmp_path)) == expected
    assert seen == [(done, 5) for done in range(1, 6)]
    label = Image.open(tmp_path / "labels/val/00001.png")
    assert (label.mode, label.size) == ("P", (64, 32))
    assert np.asarray(label).max() < 11
    assert label.getpalette()[:3] == list(load_taxonomy("street11").colours[0])


def test_no_two_pictures_are_equal_and_splits_do_not_depend_on_each_other(tmp_path: Path) -> None:
    ensure(config(), tmp_path / "both")
    ensure(config(pictures={"val": 2}), tmp_path / "val")
    both, val = content(tmp_path / "both"), content(tmp_path / "val")
    pictures = [data for name, data in both.items() if name.startswith("images")]
    assert len(set(pictures)) == 5
    assert {name: both[name] for name in val if name != "streets.json"} == {
        name: data for name, data in val.items() if name != "streets.json"
    }


def test_a_second_call_does_nothing(tmp_path: Path) -> None:
    ensure(config(), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    ensure(config(), tmp_path, lambda *_: pytest.fail("nothing was missing"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_an_interrupted_call_is_taken_up(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(config(), tmp_path / "cut", interrupt)
    (tmp_path / "cut/labels/train/00000.png").unlink()
    seen: list[tuple[int, int]] = []
    ensure(config(), tmp_path / "cut", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4, 4)
    ensure(config(), tmp_path / "whole")
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.parametrize("kept", [[], ["streets.json"], ["streets.json", "labels/train/00000.png"]])
def test_a_file_appears_only_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: list[str]
) -> None:
    """Writing stops just before the description, the first label or the first picture gets its name."""
    rename, calls = Path.replace, list[Path]()

    def full(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) <= len(kept):
            return rename(self, target)
        assert self.stat().st_size > 0
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert "No space left" in message(RunError, ensure, config(), tmp_path)
    assert set(content(tmp_path)) == set(kept)


def test_more_pictures_are_added(tmp_path: Path) -> None:
    ensure(config(pictures={"train": 2}), tmp_path / "grown")
    ensure(config(), tmp_path / "grown")
    ensure(config(), tmp_path / "at once")
    assert content(tmp_path / "grown") == content(tmp_path / "at once")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"look": "camera"}, "look game instead of camera"),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"size": (16, 32)}, "size [32, 64] instead of [16, 32]"),
        ({"pictures": {"train": 1}}, "holds 3 pictures of split train, 1 are configured"),
    ],
)
def test_other_streets_in_the_folder_are_neither_used_nor_touched(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    ensure(config(), tmp_path)
    before = content(tmp_path)
    text = message(DataError, ensure, config(**changes), tmp_path)
    assert said in text
    assert str(tmp_path) in text
    assert content(tmp_path) == before


def test_foreign_pictures_and_a_broken_description_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert "not rendered streets" in message(DataError, ensure, config(), tmp_path)
    (tmp_path / "streets.json").write_text("{")
    assert "streets.json: cannot be read" in message(DataError, ensure, config(), tmp_path)
    (tmp_path / "streets.json").write_text(json.dumps([1]))
    assert "streets.json: cannot be read" in message(DataError, ensure, config(), tmp_path)


def test_a_root_that_cannot_be_written_is_a_readable_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in message(RunError, ensure, config(), tmp_path / "file")


@pytest.mark.parametrize("preset", ["streets_game", "streets_camera"])
def test_the_presets_render_and_read(tmp_path: Path, preset: str) -> None:
    streets = {"pictures": {"train": 1, "val": 1}, "size": SMALL}
    domain = Domain(
        load_domain({"preset": preset, "root": str(tmp_path), "streets": streets}), load_taxonomy("street11")
    )
    granted = domain.labelled("train", "all")
    assert granted.image(0).shape == (3, *SMALL)
    assert granted.label(0).max() < 11
