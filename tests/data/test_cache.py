"""The cache gives exactly what the files give, is written once, and never holds labels that were not granted."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from udas.data.cache import build_cache
from udas.data.dataset import PictureSet
from udas.data.layout import Picture
from udas.errors import DataError, RunError


def write(path, size, seed, channels=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, channels) if channels > 1 else size
    high = 256 if channels > 1 else 4
    Image.fromarray(np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def pictures(tmp_path):
    """Five pictures of 20 x 30, read at 12 x 16; the middle three have labels."""
    made = [Picture(f"town/{k}", write(tmp_path / f"images/town/{k}.png", (20, 30), k)) for k in range(5)]
    labels = {f"town/{k}": write(tmp_path / f"labels/{k}.png", (20, 30), k, 1) for k in (1, 2, 3)}
    return PictureSet("toy", tuple(made), 4, labels, size=(12, 16))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def arrays(folder):
    return sorted(path.name.split("-")[0] for path in folder.glob("*.npy"))


def no_reading(monkeypatch):
    def fail(path, *_):
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr("udas.data.dataset.read_image", fail)
    monkeypatch.setattr("udas.data.dataset.read_label", fail)


def test_the_cache_gives_what_the_files_give(pictures, folder, monkeypatch):
    cached = build_cache(pictures, folder)
    images, labels = [pictures.image(k) for k in range(5)], [pictures.label(k) for k in (1, 2, 3)]
    no_reading(monkeypatch)
    for other in (cached, pickle.loads(pickle.dumps(cached)), build_cache(pictures, folder)):
        assert all(torch.equal(image, other.image(k)) for k, image in enumerate(images))
        assert all(torch.equal(label, other.label(k)) for k, label in zip((1, 2, 3), labels, strict=True))
        assert other.image(0).dtype == other.label(1).dtype == torch.uint8
    assert cached.fingerprint() == pictures.fingerprint()


def test_what_is_read_can_be_changed_without_changing_the_cache(pictures, folder):
    cached = build_cache(pictures, folder)
    cached.image(0).zero_()
    assert torch.equal(cached.image(0), pictures.image(0))


def test_a_cached_set_stays_small_when_it_travels(pictures, folder):
    big = build_cache(replace(pictures, size=(300, 400)), folder)
    big.image(0)
    assert len(pickle.dumps(big)) < 10_000


def test_arrays_are_written_once(pictures, folder):
    calls = []
    build_cache(pictures, folder, lambda done, total: calls.append((done, total)))
    assert calls == [(k, 8) for k in range(1, 9)]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    build_cache(pictures, folder, lambda done, total: calls.append((done, total)))
    assert len(calls) == 8
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_sets_with_other_labels_share_the_pictures(pictures, folder, tmp_path):
    build_cache(replace(pictures, labels={}), folder)
    assert arrays(folder) == ["images"]
    build_cache(pictures, folder)
    assert arrays(folder) == ["images", "labels"]
    for k in range(5):
        write(tmp_path / f"pseudo/town/{k}.png", (12, 16), 9 + k, 1)
    pseudo = build_cache(pictures.with_labels(tmp_path / "pseudo"), folder)
    assert arrays(folder) == ["images", "labels", "labels"]
    assert torch.equal(pseudo.label(0), pictures.with_labels(tmp_path / "pseudo").label(0))


def test_only_granted_labels_are_read(pictures, folder, tmp_path):
    granted = {"town/2": pictures.labels["town/2"]}
    for path in (tmp_path / "labels").iterdir():
        if path != granted["town/2"]:
            path.unlink()
    cached = build_cache(replace(pictures, labels=granted), folder)
    assert list(cached.label_cache) == ["town/2"]
    unlabelled = build_cache(replace(pictures, labels={}), folder)
    assert unlabelled.label_cache is None
    with pytest.raises(KeyError):
        unlabelled.label(2)


def test_changed_files_are_read_again(pictures, folder):
    old = build_cache(pictures, folder)
    image = pictures.pictures[0].image
    write(image, (20, 30), 77)
    os.utime(image, ns=(1, 1))
    new = build_cache(pictures, folder)
    assert torch.equal(new.image(0), pictures.image(0))
    assert not torch.equal(new.image(0), old.image(0))
    other_size = replace(pictures, size=(10, 10))
    assert build_cache(other_size, folder).image(0).shape == (3, 10, 10)


def test_repainted_pictures_do_not_come_from_the_cache(pictures, folder, tmp_path):
    for k in range(5):
        write(tmp_path / f"painted/town/{k}.png", (20, 30), 50 + k)
    cached = build_cache(pictures, folder).with_images(tmp_path / "painted")
    fresh = pictures.with_images(tmp_path / "painted")
    assert torch.equal(cached.image(0), fresh.image(0))
    assert torch.equal(build_cache(fresh, folder).image(0), fresh.image(0))


def test_an_index_says_what_is_there(pictures, folder):
    build_cache(pictures, folder)
    index = json.loads(next(folder.glob("labels-*.json")).read_text())
    assert index["domain"] == "toy"
    assert index["names"] == ["town/1", "town/2", "town/3"]
    assert index["shape"] == [3, 12, 16]


def test_a_broken_picture_leaves_nothing_behind(pictures, folder):
    pictures.pictures[3].image.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(DataError, match=r"images/town/3\.png"):
        build_cache(pictures, folder)
    assert not list(folder.glob("*.npy*"))


def test_an_interrupted_writer_leaves_nothing_behind(pictures, folder):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(pictures, folder, stop)
    assert not list(folder.glob("*.npy*"))


def test_what_a_killed_process_left_is_cleared_away(pictures, folder):
    folder.mkdir()
    old, living = folder / "images-0.npy.part-1", folder / "images-0.npy.part-2"
    for path in (old, living):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    build_cache(pictures, folder)
    assert not old.exists()
    assert living.exists()


def test_pictures_of_several_sizes_are_named(pictures, folder):
    write(pictures.pictures[4].image, (10, 11), 4)
    with pytest.raises(DataError, match=r"toy: pictures differ in size \(town/0 30x20, town/4 11x10\); set `size`"):
        build_cache(replace(pictures, size=None, labels={}), folder)


def test_a_full_disk_is_seen_before_the_work(pictures, folder, monkeypatch):
    monkeypatch.setattr("udas.data.cache.shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(RunError, match=r"cache: the cache needs 0\.0 GiB, 0\.0 GiB are free; free some space"):
        build_cache(pictures, folder)


def test_a_disk_that_fills_up_while_writing(pictures, folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("udas.data.cache.np.lib.format.write_array_header_1_0", full)
    with pytest.raises(RunError, match=r"npy: cannot be written \(No space left on device\); free some space"):
        build_cache(pictures, folder)
    assert not list(folder.glob("*.npy*"))


def test_an_empty_set_needs_no_cache(folder):
    empty = PictureSet("toy", (), 4)
    assert build_cache(empty, folder) == empty
    assert not folder.exists()


@pytest.mark.parametrize("size", [0, 60, 1000])
def test_an_array_that_was_cut_off_is_written_again(pictures, folder, size):
    build_cache(pictures, folder)
    for array in folder.glob("*.npy"):
        array.write_bytes(array.read_bytes()[:size])
    cached = build_cache(pictures, folder)
    assert torch.equal(cached.image(4), pictures.image(4))
    assert torch.equal(cached.label(3), pictures.label(3))
