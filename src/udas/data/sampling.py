"""Which pictures a step sees: a pure function of (seed, step, rank), so that any step can be the first one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from udas.data.batch import Stream
from udas.errors import ConfigError, DataError

Key = tuple[Stream, int, int]
"""(stream, index of the picture in its set, draw: global number of the sample in its stream)."""


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from `parts`, the same on every machine: blake2b over their types, lengths and texts."""
    coded = "".join(f"{'s' if isinstance(part, str) else 'i'}{len(str(part))}:{part!s}" for part in parts)
    return int.from_bytes(hashlib.blake2b(coded.encode(), digest_size=8).digest(), "big") >> 1


def uniform(seeds: Sequence[int], purpose: str, count: int, device: torch.device | None = None) -> tuple[Tensor, ...]:
    """`count` values ~ U(0, 1) per picture, as `count` tensors [B]; different purposes are independent."""
    return uniform_rows(seeds, purpose, count, device).unbind(1)


def uniform_rows(seeds: Sequence[int], purpose: str, count: int, device: torch.device | None = None) -> Tensor:
    """The same values as one tensor, [B, count]; on the CPU when `device` is None."""
    generators = [torch.Generator().manual_seed(seed_of(seed, purpose)) for seed in seeds]
    draws = torch.stack([torch.rand(count, generator=generator) for generator in generators])
    return draws.to(device or torch.device("cpu"), non_blocking=True)


def share_of(stream: Stream, batch: int, world: int, key: str = "batch") -> int:
    """Pictures of a stream's batch for each of `world` processes.

    Raises:
        ConfigError: when they cannot be shared; begins with `key`, the setting to change.
    """
    share, left = divmod(batch, world)
    if left:
        text = f"{key}: {batch} {stream} pictures cannot be shared by {world} processes"
        raise ConfigError(f"{text}; choose a multiple of {world}")
    return share


class StreamSampler(Sampler[list[Key]]):
    """Per step, the keys of this rank's share of every stream's batch.

    Sample number n = step * batch + rank * batch / world + i of a stream is picture permutation_e[n mod N] of epoch
    e = n div N, where N is the number of pictures and permutation_e follows from (seed, stream, e). So every N
    consecutive samples from a multiple of N on show each picture once, batches run on across epochs, and the ranks'
    shares in order are the batch of a single process.

    Args:
        sizes: pictures per stream.
        batch: samples per step and stream, over all ranks together.
        seed: seed of the run.
        start: first step.
        stop: one past the last step.
        rank: this process, 0 .. world - 1.
        world: number of processes.

    Raises:
        ConfigError: when `batch` names other streams than `sizes`, is not positive, or `world` does not divide it.
        DataError: when a stream has no pictures.
    """

    def __init__(
        self,
        sizes: Mapping[Stream, int],
        batch: Mapping[Stream, int],
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        _check(sizes, batch, world)
        self.sizes, self.batch = dict(sizes), {stream: batch[stream] for stream in sizes}
        self.seed, self.steps = seed, range(start, stop)
        self.rank, self.world = rank, world
        self._orders: dict[Stream, tuple[int, list[int]]] = {}

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Key]]:
        """The keys of each step from `start` to `stop`."""
        for step in self.steps:
            yield [key for stream in self.sizes for key in self._share(stream, step)]

    def _share(self, stream: Stream, step: int) -> Iterator[Key]:
        local = self.batch[stream] // self.world
        first = step * self.batch[stream] + self.rank * local
        for draw in range(first, first + local):
            epoch, place = divmod(draw, self.sizes[stream])
            yield stream, self._order(stream, epoch)[place], draw

    def _order(self, stream: Stream, epoch: int) -> list[int]:
        """The permutation of that epoch; the latest one per stream is kept."""
        known = self._orders.get(stream)
        if known is None or known[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "order", stream, epoch))
            known = epoch, torch.randperm(self.sizes[stream], generator=generator).tolist()
            self._orders[stream] = known
        return known[1]


def _check(sizes: Mapping[Stream, int], batch: Mapping[Stream, int], world: int) -> None:
    if set(sizes) != set(batch):
        found = ", ".join(batch) or "none"
        raise ConfigError(f"batch: set it for the streams given ({', '.join(sizes)}); found {found}")
    for stream, size in sizes.items():
        if size == 0:
            raise DataError(f"the {stream} stream has no pictures")
        if batch[stream] < 1:
            raise ConfigError(f"batch.{stream}: must be at least 1 (got {batch[stream]})")
        share_of(stream, batch[stream], world)
