from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from little_domain import described, mask, message, opened
from picture_files import noise, write
from udas.config import Subset
from udas.data.dataset import Domain, PictureSet
from udas.data.layout import Picture
from udas.errors import DataError
from udas.taxonomy import load_taxonomy

# ----------------------------------------------------------------------------------------------------- granted labels


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
        "images/03", "images/08", "images/10", "images/19",
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
    assert text == "mine train: 6 labelled pictures asked for, 5 exist; lower `count`"


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


def test_pictures_whose_label_file_exists(root: Path) -> None:
    for path in root.glob("masks/train/day/*.png"):
        path.unlink()
    left = opened(root, labelled="existing").labelled("train")
    assert [picture.image.stem for picture in left.pictures] == ["000", "002", "004"]


def test_no_label_file_exists(root: Path) -> None:
    elsewhere = opened(root, labelled="existing", labels="gt/{split}/{stem}.png")
    text = message(DataError, elsewhere.labelled, "train")
    assert text == f"mine train: no label file exists, such as {root}/gt/train/001.png; check `labels`"
    text = message(DataError, opened(root, labels=None, map={}).labelled, "train", "existing")
    assert text == "mine train: `labelled: existing`, but `labels` is not given"


def test_missing_label_file(root: Path) -> None:
    path = root / "masks/train/day/003_mask.png"
    path.unlink()
    text = message(DataError, opened(root).labelled, "train", "all")
    assert text == f"{path}: no such label file (1 of 5 are missing); check `labels`"


def test_granted_without_a_label_pattern(root: Path) -> None:
    text = message(DataError, opened(root, labels=None, map={}).labelled, "train", "all")
    assert text == "mine train: pictures are granted as labelled, but `labels` is not given"


# ------------------------------------------------------------------------------------------------------ reading a set


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
    stripes[:, 3::8] = stripes[:, 4::8] = 255  # two bright columns of eight: all that plain bilinear would look at
    write(tmp_path / "images/1.png", stripes)
    layout = {"images": "images/*.png", "labels": None, "splits": {"train": "all"}}
    shrunk = opened(tmp_path, **layout, size=[8, 8]).unlabelled("train").image(0)
    assert shrunk.max() < 80


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


# -------------------------------------------------------------------------------------- repainted and pseudo-labelled


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


def test_real_labels_replace_pseudo_labels(root: Path, tmp_path: Path) -> None:
    real = opened(root).labelled("train", "all")
    first, second = (picture.name for picture in real.pictures[:2])
    for name in (first, second):
        write(tmp_path / f"labels/{name}.png", np.full((6, 8), 10, np.uint8))
        write(tmp_path / f"confidence/{name}.png", np.full((6, 8), 200, np.uint8))
    made = opened(root).unlabelled("train").with_labels(tmp_path / "labels", tmp_path / "confidence")
    granted = replace(real, pictures=real.pictures[1:], labels={second: real.labels[second]})  # other indices
    pictures = made.with_known(granted)
    assert [picture.name for picture in pictures.pictures] == [first, second]
    assert (pictures.label(0) == 10).all()
    assert (pictures.confidence(0) == 200).all()
    assert torch.equal(pictures.label(1), real.label(1))
    assert not (pictures.label(1) == 10).all()
    assert (pictures.confidence(1) == 255).all()
    assert pictures.confidence(1).shape == pictures.label(1).shape
    assert pictures.fingerprint() != made.fingerprint()


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


# -------------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_sees_what_matters(root: Path, tmp_path: Path) -> None:
    first = opened(root).labelled("train", "all")
    prints = {
        first.fingerprint(),
        opened(root).unlabelled("train").fingerprint(),
        opened(root).labelled("train", Subset(count=4)).fingerprint(),
        opened(root, size=[3, 4]).labelled("train", "all").fingerprint(),
        opened(root, map={"road": 7, "sky": 1, "wall": 0}).labelled("train", "all").fingerprint(),
        Domain(described(root, map={"road": 7, "sky": 1}), load_taxonomy("street11"))
        .labelled("val", "all")
        .fingerprint(),
    }
    assert len(prints) == 6
    write(root / "masks/train/day/001_mask.png", noise(64, 64))
    prints.add(opened(root).labelled("train", "all").fingerprint())
    write(root / "images/train/day/001.png", noise(64, 64))
    prints.add(opened(root).labelled("train", "all").fingerprint())
    assert len(prints) == 8


def test_fingerprint_sees_confidences(root: Path, tmp_path: Path) -> None:
    pictures = pseudo(root, tmp_path, np.full((6, 8), 10, np.uint8))
    prints = {pictures.fingerprint(), pictures.with_labels(tmp_path / "labels").fingerprint()}
    write(tmp_path / f"confidence/{pictures.pictures[0].name}.png", noise(6, 8)[..., 0])
    prints.add(pictures.fingerprint())
    assert len(prints) == 3


def test_fingerprint_forgets_place_and_age(root: Path, tmp_path: Path) -> None:
    first = opened(root).labelled("train", "all").fingerprint()
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copy)
    assert opened(tmp_path / "copy").labelled("train", "all").fingerprint() == first
