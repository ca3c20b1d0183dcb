from __future__ import annotations

import io
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import noise, write, write_palette, write_png16
from PIL import Image

from udas.config import DomainConfig, Subset
from udas.data.dataset import Domain, PictureSet, load_domain
from udas.data.files import image_size, read_image, read_label
from udas.data.layout import Picture, read_list
from udas.errors import ConfigError, DataError
from udas.taxonomy import Taxonomy, load_taxonomy

COUNTS = {"train": 5, "val": 2}


def street() -> Taxonomy:
    return load_taxonomy("street11")


def described(root: Path, **changes: object) -> DomainConfig:
    return load_domain(
        {
            "name": "mine",
            "root": str(root),
            "images": "images/{split}/**/*.png",
            "labels": "masks/{split}/**/{stem}_mask.png",
            "splits": {"train": "train", "val": "val"},
            "taxonomy": "street11",
            "map": {"road": 7, "sky": [1, [9, 9, 9]], "ignore": 0},
        }
        | changes
    )


def opened(root: Path, **changes: object) -> Domain:
    return Domain(described(root, **changes), street())


def mask(height: int = 6, width: int = 8) -> np.ndarray:
    values = np.full((height, width), 7, np.uint8)
    values[0] = 1
    return values


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Pictures images/{split}/{day|night}/{number}.png with masks of the same places."""
    folder = tmp_path / "set"
    for split, count in COUNTS.items():
        for number in range(count):
            place = f"{split}/{'day' if number % 2 else 'night/wet'}/{number:03}"
            write(folder / f"images/{place}.png", noise(seed=number))
            write(folder / f"masks/{place}_mask.png", mask())
    return folder


def message(error: type[Exception], call: object, *arguments: object) -> str:
    with pytest.raises(error) as caught:
        call(*arguments)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- listing


def test_pictures_are_sorted_and_named_by_their_place(root: Path) -> None:
    (root / "images/train/day/notes.txt").touch()
    (root / "images/train/day/.hidden.png").touch()
    pictures = opened(root).pictures("train")
    assert [picture.name for picture in pictures] == [
        "images/train/day/001", "images/train/day/003",
        "images/train/night/wet/000", "images/train/night/wet/002", "images/train/night/wet/004",
    ]  # fmt: skip
    assert pictures[0].image == root / "images/train/day/001.png"
    assert pictures[0].fields["stem"] == "001"


def test_folders_are_listed_once(root: Path) -> None:
    domain = opened(root)
    first = domain.pictures("val")
    shutil.rmtree(root / "images")
    assert domain.pictures("val") is first


def test_linked_folders_are_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.move(root / "images/train/day", tmp_path / "elsewhere/day")
    (root / "images/train/day").symlink_to(tmp_path / "elsewhere/day")
    assert len(opened(root).pictures("train")) == COUNTS["train"]


def test_labels_follow_folders_and_fields(tmp_path: Path) -> None:
    for place in ("a/x/cam_1.jpg", "a/y/z/cam_2.jpg"):
        write(tmp_path / "rgb" / place, noise())
    write(tmp_path / "ann/x/1-a.png", mask())
    write(tmp_path / "ann/y/z/2-a.png", mask())
    domain = opened(tmp_path, images="rgb/{town}/**/cam_{id}.jpg", labels="ann/**/{id}-{town}.png", splits={"train": "all"})
    labels = domain.labelled("train", "all").labels
    assert labels == {
        "rgb/a/x/cam_1": tmp_path / "ann/x/1-a.png",
        "rgb/a/y/z/cam_2": tmp_path / "ann/y/z/2-a.png",
    }


def test_repeated_field_must_agree(tmp_path: Path) -> None:
    write(tmp_path / "images/aachen/aachen_1.png", noise())
    write(tmp_path / "images/aachen/berlin_2.png", noise())
    domain = opened(tmp_path, images="images/{city}/{city}_{id}.png", labels=None, splits={"train": "all"})
    assert [picture.fields["id"] for picture in domain.pictures("train")] == ["1"]


def test_split_with_a_wildcard_gives_labels_what_it_met(tmp_path: Path) -> None:
    for drive in ("2011_a", "2011_b", "2012_a"):
        write(tmp_path / f"images/{drive}/1.png", noise())
        write(tmp_path / f"masks/{drive}/1.png", mask())
    layout = {"images": "images/{split}/*.png", "labels": "masks/{split}/{stem}.png"}
    pictures = opened(tmp_path, **layout, splits={"old": "2011_*", "new": "2012_a"}).labelled("old", "all")
    assert [path.parent.name for path in pictures.labels.values()] == ["2011_a", "2011_b"]
    assert len(pictures.label(1).unique()) == 2


def test_trailing_wildcard_and_odd_names(tmp_path: Path) -> None:
    for place in ("a.b.jpg", "deep/er/[1] x.JPG", "deep/q?.png"):
        write(tmp_path / "images [new]" / place, noise(), format="PNG")
    domain = opened(tmp_path, images="images [new]/**", labels=None, splits={"train": "all"})
    assert [picture.name for picture in domain.pictures("train")] == [
        "images [new]/a.b", "images [new]/deep/er/[1] x", "images [new]/deep/q?",
    ]  # fmt: skip


def test_two_pictures_of_one_name(tmp_path: Path) -> None:
    write(tmp_path / "images/1.png", noise())
    write(tmp_path / "images/1.jpg", noise())
    domain = opened(tmp_path, images="images/*", labels=None, splits={"train": "all"})
    assert "have the same name; make `images` stricter" in message(DataError, domain.pictures, "train")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": "masks/*.png"}, "mine.labels: `*` is ambiguous; name the part as {field} in `images`"),
        ({"labels": "masks/{stm}.png"}, "mine.labels: {stm} does not occur in `images`; did you mean '{stem}'?"),
        (
            {"images": "images/{split}/*.png"},
            "mine.labels: **/ does not occur in `images` (choose from: {split}, {stem})",
        ),
        ({"images": "images/**/{split}/**/*.png"}, "`**` may stand only once in 'images/**/{split}/**/*.png'"),
        ({"images": "images/**/*.png"}, "mine: splits train and val are the same pictures, since 'images/**/*.png'"),
        ({"root": "${UDAS_TEST_UNSET}/x"}, "the environment variable UDAS_TEST_UNSET is not set"),
        ({"taxonomy": "camvid11"}, "mine.map: no class 'ignore'"),
    ],
)
def test_mistakes_that_need_no_files(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    if changes.get("taxonomy"):
        changes = {"map": {"rood": 7}}
        expected = "mine.map: no class 'rood' in street11; did you mean 'road'?"
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path / "absent", **changes)
    assert expected in str(caught.value)


def test_missing_root(tmp_path: Path) -> None:
    text = message(DataError, opened(tmp_path / "absent").pictures, "train")
    assert text == f"mine: the folder {tmp_path}/absent does not exist; set `root` to the data set's folder"


def test_empty_split_says_what_was_tried(root: Path) -> None:
    domain = opened(root, splits={"train": "train", "val": "valid"})
    assert message(DataError, domain.pictures, "val") == (
        f"mine: no picture in split 'val'; looked for images/valid/**/*.png in {root}"
    )


def test_unknown_split(root: Path) -> None:
    assert message(DataError, opened(root).pictures, "vall") == "mine has no split 'vall'; did you mean 'val'?"


# -------------------------------------------------------------------------------------------- lists and shares


def listed(root: Path, text: str) -> Path:
    path = root / "list.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "line",
    [
        "002", "002.png", "wet/002", "./night/wet/002.png", "images/train/night/wet/002",
        "images/train/night/wet/002.png masks/train/night/wet/002_mask.png",
        "/old/disk/images/train/night/wet/002.png", "/old disk/images/train/night/wet/002.png",
        "night\\wet\\002.png",
    ],
)  # fmt: skip
def test_ways_to_name_a_picture_in_a_list(root: Path, line: str) -> None:
    listed(root, f"\ufeff# comment\n\n{line}  \n{line}\n")
    assert opened(root).labelled_names("train", "list.txt") == ["images/train/night/wet/002"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("099.png", "list.txt, line 2: '099.png' is no picture of mine train; remove it or add the picture"),
        ("images/val/day/001.png", "is no picture of mine train"),
        ("other/002", "is no picture of mine train"),
    ],
)
def test_list_with_an_absent_picture(root: Path, line: str, expected: str) -> None:
    listed(root, f"001\n{line}\n")
    assert expected in message(DataError, opened(root).labelled_names, "train", "list.txt")


def test_list_with_an_ambiguous_line(root: Path) -> None:
    write(root / "images/train/day/002.png", noise())
    listed(root, "002\n")
    text = message(DataError, opened(root).labelled_names, "train", "list.txt")
    assert "line 1: '002' is images/train/day/002 as well as images/train/night/wet/002; write more of its path" in text


def test_list_that_is_missing_or_no_text(root: Path) -> None:
    assert "few.txt: no such file; a list file" in message(DataError, opened(root).labelled_names, "train", "few.txt")
    (root / "list.txt").write_bytes(b"\xff\xfe\x00\x81")
    assert "list.txt: " in message(DataError, opened(root).labelled_names, "train", "list.txt")


def test_split_by_list(root: Path) -> None:
    listed(root, "003\nnight/wet/000\n")
    domain = opened(root, splits={"few": {"file": "list.txt"}, "rest": "val"})
    assert "as well as" in message(DataError, domain.pictures, "few")  # 000 is in train and in val
    listed(root, "train/day/003\ntrain/night/wet/000\n")
    pictures = domain.labelled("few", "all")
    assert [picture.name for picture in pictures.pictures] == ["images/train/day/003", "images/train/night/wet/000"]
    assert pictures.labels["images/train/day/003"] == root / "masks/train/day/003_mask.png"
    listed(root, "")
    again = opened(root, splits={"few": {"file": "list.txt"}})
    assert "no picture in split 'few'" in message(DataError, again.pictures, "few")


@settings(max_examples=30, deadline=None)
@given(cut=st.floats(0.1, 0.9), seed=st.integers(0, 5))
def test_shares_part_the_pictures(shared_root: Path, cut: float, seed: int) -> None:
    splits = {"train": {"share": [0, cut], "seed": seed}, "val": {"share": [cut, 1], "seed": seed}}
    domain = opened(shared_root, images="images/*.png", labels=None, splits=splits)
    train, val = ([picture.name for picture in domain.pictures(split)] for split in splits)
    assert sorted(train + val) == [f"images/{number:02}" for number in range(20)]
    assert abs(len(train) - 20 * cut) <= 0.5


def test_seeds_give_different_shares(shared_root: Path) -> None:
    layout = {"images": "images/*.png", "labels": None}
    parts = [
        tuple(p.name for p in opened(shared_root, **layout, splits={"a": {"share": [0, 0.5], "seed": s}}).pictures("a"))
        for s in range(3)
    ]
    assert len(set(parts)) == 3


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number in range(20):
        write(folder / f"images/{number:02}.png", noise(2, 2))
    return folder


# ---------------------------------------------------------------------------------------------- granted labels


@settings(max_examples=40, deadline=None)
@given(small=st.integers(0, 20), large=st.integers(0, 20), seed=st.integers(0, 2**40))
def test_subsets_of_one_seed_are_nested(shared_root: Path, small: int, large: int, seed: int) -> None:
    domain = opened(shared_root, images="images/*.png", labels=None, splits={"train": "all"})
    fewer, more = sorted((small, large))
    inner = domain.labelled_names("train", Subset(count=fewer, seed=seed))
    outer = domain.labelled_names("train", Subset(count=more, seed=seed))
    assert (len(inner), len(outer)) == (fewer, more)
    assert set(inner) <= set(outer)
    assert outer == sorted(set(outer))


def test_subset_does_not_depend_on_other_pictures_or_the_machine(shared_root: Path) -> None:
    domain = opened(shared_root, images="images/*.png", labels=None, splits={"train": "all"})
    assert domain.labelled_names("train", Subset(count=4, seed=1)) == [
        "images/03", "images/04", "images/06", "images/16",
    ]  # fmt: skip
    orders = {tuple(domain.labelled_names("train", Subset(count=4, seed=seed))) for seed in range(6)}
    assert len(orders) > 3


def test_what_is_granted_comes_from_the_configuration(root: Path) -> None:
    names = [picture.name for picture in opened(root).pictures("train")]
    assert opened(root).labelled_names("train") == []
    assert opened(root, labelled="all").labelled_names("train") == names
    assert opened(root, labelled="all").labelled_names("train", "none") == []
    assert len(opened(root, labelled={"count": 2}).labelled_names("train")) == 2
    assert len(opened(root, labelled="none").labelled("train")) == 0


def test_more_labels_than_pictures(root: Path) -> None:
    text = message(DataError, opened(root).labelled_names, "train", Subset(count=6))
    assert text == "mine train: 6 labelled pictures asked for, 5 exist"


def reachable(value: object) -> str:
    return pickle.dumps(value, protocol=0).decode("latin-1")


def test_firewall_unlabelled_set_has_no_way_to_labels(root: Path) -> None:
    domain = opened(root, labelled="all")
    assert "mask" in reachable(domain.labelled("train"))
    pictures = domain.unlabelled("train")
    assert pictures.labels == {}
    assert pictures.label_map is None
    assert "mask" not in reachable(pictures)
    with pytest.raises(KeyError):
        pictures.label(0)


def test_firewall_only_granted_labels_are_reachable(root: Path) -> None:
    granted = opened(root).labelled("train", Subset(count=2))
    names = [picture.name for picture in granted.pictures]
    assert list(granted.labels) == names
    others = {picture.name for picture in opened(root).pictures("train")} - set(names)
    assert len(others) == 3
    assert not any(Path(name).name in reachable(granted) for name in others)


def test_firewall_works_without_the_other_label_files(root: Path) -> None:
    before = opened(root).labelled("train", Subset(count=2))
    expected = [before.label(index) for index in range(2)]
    kept = set(before.labels.values())
    for path in root.glob("masks/**/*.png"):
        if path not in kept:
            path.unlink()
    domain = opened(root)
    granted = domain.labelled("train", Subset(count=2))
    assert all(torch.equal(granted.label(index), expected[index]) for index in range(2))
    assert len(domain.unlabelled("train")) == 5
    assert domain.unlabelled("val").image(1).shape == (3, 6, 8)


def test_missing_label_file(root: Path) -> None:
    path = root / "masks/train/day/003_mask.png"
    path.unlink()
    text = message(DataError, opened(root).labelled, "train", "all")
    assert text == f"{path}: no such label file (1 of 5 are missing); check `labels`"


def test_granted_without_a_label_pattern(root: Path) -> None:
    text = message(DataError, opened(root, labels=None, map={}).labelled, "train", "all")
    assert text == "mine train: pictures are granted as labelled, but `labels` is not given"


# ----------------------------------------------------------------------------------------------- reading a set


def test_picture_and_label(root: Path) -> None:
    pictures = opened(root).labelled("train", "all")
    assert pictures.image(1).dtype == torch.uint8
    assert torch.equal(pictures.image(1).permute(1, 2, 0), torch.from_numpy(noise(seed=3)))
    label = pictures.label(1)
    assert label.dtype == torch.uint8
    assert label.tolist() == [[8] * 8] + [[0] * 8] * 5


def test_size_resizes_both(root: Path) -> None:
    pictures = opened(root, size=[3, 16]).labelled("train", "all")
    assert pictures.image(0).shape == (3, 3, 16)
    assert pictures.native_image(0).shape == (3, 6, 8)
    assert pictures.label(0).tolist() == [[0] * 16] * 3  # centres of the three rows lie in rows 1, 3 and 5


def test_resized_picture_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    write(tmp_path / "images/1.png", stripes)
    layout = {"images": "images/*.png", "labels": None, "splits": {"train": "all"}}
    shrunk = opened(tmp_path, **layout, size=[8, 8]).unlabelled("train").image(0)
    assert (shrunk.int() - 127).abs().max() < 10


def test_size_mismatch_names_both(root: Path) -> None:
    path = write(root / "masks/train/day/001_mask.png", mask(6, 4))
    for size in (None, [3, 4]):
        text = message(DataError, opened(root, size=size).labelled("train", "all").label, 0)
        assert text == (
            f"{path}: the label is 4x6 (width x height), but its picture {root}/images/train/day/001.png is 8x6; "
            "a label must have its picture's size"
        )


def test_unmapped_value_says_which_and_where(root: Path) -> None:
    values = mask()
    values[3, :2] = 44
    path = write(root / "masks/train/day/001_mask.png", values)
    text = message(DataError, opened(root).labelled("train", "all").label, 0)
    assert text == f"{path}: value 44 (2 pixels) not in `map` of mine; add the values to a class or to `ignore`"


def test_set_is_picklable(root: Path) -> None:
    pictures = opened(root, size=[3, 4]).labelled("train", "all")
    pictures.label(0)
    again = pickle.loads(pickle.dumps(pictures))
    assert torch.equal(again.label(2), pictures.label(2))
    assert again.fingerprint() == pictures.fingerprint()


def test_cache_is_looked_up_first(root: Path) -> None:
    from dataclasses import replace

    pictures = opened(root).labelled("train", "all")
    name = pictures.pictures[0].name
    stored = replace(pictures, image_cache={name: torch.zeros(3, 1, 1)}, label_cache={name: torch.ones(1, 1)})
    assert stored.image(0).shape == (3, 1, 1)
    assert stored.label(0).shape == (1, 1)
    assert torch.equal(stored.image(1), pictures.image(1))
    assert torch.equal(stored.label(1), pictures.label(1))


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (1, [2]), (2, [1, 3]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_fixed_pictures(root: Path, count: int, expected: list[int]) -> None:
    assert opened(root).unlabelled("train").fixed(count) == expected


@given(length=st.integers(0, 50), count=st.integers(0, 60))
def test_fixed_pictures_are_evenly_spaced(length: int, count: int) -> None:
    pictures = PictureSet("mine", tuple(Picture(str(number), Path("x")) for number in range(length)), 11)
    chosen = pictures.fixed(count)
    assert len(chosen) == min(length, count)
    assert len(set(chosen)) == len(chosen)
    gaps = np.diff([-1 - chosen[0], *chosen, 2 * length - 1 - chosen[-1]]) if chosen else np.zeros(1)
    assert gaps[1:-1].size == 0 or gaps[1:-1].max() - gaps[1:-1].min() <= 1


# --------------------------------------------------------------------------------- repainted and pseudo-labelled


def test_repainted_pictures_keep_their_labels(root: Path, tmp_path: Path) -> None:
    pictures = opened(root).labelled("train", "all")
    name = pictures.pictures[1].name
    painted = noise(12, 4, seed=9)
    write(tmp_path / f"made/{name}.png", painted)
    repainted = pictures.with_images(tmp_path / "made")
    assert [picture.name for picture in repainted.pictures] == [name]
    assert torch.equal(repainted.image(0).permute(1, 2, 0), torch.from_numpy(painted))
    assert repainted.label(0).tolist() == [[8] * 4] * 2 + [[0] * 4] * 10
    assert opened(root, size=[6, 8]).labelled("train", "all").with_images(tmp_path / "made").label(0).shape == (6, 8)
    assert torch.equal(pictures.image(1).permute(1, 2, 0), torch.from_numpy(noise(seed=3)))


def test_repainting_an_unlabelled_set_opens_no_way_to_labels(root: Path, tmp_path: Path) -> None:
    pictures = opened(root).unlabelled("train")
    write(tmp_path / f"made/{pictures.pictures[0].name}.png", noise())
    assert pictures.with_images(tmp_path / "made").labels == {}


def test_repainting_drops_cached_pictures(root: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    pictures = opened(root, size=[6, 8]).labelled("train", "all")
    name = pictures.pictures[0].name
    write(tmp_path / f"made/{name}.png", noise(seed=5))
    stored = replace(pictures, image_cache={name: torch.zeros(3, 6, 8)}, label_cache={name: torch.zeros(6, 8)})
    repainted = stored.with_images(tmp_path / "made")
    assert repainted.image(0).max() > 0
    assert repainted.label(0).max() == 0


def pseudo(root: Path, folder: Path, ids: np.ndarray, **changes: object) -> PictureSet:
    pictures = opened(root, **changes).unlabelled("train")
    write(folder / f"labels/{pictures.pictures[0].name}.png", ids)
    write(folder / f"confidence/{pictures.pictures[0].name}.png", np.full(ids.shape[:2], 200, np.uint8))
    return pictures.with_labels(folder / "labels", folder / "confidence")


def test_pseudo_labels(root: Path, tmp_path: Path) -> None:
    ids = np.where(mask() == 1, 255, 10).astype(np.uint8)
    pictures = pseudo(root, tmp_path, ids)
    assert len(pictures) == 1
    assert pictures.label(0).tolist() == ids.tolist()
    confidence = pictures.confidence(0)
    assert confidence is not None
    assert confidence.dtype == torch.uint8
    assert (confidence == 200).all()
    assert pictures.with_labels(tmp_path / "labels").confidence(0) is None


@pytest.mark.parametrize("made", [(6, 8), (3, 4)])
def test_pseudo_labels_at_either_size(root: Path, tmp_path: Path, made: tuple[int, int]) -> None:
    pictures = pseudo(root, tmp_path, np.full(made, 10, np.uint8), size=[3, 4])
    assert pictures.label(0).shape == (3, 4)
    confidence = pictures.confidence(0)
    assert confidence is not None
    assert confidence.shape == (3, 4)


def test_pseudo_labels_of_a_foreign_size(root: Path, tmp_path: Path) -> None:
    pictures = pseudo(root, tmp_path, np.full((5, 4), 10, np.uint8), size=[3, 4])
    assert "the label is 4x5" in message(DataError, pictures.label, 0)
    assert "the label is 4x5" in message(DataError, pictures.confidence, 0)


def test_pseudo_labels_with_foreign_ids(root: Path, tmp_path: Path) -> None:
    ids = np.full((6, 8), 10, np.uint8)
    ids[2, 2:4] = 11
    text = message(DataError, pseudo(root, tmp_path, ids).label, 0)
    assert text.endswith("001.png: value 11 (2 pixels); a pseudo-label holds ids 0..10 or 255 in one channel")
    colours = message(DataError, pseudo(root, tmp_path, noise()).label, 0)
    assert "several channels" in colours


def test_confidence_that_is_a_colour_picture(root: Path, tmp_path: Path) -> None:
    pictures = pseudo(root, tmp_path, np.full((6, 8), 10, np.uint8))
    write(tmp_path / f"confidence/{pictures.pictures[0].name}.png", noise())
    assert "a confidence is an 8-bit PNG with one channel" in message(DataError, pictures.confidence, 0)


def test_folders_without_pictures(root: Path, tmp_path: Path) -> None:
    pictures = opened(root).labelled("train", "all")
    assert "no repainted picture of mine is there; looked for images/train/day/001.png" in message(
        DataError, pictures.with_images, tmp_path
    )
    assert "no pseudo-label of mine is there" in message(DataError, pictures.with_labels, tmp_path)
    write(tmp_path / f"labels/{pictures.pictures[2].name}.png", mask())
    assert "(1 confidences are missing)" in message(DataError, pictures.with_labels, tmp_path / "labels", tmp_path)


# --------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_sees_what_matters(root: Path, tmp_path: Path) -> None:
    first = opened(root).labelled("train", "all")
    prints = {
        first.fingerprint(),
        opened(root).unlabelled("train").fingerprint(),
        opened(root).labelled("train", Subset(count=4)).fingerprint(),
        opened(root, size=[3, 4]).labelled("train", "all").fingerprint(),
        opened(root, map={"road": 7, "sky": 1, "wall": 0}).labelled("train", "all").fingerprint(),
        Domain(described(root, map={"road": 7, "sky": 1}), load_taxonomy("street11")).labelled("val", "all").fingerprint(),
    }
    assert len(prints) == 6
    write(root / "masks/train/day/001_mask.png", noise(64, 64))
    prints.add(opened(root).labelled("train", "all").fingerprint())
    write(root / "images/train/day/001.png", noise(64, 64))
    prints.add(opened(root).labelled("train", "all").fingerprint())
    assert len(prints) == 8


def test_fingerprint_forgets_place_and_age(root: Path, tmp_path: Path) -> None:
    first = opened(root).labelled("train", "all").fingerprint()
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copy)
    assert opened(tmp_path / "copy").labelled("train", "all").fingerprint() == first


# -------------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_picture(tmp_path: Path, suffix: str) -> None:
    content = write(tmp_path / f"whole.{suffix}", noise(24, 24)).read_bytes()
    whole = read_image(tmp_path / f"whole.{suffix}")
    refused = 0
    for cut in range(0, len(content), 7):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(content[:cut])
        try:
            assert torch.equal(read_image(path), whole)  # only the end mark may be lost
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= len(range(0, len(content), 7)) - 3


@pytest.mark.parametrize("kind", ["palette", "wide", "jpeg"])
def test_truncated_label(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("label.jpg" if kind == "jpeg" else "label.png")
    values = noise(24, 24)
    makers = {"palette": lambda: write_palette(path, values[..., 0]), "wide": lambda: write_png16(path, values)}
    makers.get(kind, lambda: write(path, values))()
    whole, content = read_label(path), path.read_bytes()
    refused = 0
    for cut in range(0, len(content), 11):
        path.write_bytes(content[:cut])
        try:
            assert (read_label(path) == whole).all()
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= len(range(0, len(content), 11)) - 3


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", zlib.compress(b"x")])
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


# --------------------------------------------------------------------------------------------------- file forms


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
    (plain.convert(form) if form.isupper() else plain).save(tmp_path / f"x.{suffix}")
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


# --------------------------------------------------------------------------------------------------- load_domain


def test_domain_from_preset_file_and_mapping(tmp_path: Path) -> None:
    assert load_domain("gta5").name == "gta5"
    (tmp_path / "own.yaml").write_text("name: own\nroot: x\nimages: '*.png'\nsplits: {train: all}\ntaxonomy: street11\n")
    assert load_domain(str(tmp_path / "own.yaml")).root == "x"
    changed = load_domain({"preset": "synthia", "root": "here", "size": [4, 8], "map": {"road": [3, 22], "ignore": 0}})
    assert (changed.name, changed.root, changed.size) == ("synthia", "here", (4, 8))
    assert changed.map["road"] == [3, 22]
    assert changed.map["sky"] == [1]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("gta", "no preset 'gta' in data; did you mean 'gta5'?"),
        ({"preset": "cityscape"}, "no preset 'cityscape' in data; did you mean 'cityscapes'?"),
        ({"preset": "gta5", "rooot": "x"}, "data gta5: 1 problem"),
        ({"preset": "gta5", "rooot": "x"}, "rooot: unknown key; did you mean 'root'?"),
        ({"name": "own"}, "data own: 4 problems"),
    ],
)
def test_mistakes_in_a_domain(raw: str | dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_domain(raw)
    assert expected in str(caught.value)


def test_read_list_without_pictures_of_a_domain(tmp_path: Path) -> None:
    pictures = [Picture("a/1", Path("a/1.png")), Picture("1", Path("1.png"))]
    listed(tmp_path, "1\n")
    assert read_list(tmp_path / "list.txt", pictures, "x") == ["1"]


def test_png_bytes_are_really_sixteen_bit(tmp_path: Path) -> None:
    """The writer of the tests: Pillow opens its files, and sees eight bits of the sixteen."""
    path = write_png16(tmp_path / "x.png", np.full((2, 2, 3), 0x1234))
    assert np.array(Image.open(io.BytesIO(path.read_bytes())))[0, 0, 0] == 0x12
