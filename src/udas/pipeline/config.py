"""The run file: data, network and a chain of named stages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from udas.config import (
    Config,
    DomainConfig,
    Labelled,
    MethodConfig,
    NetworkConfig,
    Size,
    find_yaml,
    merge,
    override,
    read_yaml,
)
from udas.data.batch import Stream
from udas.errors import ConfigError
from udas.evaluation.protocols import ProtocolConfig
from udas.names import METHODS, load_method
from udas.networks.ensemble import Averaged
from udas.pipeline.expand import Expansion
from udas.pipeline.label import LabelConfig
from udas.pipeline.prototypes import PrototypesConfig
from udas.taxonomy import load_taxonomy
from udas.training.loop import LoggingConfig, TrainingConfig
from udas.training.runtime import RuntimeConfig
from udas.validation import Place, listing, nearest, problems

if TYPE_CHECKING:
    MethodSettings = MethodConfig
else:
    MethodSettings = Annotated[
        reduce(or_, [load_method(name).settings for name in METHODS]), Field(discriminator="name")
    ]

WHOLE = ProtocolConfig.model_validate("whole")

Models = str | Annotated[list[str], Field(min_length=1)]
"""One train stage, or several whose predictions are averaged."""


class StageConfig(Config):
    """What all stages share."""

    title: str | None = Field(None, description="row name in tables and the report; the stage's name if not given")


class TrainStage(StageConfig):
    """Train a method."""

    kind: Literal["train"] = "train"
    method: MethodSettings
    streams: list[Stream] | None = Field(None, description="streams to use; all that the method takes if not given")
    source: str | None = Field(None, description="translate stage whose repainted pictures replace the source's")
    pseudo: str | None = Field(None, description="label stage that gives the pseudo-labelled stream")
    hard: str | None = Field(None, description="rank stage whose hard pictures alone are the unlabelled stream")
    labelled: Labelled | None = Field(None, description="labelled real pictures of this stage, instead of the target's")
    start: str | None = Field(None, description="train stage whose network is the starting point")
    teacher: Models | None = Field(
        None, description="train stage whose frozen network the method learns from; of a list the mean of probabilities"
    )
    prototypes: str | None = Field(None, description="prototypes stage that gives the first mean feature per class")
    network: NetworkConfig = NetworkConfig()
    training: TrainingConfig = TrainingConfig()
    evaluate: bool = Field(True, description="evaluate the last checkpoint and give it a row in the table")


class FourierConfig(Config):
    """Repainting without a network: low frequencies of a real picture's amplitude in each synthetic one."""

    beta: float = Field(0.01, gt=0, lt=0.5, description="beta, half the side of the swapped window as a share")


class TranslateStage(StageConfig):
    """Repaint every source picture, by a trained translator or in the Fourier domain; the labels stay."""

    kind: Literal["translate"] = "translate"
    model: str | None = Field(None, description="train stage of a translator, such as cyclegan")
    fourier: FourierConfig | None = Field(None, description="instead of `model`: amplitudes of real pictures")

    @model_validator(mode="after")
    def _one_way(self) -> TranslateStage:
        if (self.model is None) == (self.fourier is None):
            raise ValueError("give `model` (a train stage of a translator) or `fourier`, one of them")
        return self


class LabelStage(StageConfig):
    """Label the unlabelled real pictures with one or several trained networks."""

    kind: Literal["label"] = "label"
    model: Models = Field(description="train stage of the network that labels; of a list the predictions are averaged")
    average: Averaged = Field("logits", description="what is averaged where `model` is a list")
    easy: str | None = Field(None, description="rank stage whose easy pictures alone are labelled")
    prototypes: str | None = Field(None, description="prototypes stage that re-weights the probabilities by distance")
    rule: LabelConfig = LabelConfig()

    @model_validator(mode="after")
    def _one_feature_space(self) -> LabelStage:
        if self.prototypes is not None and not isinstance(self.model, str):
            raise ValueError("`prototypes` are features of one network: give one `model`")
        return self


