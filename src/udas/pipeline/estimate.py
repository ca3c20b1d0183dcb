"""Time and disk a stage will take, from a few timed steps, or looks, of untrained networks on random pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from udas.config import Size
from udas.data.batch import Batch, Block, Stream
from udas.data.dataset import PictureSet
from udas.data.files import image_size
from udas.data.fourier import swap_amplitude
from udas.evaluation.protocols import ProtocolConfig, probabilities
from udas.pipeline.build import sketch_method, sketch_model
from udas.pipeline.config import (
    AnyStage,
    EvaluateStage,
    LabelStage,
    PrototypesStage,
    RankStage,
    TrainStage,
    TranslateStage,
)
from udas.pipeline.context import Context
from udas.pipeline.label import LabelConfig
from udas.pipeline.label_maps import Labeller
from udas.pipeline.models import placed
from udas.training.engine import TrainingEngine

TIMED = 2  # steps or looks after one for warm-up

Look = Callable[[Tensor], Tensor]
"""What a stage does with one picture, RGB uint8 [3, H, W]."""

Looking = LabelStage | RankStage | PrototypesStage | TranslateStage


def estimate(context: Context, name: str, stage: AnyStage) -> tuple[float, float]:
    """(seconds, bytes on disk). Seconds are of networks and views, without reading and writing files."""
    if isinstance(stage, TrainStage):
        return _training(context, name, stage)
    if isinstance(stage, EvaluateStage):
        model = placed(sketch_model(context, stage.model, stage.average), context.runtime)
        return _scoring(context, model, stage.protocol), 0.0
    pictures = context.source_pictures if isinstance(stage, TranslateStage) else context.unlabelled
    height, width = _size(pictures)
    share = {"translate": 2.0, "label": 0.1}.get(stage.kind, 0.0)  # bytes per pixel of a typical PNG
    seconds = _per_picture(_look(context, stage), pictures) * _looks(context, stage, pictures)
    return seconds, len(pictures) * height * width * share


# ------------------------------------------------------------------------------------------------------- training


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
    if method.makes == "segmenter":
        model = placed(method.model(), context.runtime)
        times = _validations(stage.training.steps, context.config.logging.evaluate_every)
        seconds += times * _scoring(context, model, context.config.protocol)
    checkpoint = _bytes(method.state_dict()) + _bytes(engine.state())
    return seconds, checkpoint + 2.0 * _bytes(method.model().state_dict())  # the last network and the best one


def _validations(steps: int, every: int) -> int:
    """How often a training is validated on the way: every so many steps, and after the last one; 0 = never."""
    return -(-steps // every) if every else 0


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


# ---------------------------------------------------------------------------------- looking at pictures, one by one


def _scoring(context: Context, model: nn.Module, protocol: ProtocolConfig) -> float:
    """Seconds it takes to look at all validation pictures."""
    if context.validation is None:
        return 0.0
    look = _by_protocol(context, model, protocol)
    return _per_picture(look, context.validation) * len(context.validation)


def _by_protocol(context: Context, model: nn.Module, protocol: ProtocolConfig) -> Look:
    return lambda image: probabilities(model, _as_input(context, image), protocol)


def _look(context: Context, stage: Looking) -> Look:
    if isinstance(stage, TranslateStage):
        return _repaint(context, stage)
    average = stage.average if isinstance(stage, LabelStage) else "logits"
    model = placed(sketch_model(context, stage.model, average), context.runtime)
    rule = stage.rule if isinstance(stage, LabelStage) else LabelConfig(views=1)
    labeller = Labeller(
        model, context.taxonomy, rule.views, rule.temperature, rule.seed, context.runtime.device, rule.protocol
    )
    return lambda image: labeller([""], [image])[0]


def _repaint(context: Context, stage: TranslateStage) -> Look:
    if stage.fourier is not None:
        beta = stage.fourier.beta
        return lambda image: swap_amplitude(_as_input(context, image), _as_input(context, image), beta)
    assert stage.model is not None
    style = context.config.stages[stage.model]
    assert isinstance(style, TrainStage)
    network = placed(sketch_method(context, stage.model, style).model(), context.runtime)
    return lambda image: network(_as_input(context, image))


def _looks(context: Context, stage: Looking, pictures: PictureSet) -> float:
    """How many pictures the stage looks at, those that it only measures itself on included."""
    if not isinstance(stage, LabelStage):
        return len(pictures)
    sample = min(stage.rule.sample, len(pictures)) if stage.rule.rule == "class" else 0
    ranking = None if stage.easy is None else context.config.stages[stage.easy]
    share = ranking.easy if isinstance(ranking, RankStage) else 1.0
    return share * (len(pictures) + sample) + (0 if context.probe is None else len(context.probe))


def _as_input(context: Context, image: Tensor) -> Tensor:
    return image[None].to(context.runtime.device).float() / 255


@torch.inference_mode()
def _per_picture(look: Look, pictures: PictureSet) -> float:
    image = torch.randint(256, (3, *_size(pictures)), dtype=torch.uint8)
    for done in range(TIMED + 1):
        if done == 1:
            began = time.perf_counter()
        look(image).sum().item()  # waits for the device
    return (time.perf_counter() - began) / TIMED


def _size(pictures: PictureSet) -> Size:
    """Height and width of what the set gives; of its first picture, where pictures keep their own size."""
    return pictures.size or image_size(pictures.pictures[0].image)
