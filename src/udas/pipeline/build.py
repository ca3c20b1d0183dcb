"""The method of a train stage with its networks; and a rehearsal of it, without weights, before a run begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from udas.config import NetworkConfig, Size
from udas.data.batch import Stream
from udas.data.sampling import seed_of, share_of
from udas.errors import ConfigError, WeightsError
from udas.methods.base import Method, Task
from udas.methods.frozen import Frozen
from udas.methods.prototypes import Prototypes
from udas.names import load_method
from udas.networks.ensemble import Averaged, Ensemble, as_one
from udas.networks.segmenters import Segmenter, build_segmenter
from udas.networks.weights import load_segmenter
from udas.pipeline.config import AnyStage, TrainStage, several
from udas.pipeline.context import Context
from udas.pipeline.models import MODEL, load_averaged
from udas.pipeline.prototypes import load_prototypes


def build_method(context: Context, name: str, stage: TrainStage) -> Method[Any]:
    """The method of a train stage with its networks, initialised from the run's seed.

    Raises:
        ConfigError: settings that do not fit each other or the label space; names the stage.
        WeightsError: weights that cannot be had or do not fit; names the stage.
    """
    teacher, prototypes = stage.teacher, stage.prototypes
    task = Task(
        context.taxonomy,
        lambda: _segmenter(context, stage),
        context.streams(name, stage),
        stage.training.steps,
        None if teacher is None else lambda: load_averaged(context, teacher, "probabilities"),
        None if prototypes is None else load_prototypes(context.folder / prototypes),
    )
    return _build(context, name, stage, task)


def sketch_method(context: Context, name: str, stage: TrainStage) -> Method[Any]:
    """The method as `build_method` gives it, but with random weights: no earlier stage is needed, nothing is fetched.

    Raises:
        ConfigError: as `build_method`.
    """
    teacher, prototypes = stage.teacher, stage.prototypes
    task = Task(
        context.taxonomy,
        lambda: _random(context, stage.network),
        context.streams(name, stage),
        stage.training.steps,
        None if teacher is None else lambda: sketch_model(context, teacher, "probabilities"),
        None if prototypes is None else _random_prototypes(context, prototypes),
    )
    return _build(context, name, stage, task)


def sketch_model(context: Context, names: str | list[str], average: Averaged) -> Segmenter | Ensemble:
    """The segmenter of a stage, or of several as one, as `load_averaged` gives it, but with random weights."""
    return as_one([_random(context, _network_of(context, name)) for name in several(names)], average)


def rehearse(context: Context, names: Iterable[str]) -> None:
    """Build the method of every train stage among `names`, so that mistakes show before the first one starts.

    Networks have no memory here (PyTorch's meta device); pretrained weights are fetched and fitted once per network.

    Raises:
        ConfigError, WeightsError: as `build_method`; also for names of classes that the label space does not have, for
            scores on a split that is not there or is trained on, and for pictures per step that the processes cannot
            share, or that are fewer or smaller than a method can work with, or of several sizes where it needs one;
            for a teacher or prototypes that a method does not use.
    """
    fitted, names = set(), list(names)
    _check_scored(context, names)
    for name in names:
        stage = context.config.stages[name]
        _check_classes(context, name, stage)
        if not isinstance(stage, TrainStage):
            continue
        if stage.start is None and stage.network not in fitted and load_method(stage.method.name).makes == "segmenter":
            fitted.add(stage.network)
            _fit_weights(name, stage.network)
        with torch.device("meta"):
            method = sketch_method(context, name, stage)
        _check_used(name, stage, method)
        _check_batches(context, name, stage, method)
        _check_sizes(context, name, stage, method)


def _build(context: Context, name: str, stage: TrainStage, task: Task) -> Method[Any]:
    method = load_method(stage.method.name)
    torch.manual_seed(seed_of(context.config.seed, "initial weights"))
    try:
        built: Method[Any] = method(stage.method, task)
    except (ConfigError, WeightsError) as error:
        raise type(error)(f"stages.{name}: {error}") from error
    if context.runtime.compile:
        _compile(built)
    return built


def _compile(method: Method[Any]) -> None:
    """Compile the encoders, at their first pictures: whatever a network is asked for, its encoder is called."""
    for module in method.modules():
        if isinstance(module, Segmenter):
            module.encoder.compile()


def _check_classes(context: Context, name: str, stage: AnyStage) -> None:
    given = {"rank": "rare", "prototypes": "classes"}.get(stage.kind)
    for label in getattr(stage, given) or [] if given else []:
        context.taxonomy.index(label, f"stages.{name}.{given}")


def _check_scored(context: Context, names: list[str]) -> None:
    """Networks are scored on a split that is there, and of which no picture is trained on."""
    name = next((name for name in names if context.config.stages[name].kind == "evaluate"), None)
    if name is None:
        return
    data, target = context.config.data, context.target
    if data.val_split not in data.target.splits:
        raise ConfigError(
            f"stages.{name}: the target has no split {data.val_split!r} to score on; name the one it has as "
            f"data.val_split ({', '.join(sorted(data.target.splits))}), or score nothing: `evaluate: false`"
        )
    scored, trained = ({picture.name for picture in target.pictures(s)} for s in (data.val_split, data.train_split))
    if both := sorted(scored & trained):
        raise ConfigError(
            f"stages.{name}: {len(both)} pictures of the split {data.val_split!r}, whose labels are all read to score "
            f"networks, are in {data.train_split!r}, too, such as {both[0]}"
        )


def _check_used(name: str, stage: TrainStage, method: Method[Any]) -> None:
    """A stage that is named is one that the method learns from."""
    for role, part in (("teacher", Frozen), ("prototypes", Prototypes)):
        if getattr(stage, role) is not None and not any(isinstance(module, part) for module in method.modules()):
            raise ConfigError(f"stages.{name}.{role}: method {stage.method.name}, as it is set, learns from none")


def _check_batches(context: Context, name: str, stage: TrainStage, method: Method[Any]) -> None:
    key, smallest = f"stages.{name}.training.batch", method.smallest_batch()
    for stream in sorted(context.streams(name, stage)):
        given = share_of(stream, stage.training.batch_of(stream), context.runtime.world, key)
        least = smallest.get(stream, 0)
        if given < least:
            raise ConfigError(
                f"{key}: {stage.method.name} mixes {stream} pictures with each other and needs {least} per process "
                f"and step, not {given}"
            )


def _check_sizes(context: Context, name: str, stage: TrainStage, method: Method[Any]) -> None:
    """Of pictures whose size the configuration gives; those that keep their own are met when they are read."""
    known = {stream: size for stream in sorted(context.streams(name, stage)) if (size := _size(context, stage, stream))}
    for stream, (height, width) in known.items():
        least = method.smallest_picture()
        if min(height, width) < least:
            raise ConfigError(
                f"stages.{name}: {stage.method.name} needs pictures with sides of at least {least}, but the {stream} "
                f"ones are {height} x {width}"
            )
    mixed = {stream: size for stream, size in known.items() if stream in method.same_size()}
    if len(set(mixed.values())) > 1:
        told = ", ".join(f"{stream} {height} x {width}" for stream, (height, width) in mixed.items())
        raise ConfigError(
            f"stages.{name}: {stage.method.name} needs pictures of one size ({told}): set training.augment.crop"
        )


def _size(context: Context, stage: TrainStage, stream: Stream) -> Size | None:
    """Height and width of a stream's pictures, where the configuration gives them."""
    data = context.config.data
    domain = data.source if stream == Stream.SOURCE else data.target
    return stage.training.augment.crop or (domain.size if domain else None)


def _fit_weights(name: str, network: NetworkConfig) -> None:
    try:
        build_segmenter(network, classes=1)
    except (ConfigError, WeightsError) as error:
        raise type(error)(f"stages.{name}: {error}") from error


def _segmenter(context: Context, stage: TrainStage) -> Segmenter:
    if stage.start is None:
        return build_segmenter(stage.network, len(context.taxonomy.classes))
    network = stage.network.model_copy(update={"weights": None})
    return load_segmenter(context.folder / stage.start / MODEL, network, context.taxonomy)[0]


def _random(context: Context, network: NetworkConfig) -> Segmenter:
    return build_segmenter(network, len(context.taxonomy.classes), pretrained=False)


def _network_of(context: Context, name: str) -> NetworkConfig:
    stage = context.config.stages[name]
    assert isinstance(stage, TrainStage)
    return stage.network


def _random_prototypes(context: Context, name: str) -> Tensor:
    stage = context.config.stages[name]
    assert stage.kind == "prototypes"
    with torch.device("meta"):
        channels = _random(context, _network_of(context, stage.model)).decoder.channels
    return torch.ones(len(context.taxonomy.classes), channels)
