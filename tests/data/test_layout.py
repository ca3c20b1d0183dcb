from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from little_domain import COUNTS, mask, message, opened
from picture_files import noise, write
from udas.data.layout import Picture, read_list
from udas.errors import ConfigError, DataError

# ------------------------------------------------------------------------------------------------------------ listing


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
    domain = opened(
        tmp_path, images="rgb/{town}/**/cam_{id}.jpg", labels="ann/**/{id}-{town}.png", splits={"train": "all"}
    )
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
        ({"map": {"rood": 7}}, "mine.map: no class 'rood' in street11; did you mean 'road'?"),
        (
            {"taxonomy": "cityscapes13", "map": {"sky": 1}},
            "no rule leads from its label space cityscapes13 to street11",
        ),
    ],
)
def test_mistakes_that_need_no_files(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path / "absent", **changes)
    assert expected in str(caught.value)


def test_missing_root(tmp_path: Path) -> None:
    text = message(DataError, opened(tmp_path / "absent").pictures, "train")
    assert text == f"mine: the folder {tmp_path}/absent does not exist; set `root` to the data set's folder"


def test_empty_split_says_what_was_tried(root: Path) -> None:
    domain = opened(root, splits={"train": "train", "val": "valid"})
    assert message(DataError, domain.pictures, "val") == (
        f"mine: no picture in split 'val'; looked for images/valid/**/*.png in {root}; check `images` and `splits`"
    )


def test_unknown_split(root: Path) -> None:
    assert message(DataError, opened(root).pictures, "vall") == "mine has no split 'vall'; did you mean 'val'?"


# --------------------------------------------------------------------------------------------------- lists and shares


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


def test_read_list_without_pictures_of_a_domain(tmp_path: Path) -> None:
    pictures = [Picture("a/1", Path("a/1.png")), Picture("1", Path("1.png"))]
    listed(tmp_path, "1\n")
    assert read_list(tmp_path / "list.txt", pictures, "x") == ["1"]


@pytest.mark.parametrize("images", ["/elsewhere/{split}/*.png", "../images/{split}/*.png", "images/../{split}/*.png"])
def test_pictures_lie_below_the_root(root: Path, images: str) -> None:
    with pytest.raises(ConfigError, match=r"images: .* leads out of `root`; give a `root` above it"):
        opened(root, images=images)


def test_splits_lie_below_the_root(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"splits.train: '../train' leads out of `root`"):
        opened(root, splits={"train": "../train", "val": "val"})


def test_names_may_hold_what_only_some_take_for_the_end_of_a_line(tmp_path: Path) -> None:
    names = ["a/one\u2028two", "a/one\x85two", "a/three"]
    listed(tmp_path, "\r\n".join(names))
    pictures = [Picture(name, Path(f"{name}.png")) for name in names]
    assert read_list(tmp_path / "list.txt", pictures, "x") == sorted(names)
