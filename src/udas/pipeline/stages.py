"""What the stages do. Each reads the folders of earlier stages and leaves its result in its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from udas.data.batch import Stream
from udas.data.dataset import PictureSet
from udas.evaluation.evaluate import evaluate
from udas.evaluation.protocols import ProtocolConfig
from udas.networks.generators import load_translator
from udas.networks.segmenters import Segmenter
from udas.pipeline.build import build_method
from udas.pipeline.config import EvaluateStage, LabelStage, PrototypesStage, RankStage, TrainStage, TranslateStage
from udas.pipeline.context import Context
from udas.pipeline.label import label
from udas.pipeline.label_files import write_json
from udas.pipeline.models import MODEL, load_averaged, load_trained, placed, reweighted
from udas.pipeline.prototypes import collect_prototypes
from udas.pipeline.rank import rank_pictures, restricted
from udas.pipeline.translate import FourierPainter, Painter, translate
from udas.storage import write_atomically
from udas.training.log import Bar
from udas.training.loop import Training


def run_train(context: Context, name: str, stage: TrainStage, folder: Path) -> None:
    """Train, then write the model of the last step."""
    runtime = context.runtime
    method = build_method(context, name, stage)
    validate = _validation(context) if method.makes == "segmenter" else None
    training = Training(
        method, stage.training, context.config.logging, folder, runtime, context.config.seed, validate
    )  # fmt: skip
    streams = train_streams(context, name, stage)
    if runtime.main:
        _note_pictures(streams, folder)
    training.run(streams, stage.title or name)
    if runtime.main:
        method.save_model(folder / MODEL)


def _note_pictures(streams: Mapping[Stream, PictureSet], folder: Path) -> None:
    """How many pictures each stream has, and which were labelled, as a list that `labelled` can name again."""
    counts = {str(stream): len(pictures) for stream, pictures in streams.items()}
    if Stream.LABELLED in streams:
        labelled = [picture.name for picture in streams[Stream.LABELLED].pictures]
        write_atomically(folder / "labelled.txt", "".join(f"{name}\n" for name in labelled).encode())
        if Stream.UNLABELLED in streams:
            shared = {picture.name for picture in streams[Stream.UNLABELLED].pictures}.intersection(labelled)
            counts["labelled, unlabelled too"] = len(shared)
    write_json(folder / "streams.json", counts)


def run_translate(context: Context, name: str, stage: TranslateStage, folder: Path) -> None:
    """Repaint every source picture."""
    runtime, pictures = context.runtime, context.source_pictures
    painter = _painter(context, stage)
    with Bar(stage.title or name, len(pictures), unit="pictures", visible=runtime.main) as bar:
        translate(painter, pictures, folder, runtime, bar)


def _painter(context: Context, stage: TranslateStage) -> Painter:
    if stage.fourier is not None:
        return FourierPainter(context.unlabelled, stage.fourier.beta, context.config.seed)
    assert stage.model is not None
    network = placed(load_translator(context.folder / stage.model / MODEL), context.runtime)
    return lambda _, image: network(image)


def run_label(context: Context, name: str, stage: LabelStage, folder: Path) -> None:
    """Label the unlabelled pictures; measure on the validation split how good such labels are."""
    runtime, pictures = context.runtime, context.unlabelled
    if stage.easy is not None:
        pictures = restricted(pictures, context.folder / stage.easy, "easy")
    model: nn.Module = load_averaged(context, stage.model, stage.average)
    if stage.prototypes is not None:
        assert isinstance(model, Segmenter)
        model = reweighted(context, model, stage.prototypes)
    with Bar(stage.title or name, len(pictures), unit="pictures", visible=runtime.main) as bar:
        label(
            placed(model, runtime),
            pictures,
            context.taxonomy,
            stage.rule,
            folder,
            runtime.device,
            bar,
            runtime.rank,
            runtime.world,
            context.probe,
        )


def run_rank(context: Context, name: str, stage: RankStage, folder: Path) -> None:
    """Split the unlabelled pictures into easy and hard ones."""
    runtime, pictures = context.runtime, context.unlabelled
    model = placed(load_trained(context, stage.model), runtime)
    with Bar(stage.title or name, len(pictures), unit="pictures", visible=runtime.main) as bar:
        rank_pictures(
            model,
            pictures,
            context.taxonomy,
            stage.easy,
            stage.rare or (),
            folder,
            runtime.device,
            bar,
            runtime.rank,
            runtime.world,
        )


def run_prototypes(context: Context, name: str, stage: PrototypesStage, folder: Path) -> None:
    """Collect the mean feature of every class on the unlabelled pictures."""
    runtime, pictures = context.runtime, context.unlabelled
    model = placed(load_trained(context, stage.model), runtime)
    with Bar(stage.title or name, len(pictures), unit="pictures", visible=runtime.main) as bar:
        collect_prototypes(
            model, pictures, context.taxonomy, stage, folder, runtime.device, bar, runtime.rank, runtime.world
        )


def run_evaluate(context: Context, name: str, stage: EvaluateStage, folder: Path) -> None:
    """Score the last checkpoint of a train stage, or those of several as one."""
    runtime, pictures = context.runtime, context.validation
    assert pictures is not None  # as rehearsed
    model = load_averaged(context, stage.model, stage.average)
    with Bar(f"evaluate {stage.title or name}", len(pictures), unit="pictures", visible=runtime.main) as bar:
        scores = _score(context, model, stage.protocol, folder, bar)
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


def train_streams(context: Context, name: str, stage: TrainStage) -> dict[Stream, PictureSet]:
    """The pictures of every stream of a train stage."""
    makers: Mapping[Stream, Callable[[], PictureSet]] = {
        Stream.SOURCE: lambda: _source(context, stage),
        Stream.LABELLED: lambda: context.labelled(stage),
        Stream.UNLABELLED: lambda: _unlabelled(context, stage),
        Stream.PSEUDO: lambda: _pseudo(context, name, stage),
    }
    return {stream: makers[stream]() for stream in sorted(context.streams(name, stage))}


def _source(context: Context, stage: TrainStage) -> PictureSet:
    pictures = context.source_pictures
    return pictures if stage.source is None else pictures.with_images(context.folder / stage.source / "images")


def _unlabelled(context: Context, stage: TrainStage) -> PictureSet:
    pictures = context.unlabelled
    return pictures if stage.hard is None else restricted(pictures, context.folder / stage.hard, "hard")


def _pseudo(context: Context, name: str, stage: TrainStage) -> PictureSet:
    assert stage.pseudo is not None
    folder = context.folder / stage.pseudo
    confidence = folder / "confidence"
    pictures = context.unlabelled.with_labels(folder / "labels", confidence if confidence.exists() else None)
    return context.with_real_labels(name, stage, pictures)
