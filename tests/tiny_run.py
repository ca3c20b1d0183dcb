"""A world of two tiny domains, and trainings and runs in it that take about a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from udas.config import AugmentConfig, NetworkConfig, OptimiserConfig
from udas.data.batch import Stream
from udas.data.dataset import Domain, PictureSet, load_domain
from udas.methods.base import Method, Task
from udas.names import load_method
from udas.networks.segmenters import Segmenter, build_segmenter
from udas.pipeline.config import RunConfig, load_run
from udas.taxonomy import Taxonomy, load_taxonomy
from udas.training.loop import LoggingConfig, Training, TrainingConfig
from udas.training.runtime import Runtime

SIDE = 64
NETWORK = {"name": "fcn", "encoder": "test_resnet", "weights": None}
CPU = Runtime(torch.device("cpu"), "fp32")
QUIET = Console(quiet=True)
PICTURES = {"game": {"train": 6}, "road": {"train": 6, "val": 2}}
GRANTED = 2  # labelled pictures of the road

METHODS: dict[str, dict[str, Any]] = {
    "supervised": {"average": 0.9},
    "cyclegan": {"generator": {"width": 4, "blocks": 1}, "critic_width": 4, "pool": 3, "semantic": 1},
    "udas": {"average": 0.9},
    "cycada": {"critic_width": 8, "average": 0.9},
    "proda": {"minimum": 1, "decay": 0.9, "momentum": 0.5},
    "gct": {"detector_width": 8, "detector_stages": 2},
    "cutmixseg": {"threshold": 0.1},
    "fixmatch": {"threshold": 0.1},
    "unimatch": {"threshold": 0.1},
    "cct": {"foreground": ["person", "vehicle"]},
}
"""What makes a method small, or shows more of it; methods that are not named here are taken as they are."""

PER_PROCESS: dict[str, dict[str, Any]] = {
    "cyclegan": {"pool": 0},
    "cycada": {"gate": None, "dropout": 0},
    "mrnet": {"rare_weight": 1, "hard_share": 1},
    "rectified": {"rare_weight": 1},
    "proda": {"strong": False, "decay": 1},
    "distil": {"strong": False},
    "gct": {"batch_share": 0},
    "pseudoseg": {"calibration": "picture", "batch_norm": False, "cutout": 0},
    "cutmixseg": {"mask": "cutout"},
    "fixmatch": {"cutmix": 0},
    "unimatch": {"cutmix": 0},
    "cct": {"decoders": {"noise": 0, "adversarial": 0}},
}
"""What switches off a method's memory of the pictures that one process saw, where processes are compared."""

TWO_OUTPUTS = {"name": "deeplabv2_multi", "output_stride": 32}
NETWORKS: dict[str, dict[str, Any]] = {"mrnet": TWO_OUTPUTS, "rectified": TWO_OUTPUTS}
"""What differs from `NETWORK` for a method that needs another network."""

LINKS: dict[str, dict[str, str]] = {
    "cyclegan": {"teacher": "teacher"},
    "proda": {"start": "teacher", "teacher": "teacher", "prototypes": "prototypes"},
    "distil": {"teacher": "teacher"},
    "dldm": {"teacher": "teacher"},
}
"""Earlier stages, in a run of the method, that it cannot do without."""

STREAMS = dict.fromkeys(("adaptsegnet", "minent", "advent"), frozenset(Stream) - {Stream.PSEUDO})
"""What a method is given that cannot take all its streams at once."""


# --------------------------------------------------------------------------------------------------------- pictures


def make_world(folder: Path) -> Path:
    """Both domains below `folder`, and pseudo-labels with confidences of the road."""
    random = np.random.default_rng(0)
    for domain, splits in PICTURES.items():
        for split, count in splits.items():
            for number in range(count):
                image, label = _scene(random, 60 if domain == "road" else 0)
                _save(folder / domain / "images" / split / f"{number}.png", image)
                _save(folder / domain / "labels" / split / f"{number}.png", label)
    for number in range(PICTURES["road"]["train"]):
        label = np.full((SIDE, SIDE), number % 3, np.uint8)
        _save(folder / "pseudo/labels/images/train" / f"{number}.png", label)
        _save(folder / "pseudo/confidence/images/train" / f"{number}.png", np.full_like(label, 200))
    return folder


def _scene(random: np.random.Generator, haze: int) -> tuple[np.ndarray, np.ndarray]:
    """Sky, a street and a vehicle; every pixel has a class, for a mean over pixels to be one over pictures."""
    image, label = Image.new("RGB", (SIDE, SIDE), (90, 150, 220)), Image.new("L", (SIDE, SIDE), 1)
    horizon, left = (int(value) for value in random.integers(20, 40, 2))
    for shape, colour, number in (
        ((0, horizon, SIDE, SIDE), (80, 80, 80), 7),
        ((left, horizon - 4, left + 16, horizon + 12), (200, 30, 40), 9),
    ):
        ImageDraw.Draw(image).rectangle(shape, fill=colour)
        ImageDraw.Draw(label).rectangle(shape, fill=number)
    noisy = np.array(image).astype(int) + random.integers(0, 30, (SIDE, SIDE, 3)) + haze
    return noisy.clip(0, 255).astype(np.uint8), np.array(label)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def described(world: Path, domain: str) -> dict[str, Any]:
    return {
        "name": domain,
        "root": str(world / domain),
        "images": "images/{split}/*.png",
        "labels": "labels/{split}/{stem}.png",
        "splits": {split: split for split in PICTURES[domain]},
        "labelled": {"count": GRANTED, "seed": 0} if domain == "road" else "all",
        "taxonomy": "street11",
        "map": {"road": 7, "sky": 1, "vehicle": 9},
        "size": [SIDE, SIDE],
    }


