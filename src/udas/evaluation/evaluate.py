"""Score a network on labelled pictures: every picture once, its labels at their own size, one confusion matrix."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from PIL import Image
from torch import Tensor, nn

from udas.data.dataset import PictureSet
from udas.data.files import resize_label
from udas.errors import DataError, RunError
from udas.evaluation.metrics import Scores, bootstrap, confusion
from udas.evaluation.protocols import Network, ProtocolConfig, probabilities
from udas.storage import write_atomically, write_picture
from udas.taxonomy import Taxonomy

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""

SHOWN = ("input", "truth", "prediction", "confidence")
"""What is written of a picture, as PNG files of these names."""

_THREADS = 4  # decoding releases the interpreter lock
_PIXELS = 2**22  # of one batch: with 19 classes one map of probabilities is 320 MB


@dataclass(frozen=True)
class Sample:
    """A decoded picture: uint8 RGB [3, H, W], and where there is one its label uint8 [h, w] of class ids."""

    index: int
    image: Tensor
    label: Tensor | None = None

    @property
    def key(self) -> tuple[int, ...]:
        """Pictures with equal keys can share a batch."""
        return (*self.image.shape, *(() if self.label is None else self.label.shape))


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation.

    scores: over all pictures together.
    interval: 95 % bootstrap interval of the mean IoU over pictures.
    per_picture: [N, C, C] int64 pixel counts over the full label space, picture by picture.
    shown: names of the pictures that were written.
    """

    scores: Scores
    interval: tuple[float, float]
    per_picture: Tensor
    taxonomy: Taxonomy
    protocol: ProtocolConfig
    domain: str
    split: str
    shown: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """What `evaluation.json` holds: scores as shares in [0, 1], the confusion matrix over the full label space."""
        return {
            "domain": self.domain,
            "split": self.split,
            "protocol": self.protocol.describe(self.taxonomy.classes),
            "settings": self.protocol.model_dump(mode="json"),
            "pictures": len(self.per_picture),
            "miou": self.scores.miou,
            "pixel_accuracy": self.scores.pixel_accuracy,
            "interval": list(self.interval),
            "iou": self.scores.iou,
            "absent": list(self.scores.absent),
            "classes": list(self.taxonomy.classes),
            "colours": [list(colour) for colour in self.taxonomy.colours],
            "confusion": self.per_picture.sum(0).tolist(),
            "shown": list(self.shown),
        }


def evaluate(
    model: Network,
    pictures: PictureSet,
    taxonomy: Taxonomy,
    protocol: ProtocolConfig,
    device: torch.device,
    folder: Path | None = None,
    split: str = "val",
    shown: int = 6,
    batch: int = 8,
    progress: Progress | None = None,
    rank: int = 0,
    world: int = 1,
) -> Evaluation:
    """Score `model` on labelled pictures.

    With `world` > 1 every process scores its share (picture i belongs to rank i % world) and all of them get the whole
    result; torch.distributed must be initialised.

    Args:
        model: RGB [B, 3, H, W] in [0, 1] -> logits [B, C, H, W] on `device`; evaluation mode is set here and undone.
        pictures: the labelled pictures.
        taxonomy: the label space, C classes.
        protocol: how the network is asked, what it is compared with and which classes are scored.
        device: where the network is.
        folder: gets `evaluation.json` and `pictures/<k>/{input,truth,prediction,confidence}.png`; None writes nothing.
        split: name of the split, for the record.
        shown: how many of the fixed pictures are written.
        batch: pictures of equal size that go through the network together (fewer when they are large).
        progress: called after every batch of this process.
        rank: number of this process.
        world: number of processes.

    Raises:
        DataError: pictures without labels, unreadable files, or no labelled pixel at all.
        ConfigError: when the protocol scores classes that the label space does not have.
        RunError: when the network's outputs do not fit the label space, or results cannot be written.
    """
    if not pictures.labels:
        raise DataError(f"{pictures.domain}: none of the {len(pictures)} pictures has labels to compare with")
    scored = protocol.scored(taxonomy.classes)
    job = _Job(pictures, taxonomy, protocol, device, folder, tuple(pictures.fixed(shown)) if folder else ())
    counts = _count(job, model, range(rank, len(pictures), world), batch, progress)
    if world > 1:
        torch.distributed.all_reduce(counts)
    counts = counts.cpu()
    scores = Scores.from_confusion(counts.sum(0), taxonomy.classes, scored, protocol.reading)
    interval = bootstrap(counts, [taxonomy.index(name) for name in scored], protocol.reading)
    names = tuple(pictures.pictures[index].name for index in job.shown)
    result = Evaluation(scores, interval, counts, taxonomy, protocol, pictures.domain, split, names)
    if folder and rank == 0:
        write_atomically(folder / "evaluation.json", json.dumps(result.summary(), indent=1).encode())
    return result


