"""The loader: values follow from (seed, stream, draw), never from workers, processes or history."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from udas.config import AugmentConfig
from udas.data.batch import IGNORE, Batch, Stream, together
from udas.data.dataset import PictureSet
from udas.data.layout import Picture
from udas.data.loader import collate, make_loader
from udas.data.sampling import seed_of
from udas.data.transforms import augment
from udas.data.workers import hear_the_training_alone
from udas.errors import ConfigError, DataError

SOURCE, LABELLED, UNLABELLED, PSEUDO = Stream.SOURCE, Stream.LABELLED, Stream.UNLABELLED, Stream.PSEUDO
AUGMENT = AugmentConfig(scale=(0.7, 1.5), crop=(10, 14), hue=0.1)
BATCH = {SOURCE: 4, UNLABELLED: 2, PSEUDO: 6}


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def picture_set(folder, count, labelled=True, seed=0, size=(16, 20)):
    rng = np.random.default_rng(seed)
    pictures = tuple(
        Picture(f"p{k}", write(folder / f"i/p{k}.png", rng.integers(0, 256, (*size, 3), np.uint8)))
        for k in range(count)
    )
    names = [picture.name for picture in pictures] if labelled else []
    labels = {name: write(folder / f"l/{name}.png", rng.integers(0, 4, size, np.uint8)) for name in names}
    return PictureSet(folder.name, pictures, 4, labels)


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """Three streams of 7, 5 and 3 pictures; the last with confidences."""
    root = tmp_path_factory.mktemp("streams")
    pseudo = picture_set(root / "pseudo", 3, seed=3)
    for k in range(3):
        write(root / f"c/p{k}.png", np.full((16, 20), 51 * (k + 1), np.uint8))
    pseudo = pseudo.with_labels(root / "pseudo/l", confidence=root / "c")
    return {SOURCE: picture_set(root / "s", 7), UNLABELLED: picture_set(root / "u", 5, False, 2), PSEUDO: pseudo}


def batches(streams, start=0, stop=6, **options):
    return list(make_loader(streams, BATCH, AUGMENT, 11, start, stop, **options))


def same(left, right):
    """Whether two batches have equal values, types and names."""
    for stream in (f.name for f in fields(Batch)):
        one, other = getattr(left, stream), getattr(right, stream)
        if one is None or other is None:
            if one is not other:
                return False
            continue
        for part in ("image", "label", "confidence"):
            a, b = getattr(one, part), getattr(other, part)
            if (a is None) != (b is None) or (a is not None and not (a.dtype == b.dtype and torch.equal(a, b))):
                return False
        if one.seeds != other.seeds or one.names != other.names:
            return False
    return True


def all_same(left, right):
    return len(left) == len(right) and all(map(same, left, right))


def joined(shares):
    """The blocks of several ranks in order, as one batch."""

    def cat(values):
        return None if values[0] is None else torch.cat(values)

    def merge(blocks):
        tensors = {part: cat([getattr(b, part) for b in blocks]) for part in ("image", "label", "confidence")}
        seeds, names = (sum((getattr(b, part) for b in blocks), ()) for part in ("seeds", "names"))
        return replace(blocks[0], **tensors, seeds=seeds, names=names)

    given = [f.name for f in fields(Batch) if getattr(shares[0], f.name) is not None]
    return Batch(**{stream: merge([getattr(share, stream) for share in shares]) for stream in given})


@pytest.fixture(scope="module")
def whole(streams):
    return batches(streams)


def test_blocks_hold_what_they_promise(streams, whole):
    for batch in whole:
        assert batch.labelled is None
        for stream, count in BATCH.items():
            block = getattr(batch, stream)
            assert block.image.shape == (count, 3, 10, 14)
            assert block.image.dtype == torch.float32
            assert 0 <= block.image.min() <= block.image.max() <= 1
            assert len(block.seeds) == len(block.names) == count
        assert batch.source.label.shape == (4, 10, 14)
        assert batch.source.label.dtype == torch.int64
        assert set(batch.source.label.unique().tolist()) <= {0, 1, 2, 3, IGNORE}
        assert batch.source.confidence is None
        assert batch.unlabelled.label is None
        assert batch.unlabelled.confidence is None
        for name, confidence in zip(batch.pseudo.names, batch.pseudo.confidence, strict=True):
            values = set((confidence * 255).round().int().unique().tolist())
            assert values <= {0, 51 * (int(name[1:]) + 1)}, "a confidence belongs to another picture"
        assert batch.pseudo.confidence.dtype == torch.float32


def test_blocks_move_in_the_memory_format_of_the_device(whole):
    moved = whole[0].to(torch.device("cpu"), torch.channels_last)
    assert moved.source.image.is_contiguous(memory_format=torch.channels_last)
    assert same(moved, whole[0])


def test_pictures_of_two_sizes_do_not_go_together(whole):
    small = whole[0].unlabelled
    large = replace(small, image=small.image.repeat(1, 1, 2, 1))
    assert torch.equal(together(whole[0].source, small), torch.cat([whole[0].source.image, small.image]))
    with pytest.raises(ConfigError, match=r"pictures of 10 x 14, unlabelled ones of 20 x 14: .* augment\.crop"):
        together(small, large)


def test_a_sample_follows_from_seed_stream_and_draw(streams, whole):
    step, place = 3, 2
    block, draw = whole[step].source, step * 4 + place
    assert block.seeds[place] == seed_of(11, "source", draw)
    pictures, generator = streams[SOURCE], torch.Generator().manual_seed(seed_of(11, "source", draw))
    index = [picture.name for picture in pictures.pictures].index(block.names[place])
    image, label, _ = augment(pictures.image(index), pictures.label(index), None, AUGMENT, generator)
    assert torch.equal(block.image[place], image)
    assert torch.equal(block.label[place], label.long())


def test_draws_of_one_picture_differ(streams):
    loader = make_loader({SOURCE: streams[SOURCE]}, {SOURCE: 7}, AUGMENT, 0, 0, 2)
    first, second = (dict(zip(batch.source.names, batch.source.image, strict=True)) for batch in loader)
    assert first.keys() == second.keys()
    assert all(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("workers", [1, 2])
def test_values_do_not_depend_on_workers_and_resume_anywhere(streams, whole, workers):
    loader = make_loader(streams, BATCH, AUGMENT, 11, 0, 6, workers=workers)
    assert all_same(list(loader), whole)
    assert all_same(list(loader), whole), "a second pass repeats the same steps"
    for start in (1, 4):
        assert all_same(batches(streams, start, workers=workers), whole[start:])


def test_no_step_is_read_before_the_first(streams, monkeypatch):
    read = []
    original = PictureSet.image
    monkeypatch.setattr(PictureSet, "image", lambda self, index: read.append(index) or original(self, index))
    assert len(batches(streams, 5)) == 1
    assert len(read) == sum(BATCH.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_two_ranks_share_the_batch_of_one_process(streams, whole, workers):
    shares = [batches(streams, rank=rank, world=2, workers=workers) for rank in range(2)]
    assert all_same([joined(pair) for pair in zip(*shares, strict=True)], whole)


def test_seeds_of_runs_give_other_batches(streams, whole):
    other = list(make_loader(streams, BATCH, AUGMENT, 12, 0, 6))
    assert not any(map(same, other, whole))


def test_the_global_generator_is_left_alone(streams):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for workers in (0, 1):
        batches(streams, workers=workers)
    assert torch.equal(torch.rand(3), expected)


def test_the_unlabelled_stream_opens_no_label(streams, monkeypatch):
    monkeypatch.setattr(PictureSet, "label", lambda *_: pytest.fail("a label was opened"))
    loader = make_loader({UNLABELLED: streams[SOURCE]}, {UNLABELLED: 2}, AUGMENT, 0, 0, 2)
    assert all(batch.unlabelled.label is None for batch in loader)


def test_what_goes_to_a_spawned_worker_gives_the_same(streams, whole):
    loader = make_loader(streams, BATCH, AUGMENT, 11, 0, 6)
    travelled = pickle.loads(pickle.dumps(loader.dataset))
    assert all_same([travelled[keys] for keys in loader.sampler], whole)


@pytest.mark.usefixtures("foreground")
def test_workers_leave_ctrl_c_to_the_training_process(streams, whole):
    """It reaches them, too; the step they work for is still to be finished and saved."""
    arriving = iter(make_loader(streams, BATCH, AUGMENT, 11, 0, 6, workers=2))
    seen = [next(arriving)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    assert all_same(seen + list(arriving), whole)


@pytest.mark.usefixtures("foreground")
def test_workers_that_are_just_starting_leave_ctrl_c_and_sigterm_to_it_too(streams, whole, monkeypatch):
    def late(worker: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        hear_the_training_alone(worker)

    monkeypatch.setattr("udas.data.loader.hear_the_training_alone", late)
    assert all_same(batches(streams, workers=2), whole)


def test_workers_end_with_a_process_that_still_holds_them(streams):
    """As after an error, whose traceback holds the loader: nothing closes it before the process waits for workers."""

    def hold() -> None:
        held.append(arriving := iter(make_loader(streams, BATCH, AUGMENT, 11, 0, 6, workers=2)))
        next(arriving)

    held: list[object] = []
    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    process.join(60)
    ended = process.exitcode
    process.kill()
    assert ended == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_workers_arrive_as_they_are(streams, tmp_path, workers):
    broken = picture_set(tmp_path / "b", 6)
    broken.pictures[2].image.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    loader = make_loader({SOURCE: broken}, {SOURCE: 2}, AUGMENT, 0, 0, 3, workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    with pytest.raises(DataError) as expected:
        broken.image(2)
    assert type(caught.value) is DataError
    assert str(caught.value) == str(expected.value)
    assert "\n" not in str(caught.value)


def test_an_error_comes_at_its_step(tmp_path):
    broken = picture_set(tmp_path / "b", 6)
    intact = make_loader({SOURCE: broken}, {SOURCE: 2}, AUGMENT, 0, 0, 3)
    order = [name for batch in intact for name in batch.source.names]
    broken.labels[order[4]].unlink()
    loader = iter(make_loader({SOURCE: broken}, {SOURCE: 2}, AUGMENT, 0, 0, 3, workers=2))
    assert next(loader).source.names == tuple(order[:2])
    assert next(loader).source.names == tuple(order[2:4])
    with pytest.raises(DataError, match=rf"{order[4]}\.png: no such file"):
        next(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_bugs_keep_their_traceback(streams, monkeypatch, workers):
    monkeypatch.setattr(PictureSet, "image", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        batches(streams, workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_of_several_sizes_need_a_crop(tmp_path, workers):
    small, large = picture_set(tmp_path / "a", 1), picture_set(tmp_path / "b", 1, size=(12, 13))
    mixed = replace(small, pictures=(*small.pictures, replace(large.pictures[0], name="big")), labels={})
    still = AugmentConfig(crop=None)
    sizes = r"(p0 \(20x16\) and big \(13x12\)|big \(13x12\) and p0 \(20x16\))"
    text = f"source pictures {sizes} do not fit into one batch; set training.augment.crop, or `size` of the data set"
    with pytest.raises(DataError, match=text):
        list(make_loader({SOURCE: mixed}, {SOURCE: 2}, still, 0, 0, 1, workers=workers))
    assert len(list(make_loader({SOURCE: mixed}, {SOURCE: 2}, AUGMENT, 0, 0, 1, workers=workers))) == 1


def test_batch_sizes_are_checked_at_once(streams):
    with pytest.raises(ConfigError, match=r"batch: 4 source pictures cannot be shared by 3 processes"):
        make_loader(streams, BATCH, AUGMENT, 0, 0, 1, world=3)
    with pytest.raises(DataError, match="the source stream has no pictures"):
        make_loader({SOURCE: replace(streams[SOURCE], pictures=())}, {SOURCE: 1}, AUGMENT, 0, 0, 1)


def test_workers_use_one_thread(streams, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(
            PictureSet, "image", lambda *_: torch.full((3, 10, 14), torch.get_num_threads(), dtype=torch.uint8)
        )
        still = AugmentConfig(flip=False, brightness=0, contrast=0, saturation=0)
        batch = next(iter(make_loader({UNLABELLED: streams[UNLABELLED]}, {UNLABELLED: 1}, still, 0, 0, 1, workers=1)))
    finally:
        torch.set_num_threads(threads)
    assert (batch.unlabelled.image * 255).round().unique().tolist() == [1]


def test_collate_keeps_the_order(streams):
    loader = make_loader(streams, BATCH, AUGMENT, 11, 2, 3)
    samples = [loader.dataset.sample(*key) for key in next(iter(loader.sampler))]
    assert len(loader) == 1
    assert same(collate(samples), batches(streams, 2, 3)[0])