def street() -> Taxonomy:
    return load_taxonomy("street11")


def streams(world: Path) -> dict[Stream, PictureSet]:
    """The pictures of every stream there is."""
    game, road = (Domain(load_domain(described(world, name)), street()) for name in PICTURES)
    pseudo = world / "pseudo"
    return {
        Stream.SOURCE: game.labelled("train", "all"),
        Stream.LABELLED: road.labelled("train"),
        Stream.UNLABELLED: road.unlabelled("train"),
        Stream.PSEUDO: road.unlabelled("train").with_labels(pseudo / "labels", pseudo / "confidence"),
    }


# ---------------------------------------------------------------------------------------------------------- methods


def settings(name: str) -> dict[str, Any]:
    """The configuration of a method."""
    return {"name": name, **METHODS.get(name, {})}


def taken(name: str) -> frozenset[Stream]:
    """The streams a method is given."""
    kind = load_method(name)
    return STREAMS.get(name, kind.needs | kind.optional)


def optimisers(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A change of settings that gives every optimiser of a method the same `config`."""
    fields = load_method(name).settings.model_fields
    return {key: dict(config) for key, field in fields.items() if isinstance(field.default, OptimiserConfig)}


def build(
    name: str,
    steps: int,
    segmenter: Callable[[], Segmenter],
    changes: Mapping[str, Any],
    chosen: frozenset[Stream] | None = None,
) -> Method[Any]:
    """The method with the streams it takes, or `chosen` ones, a teacher and prototypes."""
    kind = load_method(name)
    size = len(street().classes), segmenter().decoder.channels
    prototypes = torch.randn(size, generator=torch.Generator().manual_seed(0))
    task = Task(street(), segmenter, chosen or taken(name), steps, segmenter, prototypes)
    built: Method[Any] = kind(kind.settings.model_validate(settings(name) | dict(changes)), task)
    return built


def tiny_segmenter(**changes: Any) -> Segmenter:
    return build_segmenter(NetworkConfig.model_validate(NETWORK | changes), len(street().classes))


def per_picture(network: nn.Module) -> nn.Module:
    """The network without what looks at other pictures of the batch or draws per process: batch norm, dropout."""
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(network, name, nn.GroupNorm(1, child.num_features))
        elif isinstance(child, nn.modules.dropout._DropoutNd):
            setattr(network, name, nn.Identity())
        else:
            per_picture(child)
    return network


def training(
    folder: Path,
    name: str,
    steps: int,
    runtime: Runtime = CPU,
    segmenter: Callable[..., Segmenter] = tiny_segmenter,
    changes: Mapping[str, Any] | None = None,
    seed: int = 0,
    chosen: frozenset[Stream] | None = None,
    **logging: int,
) -> Training:
    """A training of a method in `folder`, with `changes` of its settings; `seed` is that of the initial weights.

    `chosen` streams, or all that the method takes.
    """
    torch.manual_seed(seed)
    config = TrainingConfig(steps=steps, batch=2, augment=AugmentConfig(crop=(32, 32)))
    method = build(name, steps, partial(segmenter, **NETWORKS.get(name, {})), changes or {}, chosen)
    return Training(method, config, LoggingConfig.model_validate({"every": 1, **logging}), folder, runtime, seed=0)


def given(world: Path, method: Method[Any]) -> dict[Stream, PictureSet]:
    """The streams of the method."""
    return {stream: pictures for stream, pictures in streams(world).items() if stream in method.task.streams}


# ------------------------------------------------------------------------------------------------------------- runs


def raw_run(world: Path, stages: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A run file's content."""
    return {
        "name": "tiny",
        "taxonomy": "street11",
        "data": {"source": described(world, "game"), "target": described(world, "road")},
        "network": NETWORK,
        "training": {"steps": 2, "batch": 2},
        "logging": {"every": 1, "checkpoint_every": 2},
        "runtime": {"device": "cpu", "precision": "fp32", "workers": 0},
        "stages": dict(stages),
    } | changes


def run_file(path: Path, world: Path, stages: Mapping[str, Any], **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(raw_run(world, stages, **changes), sort_keys=False), encoding="utf-8")
    return path


def loaded(path: Path, *overrides: str) -> RunConfig:
    return load_run(str(path), list(overrides))


# -------------------------------------------------------------------------------------------------------- comparing


def same_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same names with the same bits."""
    return first.keys() == second.keys() and all(_bits(first[name]) == _bits(second[name]) for name in first)


def _bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    plain = tensor.detach().contiguous()
    return plain.dtype, tuple(plain.shape), plain.flatten().view(torch.uint8).numpy().tobytes()


def tensors_below(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file below `folder`, by path and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}: {key}": value for file in files for key, value in load_file(file).items()}
