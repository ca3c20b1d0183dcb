"""Time and disk a stage will take, from a few timed steps on random pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from udas.config import Size
from udas.data.batch import Batch, Block, Stream
from udas.data.dataset import PictureSet
from udas.data.files import image_size
from udas.pipeline.build import sketch_method
from udas.pipeline.config import AnyStage, TrainStage, TranslateStage
from udas.pipeline.context import Context
from udas.training.engine import TrainingEngine

TIMED = 2  # steps after one for warm-up


def estimate(context: Context, name: str, stage: AnyStage) -> tuple[float | None, float]:
    """(seconds or None where they depend on a network that does not exist yet, bytes on disk)."""
    if isinstance(stage, TrainStage):
        return _training(context, name, stage)
    pictures = context.source_pictures if isinstance(stage, TranslateStage) else context.unlabelled
    height, width = _size(pictures)
    share = {"translate": 2.0, "label": 0.1}.get(stage.kind, 0.0)  # bytes per pixel of a typical PNG
    return None, len(pictures) * height * width * share


def _training(context: Context, name: str, stage: TrainStage) -> tuple[float, float]:
    method = context.runtime.place(sketch_method(context, name, stage))
    engine = TrainingEngine(method, context.runtime, stage.training.steps)
    batch = _random_batch(context, name, stage).to(context.runtime.device, context.runtime.memory_format)
    for step in range(TIMED + 1):
        if step == 1:
            began = time.perf_counter()
        engine.begin(step)
        with context.runtime.autocast():
            method.step(batch)
        engine.take_losses()  # waits for the device
    seconds = (time.perf_counter() - began) / TIMED * stage.training.steps
    optimisers, _ = engine.state()
    checkpoint = _bytes(method.state_dict()) + _bytes(optimisers)
    return seconds, checkpoint + 2.0 * _bytes(method.model().state_dict())  # the last network and the best one


def _size(pictures: PictureSet) -> Size:
    """Height and width of what the set gives; of its first picture, where pictures keep their own size."""
    return pictures.size or image_size(pictures.pictures[0].image)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _random_batch(context: Context, name: str, stage: TrainStage) -> Batch:
    blocks = {}
    for stream in context.streams(name, stage):
        domain = context.source_pictures if stream == Stream.SOURCE else context.unlabelled
        height, width = stage.training.augment.crop or _size(domain)
        count = stage.training.batch_of(stream)
        label = torch.randint(len(context.taxonomy.classes), (count, height, width))
        block = Block(torch.rand(count, 3, height, width), label, None, tuple(range(count)), ("",) * count)
        blocks[str(stream)] = replace(block, label=None) if stream == Stream.UNLABELLED else block
    return Batch(**blocks)
