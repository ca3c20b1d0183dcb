"""The run file: data, network and a chain of named stages."""

from __future__ import annotations

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
    find_yaml,
    override,
    read_yaml,
)
from udas.data.batch import Stream
from udas.errors import ConfigError
from udas.evaluation.protocols import ProtocolConfig
from udas.names import METHODS, load_method
from udas.pipeline.expand import Expansion
from udas.pipeline.label import LabelConfig
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
    labelled: Labelled | None = Field(None, description="labelled real pictures of this stage, instead of the target's")
    start: str | None = Field(None, description="train stage whose network is the starting point")
    network: NetworkConfig = NetworkConfig()
    training: TrainingConfig = TrainingConfig()
    evaluate: bool = Field(True, description="evaluate the last checkpoint and give it a row in the table")


class TranslateStage(StageConfig):
    """Repaint every source picture with a trained translator; the labels stay."""

    kind: Literal["translate"] = "translate"
    model: str = Field(description="train stage of a translator, such as cyclegan")


class LabelStage(StageConfig):
    """Label the unlabelled real pictures with a trained network."""

    kind: Literal["label"] = "label"
    model: str = Field(description="train stage of the network that labels")
    rule: LabelConfig = LabelConfig()


class EvaluateStage(StageConfig):
    """Score a trained network on the validation split. Added behind every train stage by itself."""

    kind: Literal["evaluate"] = "evaluate"
    model: str
    protocol: ProtocolConfig = WHOLE


AnyStage = Annotated[TrainStage | TranslateStage | LabelStage | EvaluateStage, Field(discriminator="kind")]


class DataConfig(Config):
    """The two domains of a run."""

    source: DomainConfig | None = Field(None, description="synthetic pictures with labels")
    target: DomainConfig = Field(description="real pictures; `labelled` says which of them have labels")
    train_split: str = "train"
    val_split: str = Field("val", description="labelled pictures that networks are scored on, and nothing else")


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


REFERENCES = {"source": "translate", "pseudo": "label", "start": "train", "model": "train"}
"""Field of a stage that names another one -> the kind it must be."""

KINDS = ("train", "translate", "label", "evaluate")
UNKNOWN = "unknown"  # the kind of a stage with a mistake in it; nothing is said of those that name it


def uses(stage: Any) -> dict[str, str]:
    """Role -> name of the stages that `stage` builds on."""
    return {role: name for role in REFERENCES if isinstance(name := _value(stage, role), str)}


def reference_problems(stages: Mapping[str, Any]) -> dict[Place, str]:
    """Stages, validated or not, that name one which is not there before them or is of another kind."""
    found: dict[Place, str] = {}
    earlier: dict[str, str] = {}
    for name, stage in stages.items():
        for role, other in uses(stage).items():
            kind = REFERENCES[role]
            if earlier.get(other) not in (kind, UNKNOWN):
                choices = [candidate for candidate in earlier if earlier[candidate] == kind]
                found["stages", name, role] = f"{other!r} is not an earlier {kind} stage{nearest(other, choices)}"
        kind = _value(stage, "kind")
        earlier[name] = kind if kind in KINDS else UNKNOWN
    return found


def _value(stage: Any, key: str) -> Any:
    return stage.get(key) if isinstance(stage, Mapping) else getattr(stage, key, None)


# ------------------------------------------------------------------------------------------------------- loading


def load_run(name: str, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file (a path or a preset's name), apply overrides, expand it, and validate all of it.

    Raises:
        ConfigError: one line for every problem.
    """
    raw = {"name": Path(name).stem} | read_yaml(find_yaml(name, "runs"))
    return build_run(override(_by_keys(raw), overrides or []), name)


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
