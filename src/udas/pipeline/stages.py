"""What the stages do. Each reads the folders of earlier stages and leaves its result in its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from udas.config import NetworkConfig
from udas.data.batch import Stream
from udas.data.dataset import PictureSet
from udas.data.sampling import seed_of
from udas.errors import ConfigError, WeightsError
from udas.evaluation.evaluate import evaluate
from udas.evaluation.protocols import ProtocolConfig
from udas.methods.base import Method, Task
from udas.names import load_method
from udas.networks.generators import load_translator
from udas.networks.segmenters import Segmenter, build_segmenter
from udas.networks.weights import load_segmenter
from udas.pipeline.config import EvaluateStage, LabelStage, TrainStage, TranslateStage
from udas.pipeline.context import Context
from udas.pipeline.label import label
from udas.pipeline.translate import translate
from udas.training.log import Bar
from udas.training.loop import Training
from udas.training.runtime import Runtime

MODEL = "model.safetensors"


def run_train(context: Context, name: str, stage: TrainStage, folder: Path) -> None:
    """Train, then write the model of the last step."""
    runtime = context.runtime
    method = build_method(context, name, stage)
    validate = _validation(context) if method.makes == "segmenter" else None
    training = Training(
        method, stage.training, context.config.logging, folder, runtime, context.config.seed, validate
    )  # fmt: skip
    training.run(train_streams(context, name, stage), stage.title or name)
    if runtime.main:
        method.save_model(folder / MODEL)


def run_translate(context: Context, name: str, stage: TranslateStage, folder: Path) -> None:
    """Repaint every source picture."""
    runtime, pictures = context.runtime, context.source_pictures
    translator = load_translator(context.folder / stage.model / MODEL)
    with Bar(stage.title or name, len(pictures), unit="pictures", visible=runtime.main) as bar:
        translate(placed(translator, runtime), pictures, folder, runtime, bar)


def run_label(context: Context, name: str, stage: LabelStage, folder: Path) -> None:
    """Label the unlabelled pictures; measure on the validation split how good such labels are."""
    runtime = context.runtime
    segmenter = load_trained(context, stage.model)
    with Bar(stage.title or name, len(context.unlabelled), unit="pictures", visible=runtime.main) as bar:
        label(
            placed(segmenter, runtime),
            context.unlabelled,
            context.taxonomy,
            stage.rule,
            folder,
            runtime.device,
            bar,
            runtime.rank,
            runtime.world,
            context.validation,
        )


def run_evaluate(context: Context, name: str, stage: EvaluateStage, folder: Path) -> None:
    """Score the last checkpoint of a train stage."""
    runtime, pictures = context.runtime, context.validation
    if pictures is None:
        raise ConfigError(f"stages.{name}: the target has no split {context.config.data.val_split!r} to score on")
    segmenter = load_trained(context, stage.model)
    with Bar(f"evaluate {stage.title or name}", len(pictures), unit="pictures", visible=runtime.main) as bar:
        scores = _score(context, segmenter, stage.protocol, folder, bar)
    if runtime.main:
        _print_score(scores, stage.title or name)


def _print_score(scores: Mapping[str, Any], title: str) -> None:
    low, high = scores["interval"]
    print(f"  {title}: mIoU {100 * scores['miou']:.1f} ({100 * low:.1f} to {100 * high:.1f})")


def _score(
    context: Context, model: nn.Module, protocol: ProtocolConfig, folder: Path | None, progress: Bar | None = None
) -> dict[str, Any]:
    runtime = context.runtime
    assert context.validation is not None
    result = evaluate(
        placed(model, runtime),
        context.validation,
        context.taxonomy,
        protocol,
        runtime.device,
        folder,
        context.config.data.val_split,
        progress=progress,
        rank=runtime.rank,
        world=runtime.world,
    )
    return result.summary()


def _validation(context: Context) -> Callable[[nn.Module], dict[str, Any]] | None:
    if context.validation is None:
        return None

    def validate(model: nn.Module) -> dict[str, Any]:
        scores = _score(context, model, context.config.protocol, None)
        return {key: scores[key] for key in ("miou", "pixel_accuracy", "iou")}

    return validate


# ------------------------------------------------------------------------------------------------ building blocks


def build_method(context: Context, name: str, stage: TrainStage) -> Method[Any]:
    """The method of a train stage with its networks, initialised from the run's seed.

    Raises:
        ConfigError: settings that do not fit each other or the label space; names the stage.
        WeightsError: weights that cannot be had or do not fit; names the stage.
    """
    method = load_method(stage.method.name)
    torch.manual_seed(seed_of(context.config.seed, "initial weights"))
    task = Task(
        context.taxonomy, lambda: _segmenter(context, stage), context.streams(name, stage), stage.training.steps
    )  # fmt: skip
    try:
        built: Method[Any] = method(stage.method, task)
    except (ConfigError, WeightsError) as error:
        raise type(error)(f"stages.{name}: {error}") from error
    if context.runtime.compile and method.makes == "segmenter":
        built.model().compile()
    return built


def rehearse(context: Context, names: Iterable[str]) -> None:
    """Build the method of every train stage among `names`, so that mistakes show before the first one starts.

    Networks have no memory here (PyTorch's meta device); pretrained weights are fetched and fitted once per network.

    Raises:
        ConfigError, WeightsError: as `build_method`.
    """
    fitted = set()
    for name in names:
        stage = context.config.stages[name]
        if not isinstance(stage, TrainStage):
            continue
        if stage.start is None and stage.network not in fitted and load_method(stage.method.name).makes == "segmenter":
            fitted.add(stage.network)
            _fit_weights(name, stage.network)
        bare = stage.network.model_copy(update={"weights": None})
        with torch.device("meta"):
            build_method(context, name, stage.model_copy(update={"network": bare, "start": None}))


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


def train_streams(context: Context, name: str, stage: TrainStage) -> dict[Stream, PictureSet]:
    """The pictures of every stream of a train stage."""
    makers: Mapping[Stream, Callable[[], PictureSet]] = {
        Stream.SOURCE: lambda: _source(context, stage),
        Stream.LABELLED: lambda: context.labelled(stage),
        Stream.UNLABELLED: lambda: context.unlabelled,
        Stream.PSEUDO: lambda: _pseudo(context, stage),
    }
    return {stream: makers[stream]() for stream in sorted(context.streams(name, stage))}


def _source(context: Context, stage: TrainStage) -> PictureSet:
    pictures = context.source_pictures
    return pictures if stage.source is None else pictures.with_images(context.folder / stage.source / "images")


def _pseudo(context: Context, stage: TrainStage) -> PictureSet:
    assert stage.pseudo is not None
    folder = context.folder / stage.pseudo
    confidence = folder / "confidence"
    return context.unlabelled.with_labels(folder / "labels", confidence if confidence.exists() else None)


def load_trained(context: Context, stage: str) -> Segmenter:
    """The segmenter that an earlier stage left. Raises `WeightsError` when it is of another label space."""
    return load_segmenter(context.folder / stage / MODEL, taxonomy=context.taxonomy)[0]


def placed(model: nn.Module, runtime: Runtime) -> nn.Module:
    """The model on the run's device, ready for inference in its precision."""
    return Inference(runtime.place(model), runtime).eval()


class Inference(nn.Module):
    """A network as inference uses it: the run's memory format and precision."""

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.model, self.runtime = model, runtime

    def forward(self, image: Tensor) -> Tensor:
        """RGB [B, 3, H, W] in [0, 1] -> whatever the network gives, in float32."""
        with self.runtime.autocast():
            result: Tensor = self.model(image.contiguous(memory_format=self.runtime.memory_format))
        return result.float()

    def levels(self, image: Tensor) -> tuple[Tensor, ...]:
        """All outputs of a segmenter, main first."""
        assert isinstance(self.model, Segmenter)
        with self.runtime.autocast():
            return self.model.levels(image.contiguous(memory_format=self.runtime.memory_format))
