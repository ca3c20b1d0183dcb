from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from little_domain import make_domain, mask, message, opened
from picture_files import noise, write
from udas.config import Subset
from udas.data import check
from udas.data.check import check_domain
from udas.errors import DataError

BOTH = ("train", "val")
ALL = {"train": "all", "val": "all"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five train and two val pictures, all different."""
    make_domain(tmp_path / "set")
    for number, path in enumerate(sorted((tmp_path / "set/images/val").rglob("*.png"))):
        write(path, noise(seed=100 + number))
    return tmp_path / "set"


def label(root: Path, place: str) -> Path:
    return root / f"masks/{place}_mask.png"


def test_a_sound_domain_has_no_problems_and_is_counted(root: Path) -> None:
    values = mask()
    values[5, :3] = 0  # ignore
    write(label(root, "val/day/001"), values)
    report = check_domain(opened(root), BOTH, grants=ALL)
    assert report.ok
    assert report.problems == []
    assert (report.domain, list(report.splits)) == ("mine", ["train", "val"])
    train, val = report.splits["train"], report.splits["val"]
    assert (train.pictures, train.labelled, train.unlabelled) == (5, 5, 0)
    assert (train.histogram["road"], train.histogram["sky"], train.ignored) == (5 * 40, 5 * 8, 0)
    assert (val.histogram["road"], val.histogram["sky"], val.ignored) == (2 * 40 - 3, 2 * 8, 3)
    assert sum(val.histogram.values()) + val.ignored == 2 * 48
    assert dict(val.sizes) == {(6, 8): 2}
    assert "road" not in train.absent
    assert len(train.absent) == 9


def test_only_granted_labels_are_opened(root: Path) -> None:
    granted = Subset(count=2, seed=1)
    domain = opened(root, labelled=granted.model_dump())
    kept = {str(path) for path in domain.labelled("train").labels.values()}
    for path in (root / "masks").rglob("*.png"):
        if str(path) not in kept:
            path.write_bytes(b"closed")
    report = check_domain(domain, BOTH, grants={"val": "none"})
    assert report.ok
    assert (report.splits["train"].labelled, report.splits["train"].unlabelled) == (2, 3)
    assert report.splits["train"].histogram["road"] == 2 * 40
    assert (report.splits["val"].labelled, report.splits["val"].absent) == (0, [])


def test_values_without_a_rule_are_listed_with_their_first_file(root: Path) -> None:
    for place, pixels in (("train/day/003", 4), ("train/night/wet/000", 2)):
        values = mask()
        values[3, :pixels] = 66
        write(label(root, place), values)
    values[2, 0] = 77
    write(label(root, "val/day/001"), values)
    report = check_domain(opened(root), BOTH, grants=ALL)
    stray = report.splits["train"].stray[66]
    assert (stray.pixels, stray.files, stray.first) == (6, 2, label(root, "train/day/003"))
    assert report.splits["train"].histogram["road"] == 3 * 40
    assert sorted(report.splits["val"].stray) == [66, 77]
    found = f"(6 pixels in 2 files, first in {label(root, 'train/day/003')})"
    assert f"train: value 66 is not in `map` {found}; add it to a class or to `ignore`" in report.problems
    assert len(report.problems) == 3


def test_stray_colours_and_labels_of_the_wrong_kind(root: Path) -> None:
    colours = np.full((6, 8, 3), 9, np.uint8)
    colours[0, 0] = (1, 2, 3)
    write(label(root, "train/day/003"), colours)
    report = check_domain(opened(root), ["train"], grants=ALL)
    assert report.splits["train"].stray[1, 2, 3].pixels == 1
    assert "value [1, 2, 3]" in report.problems[0]
    only_ids = opened(root, map={"road": 7, "sky": 1})
    assert "holds colours but `map` lists only ids" in check_domain(only_ids, ["train"], grants=ALL).problems[0]


def test_broken_files_and_sizes_are_named_and_the_rest_is_still_counted(root: Path) -> None:
    picture = root / "images/train/day/001.png"
    picture.write_bytes(picture.read_bytes()[:60])
    write(label(root, "train/day/003"), mask(5, 8))
    label(root, "train/night/wet/000").write_bytes(b"no picture")
    report = check_domain(opened(root), ["train"], grants=ALL)
    train = report.splits["train"]
    assert len(report.problems) == len(train.faults) == 3
    assert all(line.startswith("train: ") for line in report.problems)
    for path, said in (
        (picture, "cannot be read"),
        (label(root, "train/day/003"), "8x5 (width x height), its picture 8x6"),
        (label(root, "train/night/wet/000"), "cannot be read"),
    ):
        assert any(str(path) in fault and said in fault for fault in train.faults)
    assert train.histogram["road"] == 2 * 40
    assert sum(train.sizes.values()) == 4


def test_many_faults_are_counted_rather_than_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SHOWN", 2)
    for path in (root / "images/train").rglob("*.png"):
        path.write_bytes(b"broken")
    report = check_domain(opened(root), ["train"])
    assert len(report.problems) == 3
    assert report.problems[-1] == "train: 3 more files like these"


def test_missing_label_files_are_a_problem_and_pictures_are_still_checked(root: Path) -> None:
    label(root, "train/day/003").unlink()
    report = check_domain(opened(root), ["train"], grants=ALL)
    assert len(report.problems) == 1
    assert "day/003_mask.png: no such label file" in report.problems[0]
    assert (report.splits["train"].pictures, report.splits["train"].labelled) == (5, 0)


def test_equal_pictures_in_two_splits_are_found_under_any_name(root: Path) -> None:
    shutil.copy(root / "images/train/day/003.png", root / "images/val/day/001.png")
    write(root / "images/val/night/wet/000.png", noise(seed=2), compress_level=0)  # the same pixels in other bytes
    report = check_domain(opened(root), BOTH)
    (overlap,) = report.overlaps
    assert (overlap.splits, overlap.pictures) == (("train", "val"), 2)
    assert overlap.example in {
        ("images/train/day/003", "images/val/day/001"),
        ("images/train/night/wet/002", "images/val/night/wet/000"),
    }
    assert "train and val share 2 pictures, for example images/train/" in report.problems[0]
    assert not report.ok


def test_progress_counts_pictures_of_all_splits(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    check_domain(opened(root), BOTH, lambda done, total: seen.append((done, total)))
    assert seen == [(done, 7) for done in range(1, 8)]


def test_an_unknown_split_is_an_error(root: Path) -> None:
    assert "trian" in message(DataError, check_domain, opened(root), ["trian"])
