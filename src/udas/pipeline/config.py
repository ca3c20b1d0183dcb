"""The run file: data, network and a chain of named stages."""

from __future__ import annotations

import copy
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
    merge,
    override,
    read_yaml,
)
from udas.data.batch import Stream
from udas.data.dataset import domain_settings
from udas.errors import ConfigError
from udas.evaluation.protocols import ProtocolConfig
from udas.names import METHODS, load_method
from udas.pipeline.label import LabelConfig
from udas.training.loop import LoggingConfig, TrainingConfig
from udas.training.runtime import RuntimeConfig
from udas.validation import nearest, validate

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
        problems = list(_reference_problems(self.stages))
        if problems:
            raise ValueError("\n".join(problems))
        return self


REFERENCES = {"source": "translate", "pseudo": "label", "start": "train", "model": "train"}
"""Field of a stage that names another one -> the kind it must be."""


def uses(stage: StageConfig) -> dict[str, str]:
    """Role -> name of the stages that `stage` builds on."""
    return {role: name for role in REFERENCES if (name := getattr(stage, role, None)) is not None}


def _reference_problems(stages: dict[str, Any]) -> list[str]:
    problems = []
    earlier: dict[str, str] = {}
    for name, stage in stages.items():
        for role, other in uses(stage).items():
            choices = [n for n, kind in earlier.items() if kind == REFERENCES[role]]
            if other not in choices:
                place = f"stages.{name}.{role}"
                problems.append(
                    f"{place}: {other!r} is not an earlier {REFERENCES[role]} stage{nearest(other, choices)}"
                )
        earlier[name] = stage.kind
    return problems


# ------------------------------------------------------------------------------------------------------- loading


def load_run(name: str, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file (a path or a preset's name), apply overrides, expand it, and validate all of it.

    Raises:
        ConfigError: one line for every problem.
    """
    path = find_yaml(name, "runs")
    raw = override(read_yaml(path), overrides or [])
    raw.setdefault("name", Path(name).stem)
    return validate(RunConfig, expand(raw), str(name))


def expand(raw: dict[str, Any]) -> dict[str, Any]:
    """Write out what a run file may leave short.

    Data sets given by preset, run-wide `network` and `training` as defaults of every train stage, `rounds` as label
    and train stages, and an evaluation behind every train stage that has a segmentation network.
    """
    raw = copy.deepcopy(raw)
    defaults: dict[str, Any] = {key: raw.pop(key) for key in ("network", "training") if key in raw}
    data = raw.get("data")
    if isinstance(data, dict):
        raw["data"] = data | {key: domain_settings(data[key]) for key in ("source", "target") if data.get(key)}
    stages = raw.get("stages")
    if isinstance(stages, dict) and all(isinstance(stage, dict) for stage in stages.values()):
        raw["stages"] = _expand_stages(stages, defaults, raw.get("protocol", "whole"))
    return raw


def _expand_stages(stages: dict[str, Any], defaults: dict[str, Any], protocol: Any) -> dict[str, Any]:
    full: dict[str, Any] = {}
    for name, stage in stages.items():
        for new_name, new in (_rounds(name, stage) if stage.get("kind") == "rounds" else {name: stage}).items():
            if new.get("kind", "train") != "train":
                full[new_name] = new
                continue
            segments = _makes_segmenter(new)
            given = defaults if segments else {key: defaults[key] for key in defaults.keys() - {"network"}}
            full[new_name] = merge(given, new) | {"kind": "train"}
            if segments and new.get("evaluate", True):
                title = new.get("title", new_name)
                full[f"evaluate_{new_name}"] = {
                    "kind": "evaluate", "model": new_name, "title": title, "protocol": protocol,
                }  # fmt: skip
    return full


def _makes_segmenter(stage: dict[str, Any]) -> bool:
    method = stage.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    return name not in METHODS or load_method(name).makes == "segmenter"


def _rounds(name: str, stage: dict[str, Any]) -> dict[str, Any]:
    """label_1, student_1, label_2, student_2, ...: the student of a round labels in the next one.

    Raises:
        ConfigError: when a key is missing or unknown.
    """
    known = {"kind", "rounds", "model", "label", "student", "title"}
    wrong = [f"stages.{name}.{key}: unknown key{nearest(key, sorted(known))}" for key in stage.keys() - known]
    wrong += [f"stages.{name}.{key}: missing" for key in ("rounds", "model", "student") if key not in stage]
    if wrong:
        raise ConfigError("\n".join(wrong))
    stages: dict[str, Any] = {}
    model = stage["model"]
    for number in range(1, int(stage["rounds"]) + 1):
        label, student = f"{name}_label_{number}", f"{name}_{number}"
        title = f"{stage.get('title', name)}, round {number}"
        stages[label] = {"kind": "label", "model": model, "rule": stage.get("label", {}), "title": f"{title}: labels"}
        stages[student] = stage["student"] | {"kind": "train", "pseudo": label, "title": title}
        if student_start := stage["student"].get("start"):
            stages[student]["start"] = model if student_start == "teacher" else student_start
        model = student
    return stages