class RankStage(StageConfig):
    """Sort the unlabelled real pictures by how sure a network is of them, into easy and hard ones.

    Source: IntraDA (Pan et al., CVPR 2020, section 3.2).
    """

    kind: Literal["rank"] = "rank"
    model: str = Field(description="train stage of the network that is asked")
    easy: float = Field(0.67, gt=0, le=1, description="lambda, share of the pictures that are easy")
    rare: list[str] | None = Field(None, description="rare classes: pictures with them are favoured to be easy")


class PrototypesStage(StageConfig, PrototypesConfig):
    """Mean feature of every class on the unlabelled real pictures, by a trained network and its own predictions."""

    kind: Literal["prototypes"] = "prototypes"
    model: str = Field(description="train stage of the network whose features these are")


class EvaluateStage(StageConfig):
    """Score one or several trained networks on the validation split. Added behind every train stage by itself."""

    kind: Literal["evaluate"] = "evaluate"
    model: Models = Field(description="train stage of the network; of a list the predictions are averaged")
    average: Averaged = Field("logits", description="what is averaged where `model` is a list")
    protocol: ProtocolConfig = WHOLE


AnyStage = Annotated[
    TrainStage | TranslateStage | LabelStage | RankStage | PrototypesStage | EvaluateStage, Field(discriminator="kind")
]


class DataConfig(Config):
    """The two domains of a run."""

    source: DomainConfig | None = Field(None, description="synthetic pictures with labels")
    target: DomainConfig = Field(description="real pictures; `labelled` says which of them have labels")
    train_split: str = "train"
    val_split: str = Field("val", description="labelled pictures that networks are scored on, and nothing else")
    val_size: Size | Literal["own"] | None = Field(
        None, description="size networks are scored at: own = that of the files; none = the target's `size`"
    )


class RunConfig(Config):
    """A whole run. Later stages name the earlier ones they build on."""

    name: str
    taxonomy: str = Field(description="label space: a name (`udas list`) or a YAML file")
    seed: int = 0
    data: DataConfig
    protocol: ProtocolConfig = WHOLE
    logging: LoggingConfig = LoggingConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    cache: bool = Field(False, description="decode and resize every picture once, into memory-mapped files")
    stages: dict[str, AnyStage]

    @model_validator(mode="after")
    def _references(self) -> RunConfig:
        if found := reference_problems(self.stages):
            raise ValueError("\n".join(f"{'.'.join(place)}: {text}" for place, text in found.items()))
        return self


REFERENCES = {
    "source": "translate",
    "pseudo": "label",
    "start": "train",
    "model": "train",
    "teacher": "train",
    "prototypes": "prototypes",
    "hard": "rank",
    "easy": "rank",
}
"""Field of a stage that names others -> the kind they must be."""

RESERVED = ("old", "cache")  # folders of a run that are no stages
KINDS = ("train", "translate", "label", "rank", "prototypes", "evaluate")
UNKNOWN = "unknown"  # the kind of a stage with a mistake in it; nothing is said of those that name it


def uses(stage: Any) -> dict[str, str | list[str]]:
    """Role -> name, or names, of the stages that `stage` builds on."""
    return {role: names for role in REFERENCES if _names(names := _value(stage, role))}


