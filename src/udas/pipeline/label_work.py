"""Walking over any number of pictures at a steady memory, in several processes, with what is done left out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from udas.data.dataset import PictureSet
from udas.pipeline.label_maps import Labeller

In = TypeVar("In")
Out = TypeVar("Out")


def ahead(function: Callable[[In], Out], items: Iterable[In], depth: int = 4) -> Iterator[Out]:
    """`function` of each item in order, computed in threads at most `depth` items before it is taken."""
    waiting: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(depth) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True)
class Work:
    """One process's share of the labelling in `folder`; `advance` is told how many more pictures are done."""

    labeller: Labeller
    batch: int
    folder: Path
    rank: int
    world: int
    advance: Callable[[int], None]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def walk(
        self, pictures: PictureSet, chosen: Sequence[int], done: Callable[[int], bool]
    ) -> Iterator[tuple[int, Tensor]]:
        """(index, probabilities [C, H, W]) of this process's pictures among `chosen` that are not done.

        Forward passes always hold the same pictures, finished ones included, because the size of a batch can change
        the last bits of a network's output: so resumed work gives the very labels of uninterrupted work.
        """
        mine, size = chosen[self.rank :: self.world], self.batch
        groups = [mine[k : k + size] for k in range(0, len(mine), size)]
        missing = {index for index in mine if not done(index)}
        self.advance(len(mine) - len(missing))
        todo = [group for group in groups if not missing.isdisjoint(group)]
        read = ahead(lambda group: [pictures.image(index) for index in group], todo)
        for group, images in zip(todo, read, strict=True):
            found = self.labeller([pictures.pictures[index].name for index in group], images)
            yield from ((index, maps) for index, maps in zip(group, found, strict=True) if index in missing)