@dataclass(frozen=True)
class _Job:
    """What is scored and how; `shown` are the indices of the pictures that are written into `folder`."""

    pictures: PictureSet
    taxonomy: Taxonomy
    protocol: ProtocolConfig
    device: torch.device
    folder: Path | None
    shown: tuple[int, ...]

    def load(self, index: int) -> Sample:
        """A picture with its label at the size it is compared at."""
        label = resize_label(self.pictures.label(index), self.protocol.compare)
        return Sample(index, self.pictures.image(index), label)


def _count(job: _Job, model: Network, indices: range, batch: int, progress: Progress | None) -> Tensor:
    """[N, C, C] pixel counts on the device; pictures that are not among `indices` have zeros."""
    classes = len(job.taxonomy.classes)
    counts = torch.zeros(len(job.pictures), classes, classes, dtype=torch.int64, device=job.device)
    done = 0
    with evaluation_mode(model), torch.no_grad():
        for samples in batches(job.load, indices, batch, job.protocol):
            label = torch.stack([_label(sample) for sample in samples]).to(job.device, non_blocking=True)
            confidence, prediction = _chosen(job, model, samples, (label.shape[-2], label.shape[-1]))
            counts[[sample.index for sample in samples]] = confusion(prediction, label, classes)
            for sample, *maps in zip(samples, prediction, confidence, strict=True):
                _show(job, sample, *maps)
            done += len(samples)
            if progress:
                progress(done, len(indices))
    return counts


def _label(sample: Sample) -> Tensor:
    assert sample.label is not None
    return sample.label


def _chosen(job: _Job, model: Network, samples: Sequence[Sample], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Highest probability and its class, [B, *size] each."""
    classes = job.taxonomy.classes
    found = probabilities(model, to_input(samples, job.device), job.protocol, size, job.protocol.excluded(classes))
    if found.shape[1] != len(classes):
        raise RunError(
            f"the network has {found.shape[1]} outputs, the label space {len(classes)} classes: "
            "evaluate it in the label space it was trained in"
        )
    confidence, prediction = found.max(1)
    return confidence, prediction


def _show(job: _Job, sample: Sample, prediction: Tensor, confidence: Tensor) -> None:
    if job.folder is None or sample.index not in job.shown:
        return
    folder, colourise = job.folder / "pictures" / str(job.shown.index(sample.index)), job.taxonomy.colourise
    shown = (
        sample.image.permute(1, 2, 0).contiguous().numpy(),
        colourise(_label(sample).numpy()),
        colourise(prediction.byte().cpu().numpy()),
        (confidence * 255).round().byte().cpu().numpy(),
    )
    for name, picture in zip(SHOWN, shown, strict=True):
        write_picture(folder / f"{name}.png", Image.fromarray(picture))


# ------------------------------------------------------------------------------- asking a network, picture by picture


@contextmanager
def evaluation_mode(model: Network) -> Iterator[None]:
    """Evaluation mode inside; afterwards every part is in the mode it had (frozen normalisation stays frozen)."""
    modes = {part: part.training for part in model.modules()} if isinstance(model, nn.Module) else {}
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def to_input(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """The pictures of one batch as networks see them: [B, 3, H, W] float32 in [0, 1]."""
    return torch.stack([sample.image for sample in samples]).to(device, non_blocking=True).float() / 255


def batches(
    load: Callable[[int], Sample | None], indices: Iterable[int], batch: int, protocol: ProtocolConfig
) -> Iterator[list[Sample]]:
    """Pictures of equal size together, decoded by a few threads ahead of the network; memory stays bounded.

    Args:
        load: decodes picture i; what is None is left out.
        indices: the pictures to load.
        batch: most pictures in a batch; large pictures come in smaller batches.
        protocol: its input size counts for what is large.
    """
    floor = 0 if protocol.input is None else protocol.input[0] * protocol.input[1]
    waiting: dict[tuple[int, ...], list[Sample]] = {}
    for sample in _prefetch(load, indices, batch):
        group = waiting.setdefault(sample.key, [])
        group.append(sample)
        if len(group) >= min(batch, _PIXELS // max(floor, _area(sample))):
            yield waiting.pop(sample.key)
        elif sum(map(len, waiting.values())) >= 4 * batch:
            yield waiting.pop(max(waiting, key=lambda key: len(waiting[key])))
    yield from waiting.values()


def _area(sample: Sample) -> int:
    return max(sample.image.shape[-2] * sample.image.shape[-1], 0 if sample.label is None else sample.label.numel())


def _prefetch(load: Callable[[int], Sample | None], indices: Iterable[int], ahead: int) -> Iterator[Sample]:
    rest = iter(indices)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="decode") as pool:
        queue: deque[Future[Sample | None]] = deque(pool.submit(load, index) for index in islice(rest, ahead))
        try:
            while queue:
                sample = queue.popleft().result()
                queue.extend(pool.submit(load, index) for index in islice(rest, 1))
                if sample is not None:
                    yield sample
        finally:
            for future in queue:
                future.cancel()