def _names(value: Any) -> bool:
    """Whether a value names stages; of a rank stage, `easy` is a share."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def several(names: str | list[str]) -> list[str]:
    """The name or names of a role as a list."""
    return [names] if isinstance(names, str) else names


def reference_problems(stages: Mapping[str, Any]) -> dict[Place, str]:
    """Stages, validated or not, with a name that cannot be, or that name one not there before or of another kind."""
    found: dict[Place, str] = {} if stages else {("stages",): "empty; a run has one at least"}
    earlier: dict[str, str] = {}
    for name, stage in stages.items():
        if not re.fullmatch(r"\w[\w.-]*", str(name)) or name in RESERVED:
            found["stages", name] = "cannot be a stage's folder; use letters, digits and _ - . (not `old` or `cache`)"
        for role, others in uses(stage).items():
            kind = REFERENCES[role]
            choices = [candidate for candidate in earlier if earlier[candidate] == kind]
            wrong = [other for other in several(others) if earlier.get(other) not in (kind, UNKNOWN)]
            for other in wrong[:1]:
                found["stages", name, role] = f"{other!r} is not an earlier {kind} stage{nearest(other, choices)}"
        if text := _foreign_prototypes(stages, stage):
            found.setdefault(("stages", name, "prototypes"), text)
        kind = _value(stage, "kind")
        earlier[name] = kind if kind in KINDS else UNKNOWN
    return found


def _foreign_prototypes(stages: Mapping[str, Any], stage: Any) -> str | None:
    """What is wrong with a stage whose network does not have the features that its prototypes were collected from."""
    role = {"label": "model", "train": "start"}.get(_value(stage, "kind"))
    collected = _value(stages.get(_value(stage, "prototypes") or ""), "model")
    if role is None or not isinstance(collected, str):
        return None
    network = _value(stage, role)
    if isinstance(network, list) or collected in _ancestors(stages, network):
        return None
    return f"these are features of {collected!r}: give `{role}: {collected}`, or a stage that starts from it"


def _ancestors(stages: Mapping[str, Any], name: Any) -> list[str]:
    """A train stage, the one whose network it started from, and so on."""
    line: list[str] = []
    while isinstance(name, str) and name not in line:
        line.append(name)
        name = _value(stages.get(name), "start")
    return line


def _value(stage: Any, key: str) -> Any:
    return stage.get(key) if isinstance(stage, Mapping) else getattr(stage, key, None)


# ------------------------------------------------------------------------------------------------------- loading


def load_run(name: str, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file (a path or a preset's name) and its base, apply overrides, expand it, and validate all of it.

    Raises:
        ConfigError: one line for every problem.
    """
    raw = {"name": Path(name).stem} | _on_base(read_yaml(find_yaml(name, "runs")))
    return build_run(override(_by_keys(raw), overrides or []), name)


def _on_base(raw: dict[str, Any]) -> dict[str, Any]:
    """A run file laid over its `base`, group by group; of the base, `name` and `stages` play no part.

    Raises:
        ConfigError: no such base, or one that has a base itself.
    """
    own = dict(raw)
    if "base" not in own:
        return own
    path = find_yaml(str(own.pop("base")), "bases")
    base = read_yaml(path)
    if "base" in base:
        raise ConfigError(f"{path}: is a base and has a `base` itself; write out what it needs")
    return merge({key: value for key, value in base.items() if key not in ("name", "stages")}, own)


def _by_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """Data sets that are given by name alone as keys, so that overrides reach into them."""
    data = raw.get("data")
    if not isinstance(data, dict):
        return raw
    named = {role: {"preset": data[role]} for role in ("source", "target") if isinstance(data.get(role), str)}
    return raw | {"data": data | named}


def _taxonomy_problems(name: Any) -> dict[Place, str]:
    try:
        if isinstance(name, str):
            load_taxonomy(name)
    except ConfigError as error:
        return {("taxonomy",): str(error)}
    return {}


def build_run(written: dict[str, Any], where: str) -> RunConfig:
    """The run that the content of a run file describes.

    Raises:
        ConfigError: one line for every problem, each at the place where it was written.
    """
    expansion = Expansion(written)
    found = {place: text for place, text in problems(RunConfig, expansion.full).items() if place}
    if not expansion.problems and isinstance(stages := expansion.full.get("stages"), dict):
        found |= reference_problems(stages)
    found |= _taxonomy_problems(written.get("taxonomy"))
    if wrong := expansion.as_written(found):
        raise ConfigError(listing(where, wrong))
    return RunConfig.model_validate(expansion.full)
