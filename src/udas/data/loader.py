"""From picture sets to batches: one loader for all streams of a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from udas.config import AugmentConfig
from udas.data.batch import Batch, Block, Stream
from udas.data.dataset import PictureSet
from udas.data.sampling import Key, StreamSampler, seed_of
from udas.data.transforms import augment as augmented
from udas.data.workers import begun_deaf, hear_the_training_alone
from udas.errors import DataError, UdasError


@dataclass(frozen=True)
class Sample:
    """One augmented picture: image [3, h, w] float32 in [0, 1], label and confidence [h, w] uint8."""

    stream: Stream
    name: str
    seed: int
    image: Tensor
    label: Tensor | None
    confidence: Tensor | None


class Steps(Dataset[Batch | UdasError]):
    """The batch of a step by its keys; a sample is a function of its key and the run's seed alone."""

    def __init__(self, streams: Mapping[Stream, PictureSet], augment: AugmentConfig, seed: int) -> None:
        self.streams, self.augment, self.seed = dict(streams), augment, seed

    def __getitem__(self, keys: Sequence[Key]) -> Batch | UdasError:
        """The batch, or the error that kept it from being read.

        A worker's exception would reach the training process with its message replaced by a traceback of the worker;
        an error on the user's side is therefore handed over as a value, and raised by `Loader`.
        """
        try:
            return collate([self.sample(*key) for key in keys])
        except UdasError as error:
            return error

    def sample(self, stream: Stream, index: int, draw: int) -> Sample:
        """Read and augment one picture. In the unlabelled stream no label is asked for."""
        pictures, seed = self.streams[stream], seed_of(self.seed, stream, draw)
        image, label, confidence = pictures.image(index), None, None
        if pictures.labels and stream is not Stream.UNLABELLED:
            label, confidence = pictures.label(index), pictures.confidence(index)
        generator = torch.Generator().manual_seed(seed)
        values = augmented(image, label, confidence, self.augment, generator)
        return Sample(stream, pictures.pictures[index].name, seed, *values)


class Loader(DataLoader[Batch | UdasError]):
    """A data loader that raises the user errors of its workers as they are."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The batches of the steps from `start` to `stop`."""
        for batch in begun_deaf(super().__iter__):
            if isinstance(batch, UdasError):
                raise batch
            yield batch


def make_loader(
    streams: Mapping[Stream, PictureSet],
    batch: Mapping[Stream, int],
    augment: AugmentConfig,
    seed: int,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin: bool = False,
) -> Loader:
    """Batches of this rank for the steps from `start` to `stop`; their values do not depend on workers or history.

    Args:
        streams: the pictures of each stream.
        batch: pictures per step and stream, over all ranks together.
        augment: weak augmentation.
        seed: seed of the run; `Block.seeds` are `seed_of(seed, stream, draw)`.
        start: first step; a resumed run continues with the very batches it would have seen.
        stop: one past the last step.
        rank: this process, 0 .. world - 1.
        world: number of processes.
        workers: loading processes; 0 loads in this one. Each uses one thread.
        pin: put batches into pinned memory, for devices that copy faster from there.

    Raises:
        ConfigError: batch sizes that are missing, not positive, or not divisible by `world`.
        DataError: an empty stream at once; an unreadable picture or label at the step that needs it.
    """
    sizes = {stream: len(pictures) for stream, pictures in streams.items()}
    return Loader(
        Steps(streams, augment, seed),
        batch_size=None,  # the sampler's items are the keys of whole batches
        sampler=StreamSampler(sizes, batch, seed, start, stop, rank, world),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=hear_the_training_alone,
        generator=torch.Generator().manual_seed(seed_of(seed, "loader")),  # else it draws from the global one
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """One block per stream, pictures in the order given.

    Raises:
        DataError: when the pictures of a stream differ in size.
    """
    streams = dict.fromkeys(sample.stream for sample in samples)
    return Batch(**{stream.value: _block([s for s in samples if s.stream is stream]) for stream in streams})


def _block(samples: Sequence[Sample]) -> Block:
    first = samples[0]
    for other in samples[1:]:
        if other.image.shape != first.image.shape:
            sizes = " and ".join(f"{s.name} ({s.image.shape[2]}x{s.image.shape[1]})" for s in (first, other))
            raise DataError(
                f"{first.stream} pictures {sizes} do not fit into one batch; "
                "set training.augment.crop, or `size` of the data set"
            )
    labels = [sample.label.long() for sample in samples if sample.label is not None]
    confidences = [sample.confidence.float() / 255 for sample in samples if sample.confidence is not None]
    return Block(
        image=default_collate([sample.image for sample in samples]),  # stacks into shared memory in a worker
        label=default_collate(labels) if labels else None,
        confidence=default_collate(confidences) if confidences else None,
        seeds=tuple(sample.seed for sample in samples),
        names=tuple(sample.name for sample in samples),
    )
