"""Every data preset against files in the official layout, with the label maps written out by hand a second time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from picture_files import noise, write, write_palette, write_png16
from udas.config import preset_names
from udas.data.dataset import Domain, load_domain
from udas.errors import ConfigError, DataError
from udas.taxonomy import LabelMap, load_taxonomy

# value in the file -> Cityscapes trainId; 255 where the value is known and ignored
LABEL_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
LABEL_IDS |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
LABEL_IDS |= dict.fromkeys([0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 34, 255], 255)
TRAIN_IDS = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 8: 8, 9: 9, 10: 10, 11: 11, 12: 12, 13: 13, 14: 14}
TRAIN_IDS |= {15: 15, 16: 16, 17: 17, 18: 18, 255: 255}
SYNTHIA = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14}
SYNTHIA |= {19: 15, 20: 16, 12: 17, 11: 18, 0: 255, 13: 255, 14: 255, 22: 255}
CAMVID = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 8: 8, 9: 9, 10: 10, 11: 255}
CARLA = {7: 0, 6: 0, 8: 1, 1: 2, 11: 3, 2: 4, 5: 5, 12: 6, 9: 7, 13: 8, 4: 9, 10: 10, 0: 255, 3: 255}
STREETS = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 8: 8, 9: 9, 10: 10, 255: 255}

MAPS = {
    "gta5": ("cityscapes19", LABEL_IDS),
    "synthia": ("cityscapes19", SYNTHIA),
    "synscapes": ("cityscapes19", LABEL_IDS),
    "cityscapes": ("cityscapes19", LABEL_IDS),
    "cityscapes_trainids": ("cityscapes19", TRAIN_IDS),
    "kitti": ("cityscapes19", LABEL_IDS),
    "camvid": ("camvid11", CAMVID),
    "carla": ("street11", CARLA),
    "cityscapes256": ("cityscapes19", TRAIN_IDS),
    "streets_game": ("street11", STREETS),
    "streets_camera": ("street11", STREETS),
}

# Cityscapes trainId -> id in the smaller label spaces
SYN16 = [0, 1, 2, 3, 4, 5, 6, 7, 8, 255, 9, 10, 11, 12, 255, 13, 255, 14, 15, 255]
SYN13 = [0, 1, 2, 255, 255, 255, 3, 4, 5, 255, 6, 7, 8, 9, 255, 10, 255, 11, 12, 255]
STREET = [0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 9, 9, 10, 10, 10, 10, 10, 10, 255]
CAM = [3, 4, 1, 1, 7, 2, 6, 6, 5, 5, 0, 9, 10, 8, 8, 8, 8, 10, 10, 255]
SMALLER = {"cityscapes16": SYN16, "cityscapes13": SYN13, "street11": STREET, "camvid11": CAM}


def test_the_table_covers_every_preset() -> None:
    assert sorted(MAPS) == preset_names("data")


@pytest.mark.parametrize("preset", MAPS)
def test_label_map(preset: str) -> None:
    space, expected = MAPS[preset]
    rules = LabelMap(load_domain(preset), load_taxonomy(space))
    raw = np.array([sorted(expected)], np.uint16)
    assert rules.apply(raw, Path("x.png")).tolist() == [[expected[value] for value in sorted(expected)]]
    rest = [value for value in range(300) if value not in expected]
    assert sorted(rules.unmapped(np.array([rest]))) == rest


@pytest.mark.parametrize("space", SMALLER)
@pytest.mark.parametrize("preset", [name for name, (space, _) in MAPS.items() if space == "cityscapes19"])
def test_label_map_into_a_smaller_label_space(preset: str, space: str) -> None:
    _, first = MAPS[preset]
    expected = [[255 if first[value] == 255 else SMALLER[space][first[value]] for value in sorted(first)]]
    rules = LabelMap(load_domain(preset), load_taxonomy(space))
    assert rules.apply(np.array([sorted(first)], np.uint8), Path("x.png")).tolist() == expected


@pytest.mark.parametrize("preset", MAPS)
def test_only_synthetic_labels_are_granted_from_the_start(preset: str) -> None:
    synthetic = {"gta5", "synthia", "synscapes", "carla", "streets_game"}
    assert load_domain(preset).labelled == ("all" if preset in synthetic else "none")


# ------------------------------------------------------------------------------------------ files as distributed

IDS = np.array([[7, 8, 11, 34], [26, 33, 0, 23]])
LEARNT = [[0, 1, 2, 255], [13, 18, 255, 10]]


def opened(monkeypatch: pytest.MonkeyPatch, preset: str, root: Path, space: str = "cityscapes19") -> Domain:
    monkeypatch.setenv(f"{preset.removesuffix('_trainids').upper()}_ROOT", str(root))
    return Domain(load_domain(preset), load_taxonomy(space))


def checked(domain: Domain, split: str, names: list[str], label: list[list[int]]) -> None:
    """The split holds exactly these pictures, each with this label and a picture of its size."""
    assert [picture.name for picture in domain.pictures(split)] == names
    pictures = domain.labelled(split, "all")
    for index in range(len(names)):
        assert pictures.label(index).tolist() == label
        assert pictures.image(index).shape == (3, len(label), len(label[0]))


def test_gta5(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("00001", "24966"):
        write(tmp_path / f"images/{name}.png", noise(2, 4))
        write_palette(tmp_path / f"labels/{name}.png", IDS)
    (tmp_path / "split.mat").touch()
    checked(opened(monkeypatch, "gta5", tmp_path), "train", ["images/00001", "images/24966"], LEARNT)


def test_synthia(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ids = np.array([[3, 4, 2, 22], [8, 11, 0, 1]])
    for name in ("0000000", "0009399"):
        write(tmp_path / f"RGB/{name}.png", noise(2, 4))
        instance = np.full_like(ids, 777)
        write_png16(tmp_path / f"GT/LABELS/{name}.png", np.stack([ids, instance, instance * 0], axis=-1))
        write(tmp_path / f"GT/COLOR/{name}.png", noise(2, 4))
        write(tmp_path / f"Depth/{name}.png", noise(2, 4))
    domain = opened(monkeypatch, "synthia", tmp_path)
    checked(domain, "train", ["RGB/0000000", "RGB/0009399"], LEARNT)
    smaller = opened(monkeypatch, "synthia", tmp_path, "cityscapes16").labelled("train")
    assert smaller.label(0).tolist() == [[0, 1, 2, 255], [12, 15, 255, 9]]


def test_synscapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("1", "25000"):
        for folder in ("rgb", "rgb-2k"):
            write(tmp_path / f"img/{folder}/{name}.png", noise(2, 4))
        for folder in ("class", "instance"):
            write(tmp_path / f"img/{folder}/{name}.png", IDS.astype(np.uint8))
        (tmp_path / "meta").mkdir(exist_ok=True)
        (tmp_path / f"meta/{name}.json").write_text("{}")
    checked(opened(monkeypatch, "synscapes", tmp_path), "train", ["img/rgb/1", "img/rgb/25000"], LEARNT)


CITIES = {
    "train": ["aachen/aachen_000000_000019", "zurich/zurich_000121_000019"],
    "val": ["frankfurt/frankfurt_000000_000294"],
    "test": ["berlin/berlin_000000_000019"],
    "train_extra": ["augsburg/augsburg_000000_000000"],
}


def make_cityscapes(root: Path) -> None:
    train_ids = np.array(LEARNT, np.uint8)
    for split, frames in CITIES.items():
        for frame in frames:
            write(root / f"leftImg8bit/{split}/{frame}_leftImg8bit.png", noise(2, 4))
            stem = root / f"gtFine/{split}/{frame}_gtFine"
            write(stem.with_name(f"{stem.name}_labelIds.png"), IDS.astype(np.uint8))
            write(stem.with_name(f"{stem.name}_labelTrainIds.png"), train_ids)
            write(stem.with_name(f"{stem.name}_instanceIds.png"), IDS.astype(np.uint16) * 1000)
            write(stem.with_name(f"{stem.name}_color.png"), noise(2, 4))
            stem.with_name(f"{stem.name}_polygons.json").write_text("{}")


@pytest.mark.parametrize("preset", ["cityscapes", "cityscapes_trainids"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_cityscapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, preset: str, split: str) -> None:
    make_cityscapes(tmp_path)
    names = [f"leftImg8bit/{split}/{frame}_leftImg8bit" for frame in CITIES[split]]
    checked(opened(monkeypatch, preset, tmp_path), split, names, LEARNT)


def test_cityscapes_train_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    monkeypatch.setenv("CITYSCAPES_ROOT", str(tmp_path))
    config = load_domain({"preset": "cityscapes", "splits": {"train_extra": "train_extra"}})
    assert list(config.splits) == ["train", "val", "test", "train_extra"]
    pictures = Domain(config, load_taxonomy("cityscapes19")).unlabelled("train_extra").pictures
    assert [picture.fields["city"] for picture in pictures] == ["augsburg"]


def test_kitti(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = [(2, 4), (3, 4), (3, 5), (2, 5)] * 5
    for number, size in enumerate(sizes):
        write(tmp_path / f"training/image_2/{number:06}_10.png", noise(*size))
        for folder, pixels in (
            ("semantic", np.full(size, 26)),
            ("semantic_rgb", noise(*size)),
            ("instance", noise(*size)),
        ):
            write(tmp_path / f"training/{folder}/{number:06}_10.png", pixels.astype(np.uint8))
        write(tmp_path / f"testing/image_2/{number:06}_10.png", noise(*size))
    domain = opened(monkeypatch, "kitti", tmp_path)
    train, val = domain.labelled("train", "all"), domain.labelled("val", "all")
    assert (len(train), len(val)) == (16, 4)
    assert {p.name for p in train.pictures}.isdisjoint(p.name for p in val.pictures)
    for pictures in (train, val):
        for index in range(len(pictures)):
            assert (pictures.label(index) == 13).all()
            assert pictures.label(index).shape == pictures.image(index).shape[1:]
    assert len({tuple(train.image(index).shape) for index in range(16)}) > 1


def make_camvid(root: Path) -> None:
    ids = np.array([[3, 4, 11], [0, 10, 8]], np.uint8)
    for split, count in {"train": 3, "val": 2, "test": 1}.items():
        lines = []
        for number in range(count):
            name = f"0001TP_00{number:04}.png"
            write(root / split / name, noise(2, 3))
            write(root / f"{split}annot" / name, ids)
            lines.append(f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}")
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("split", "count"), [("train", 3), ("val", 2), ("test", 1)])
def test_camvid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, split: str, count: int) -> None:
    make_camvid(tmp_path)
    names = [f"{split}/0001TP_00{number:04}" for number in range(count)]
    checked(opened(monkeypatch, "camvid", tmp_path, "camvid11"), split, names, [[3, 4, 255], [0, 10, 8]])


def test_camvid_lists_with_their_foreign_prefix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_camvid(tmp_path)
    monkeypatch.setenv("CAMVID_ROOT", str(tmp_path))
    config = load_domain(
        {"preset": "camvid", "splits": {split: {"file": f"{split}.txt"} for split in ("train", "val")}}
    )
    domain = Domain(config, load_taxonomy("camvid11"))
    assert [picture.name for picture in domain.pictures("val")] == ["val/0001TP_000000", "val/0001TP_000001"]
    assert domain.labelled("train", "all").label(0).tolist() == [[3, 4, 255], [0, 10, 8]]


def test_carla(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("000_0021", "012_0300"):
        write(tmp_path / f"images/{name}.jpg", noise(2, 4))
        write(tmp_path / f"labels/{name}.png", np.array([[6, 7, 12, 3], [10, 13, 0, 9]], np.uint8))
    expected = [[0, 0, 6, 255], [10, 8, 255, 7]]
    domain = opened(monkeypatch, "carla", tmp_path, "street11")
    checked(domain, "train", ["images/000_0021", "images/012_0300"], expected)


def test_cityscapes256(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("0001", "0002"):
            write(tmp_path / f"images/{split}/{name}.jpg", noise(2, 4))
            write(tmp_path / f"labels/{split}/{name}.png", np.array(LEARNT, np.uint8))
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/few.txt").write_text("0002\n")
    domain = opened(monkeypatch, "cityscapes256", tmp_path)
    checked(domain, "val", ["images/val/0001", "images/val/0002"], LEARNT)
    assert [picture.name for picture in domain.labelled("train", "splits/few.txt").pictures] == ["images/train/0002"]
    merged = opened(monkeypatch, "cityscapes256", tmp_path, "street11").labelled("train", "all")
    assert merged.label(0).tolist() == [[0, 1, 2, 255], [10, 10, 255, 8]]


@pytest.mark.parametrize(("look", "suffix"), [("game", "png"), ("camera", "jpg")])
def test_streets_are_rendered_before_they_are_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, look: str, suffix: str
) -> None:
    calls = []

    def ensure(config: object, root: Path, progress: Callable[..., None] | None = None) -> None:
        calls.append((config, root))
        write(root / f"images/train/00000.{suffix}", noise(2, 4))
        write(root / "labels/train/00000.png", np.array([[0, 10, 255, 6], [8, 1, 2, 3]], np.uint8))

    monkeypatch.setattr("udas.data.streets.ensure", ensure, raising=False)
    config = load_domain({"preset": f"streets_{look}", "root": str(tmp_path), "streets": {"pictures": {"train": 1}}})
    domain = Domain(config, load_taxonomy("street11"))
    assert calls == []
    checked(domain, "train", ["images/train/00000"], [[0, 10, 255, 6], [8, 1, 2, 3]])
    domain.labelled("train", "all")
    assert calls == [(config.streets, tmp_path)]
    assert config.streets.look == look
    with pytest.raises(DataError, match="no picture in split 'val'"):
        domain.pictures("val")


# -------------------------------------------------------------------------------------------------------- load_domain


def test_domain_from_preset_file_and_mapping(tmp_path: Path) -> None:
    assert load_domain("gta5").name == "gta5"
    (tmp_path / "own.yaml").write_text(
        "name: own\nroot: x\nimages: '*.png'\nsplits: {train: all}\ntaxonomy: street11\n"
    )
    assert load_domain(str(tmp_path / "own.yaml")).root == "x"
    changed = load_domain({"preset": "synthia", "root": "here", "size": [4, 8], "map": {"road": [3, 22], "ignore": 0}})
    assert (changed.name, changed.root, changed.size) == ("synthia", "here", (4, 8))
    assert changed.map["road"] == [3, 22]
    assert changed.map["sky"] == [1]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("gta", "no data preset 'gta'; did you mean 'gta5'?"),
        ({"preset": "cityscape"}, "no data preset 'cityscape'; did you mean 'cityscapes'?"),
        ({"preset": "gta5", "rooot": "x"}, "data gta5: 1 problem"),
        ({"preset": "gta5", "rooot": "x"}, "rooot: unknown key; did you mean 'root'?"),
        ({"name": "own"}, "data own: 4 problems"),
    ],
)
def test_mistakes_in_a_domain(raw: str | dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_domain(raw)
    assert expected in str(caught.value)
