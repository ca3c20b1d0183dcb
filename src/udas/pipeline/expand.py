"""A run file written out in full, and the way back to the places where its user wrote things."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from udas.config import Config, merge
from udas.data.batch import Stream
from udas.data.dataset import domain_settings
from udas.errors import ConfigError
from udas.names import METHODS, load_method
from udas.validation import Place, problems

RUN_WIDE = ("network", "training")
"""Keys that a run file may give once, as defaults of every train stage."""


class RoundsStage(Config):
    """Label with a model, train a student on the labels, let the student label, and so on."""

    kind: Literal["rounds"] = "rounds"
    rounds: Annotated[int, Field(gt=0)] = Field(description="how often labels are made and a student is trained")
    model: str = Field(description="train stage of the first network that labels")
    label: dict[str, Any] = Field(default_factory=dict, description="rule of every label stage")
    easy: str | None = Field(None, description="rank stage whose easy pictures alone are labelled, in every round")
    prototypes: str | None = Field(None, description="prototypes stage that re-weights what is labelled")
    student: dict[str, Any] = Field(description="train stage; `start: teacher` begins with the network that labelled")
    title: str | None = Field(None, description="row name in tables; the stage's name if not given")


class Expansion:
    """What a run file leaves short, written out.

    Data sets given by preset, run-wide `network` and `training` as defaults of every train stage, `rounds` as label
    and train stages, and an evaluation behind every train stage that has a segmentation network.

    written: the file as it is.
    full: the same in full.
    problems: what could not be written out; those parts of `full` are meaningless.
    """

    def __init__(self, written: Mapping[str, Any]) -> None:
        self.written = written
        self.full = copy.deepcopy(dict(written))
        self.problems: dict[Place, str] = {}
        self._origins: dict[Place, Place] = {}
        defaults = {key: self.full.pop(key) for key in RUN_WIDE if key in self.full}
        self._expand_data()
        stages = self.full.get("stages")
        if isinstance(stages, dict):
            self.full["stages"] = self._expand_stages(stages, defaults)

    def as_written(self, found: Mapping[Place, str]) -> dict[Place, str]:
        """All problems, with those `found` in `full` at the places where the user wrote what is wrong."""
        places = {place: self._place(place) for place in found}
        known = tuple(self.problems)
        new = {
            place: text
            for place, text in found.items()
            if not _below(place, known) and not _below(places[place], known)
        }
        return self.problems | {places[place]: text for place, text in new.items()}

    def _place(self, place: Place) -> Place:
        for length in range(len(place), 0, -1):
            if place[:length] in self._origins:
                place = self._origins[place[:length]] + place[length:]
                break
        if place[:1] == ("stages",) and not _holds(self.written, place):
            tails = [place[place.index(key) :] for key in RUN_WIDE if key in place]
            place = next((tail for tail in tails if _holds(self.written, tail)), place)
        return place

    def _expand_data(self) -> None:
        data = self.full.get("data")
        if not isinstance(data, dict):
            return
        for role in ("source", "target"):
            try:
                if data.get(role) is not None:
                    data[role] = domain_settings(data[role])
            except ConfigError as error:
                self.problems["data", role] = str(error)

    def _expand_stages(self, stages: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        full: dict[str, Any] = {}
        for name, stage in stages.items():
            for new_name, new in self._unrolled(name, stage).items():
                self._add(full, new_name, self._scored(new_name, new))
                if ("stages", new_name) in self.problems or not _trains(new):
                    continue
                segments = _makes_segmenter(new)
                given = {key: value for key, value in defaults.items() if segments or key != "network"}
                full[new_name] = merge(_batch_per_stream(given, new), new) | {"kind": "train"}
                if segments and new.get("evaluate", True):
                    self._add(full, f"evaluate_{new_name}", self._evaluation(new_name, new.get("title")))
        return full

    def _scored(self, name: str, stage: Any) -> Any:
        """An evaluate stage with the run's protocol, where it gives none."""
        if not isinstance(stage, dict) or stage.get("kind") != "evaluate" or "protocol" in stage:
            return stage
        self._origins["stages", name, "protocol"] = ("protocol",)
        return stage | {"protocol": self.full.get("protocol", "whole")}

    def _add(self, full: dict[str, Any], name: str, stage: Any) -> None:
        if name in full:
            self.problems["stages", name] = "an earlier stage makes a stage of this name by itself; choose another"
        full[name] = stage

    def _evaluation(self, name: str, title: str | None) -> dict[str, Any]:
        place = ("stages", f"evaluate_{name}")
        self._origins |= {place: ("stages", name), (*place, "protocol"): ("protocol",)}
        protocol = self.full.get("protocol", "whole")
        return {"kind": "evaluate", "model": name, "title": title or name, "protocol": protocol}

    def _unrolled(self, name: str, stage: Any) -> dict[str, Any]:
        """The stages of one entry: itself, or label_1, student_1, label_2, student_2, ... of rounds."""
        if not isinstance(stage, dict) or stage.get("kind") != "rounds":
            return {name: stage}
        wrong = problems(RoundsStage, stage)
        self.problems |= {("stages", name, *place): text for place, text in wrong.items()}
        return {} if wrong else self._rounds(name, RoundsStage.model_validate(stage))

    def _rounds(self, name: str, entry: RoundsStage) -> dict[str, Any]:
        stages: dict[str, Any] = {}
        teacher = entry.model
        for number in range(1, entry.rounds + 1):
            label, student = f"{name}_label_{number}", f"{name}_{number}"
            title = f"{entry.title or name}, round {number}"
            given = entry.model_dump(include={"easy", "prototypes"}, exclude_none=True)
            stages[label] = {
                "kind": "label",
                "model": teacher,
                "rule": entry.label,
                "title": f"{title}: labels",
            } | given
            stages[student] = entry.student | {"kind": "train", "pseudo": label, "title": title}
            if entry.student.get("start") == "teacher":
                stages[student]["start"] = teacher
                self._origins["stages", student, "start"] = ("stages", name, "model")
            self._origins |= {
                ("stages", label): ("stages", name),
                ("stages", label, "rule"): ("stages", name, "label"),
                ("stages", student): ("stages", name, "student"),
            }
            teacher = student
        return stages


def _below(place: Place, known: tuple[Place, ...]) -> bool:
    return any(place[: len(other)] == other for other in known)


def _batch_per_stream(defaults: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """Run-wide defaults for a stage that gives pictures per step by stream: streams it leaves out keep the number."""
    number, own = (_batch(entry) for entry in (defaults, stage))
    if not isinstance(number, int) or not isinstance(own, dict):
        return defaults
    return merge(defaults, {"training": {"batch": dict.fromkeys((stream.value for stream in Stream), number)}})


def _batch(entry: dict[str, Any]) -> Any:
    training = entry.get("training")
    return training.get("batch") if isinstance(training, dict) else None


def _trains(stage: Any) -> bool:
    return isinstance(stage, dict) and stage.get("kind", "train") == "train"


def _makes_segmenter(stage: dict[str, Any]) -> bool:
    method = stage.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    return name not in METHODS or load_method(name).makes == "segmenter"


def _holds(raw: Any, place: Place) -> bool:
    """Whether there is a value at `place`; elements of lists are not looked at."""
    for key in place:
        if not isinstance(raw, Mapping):
            return isinstance(raw, list)
        if key not in raw:
            return False
        raw = raw[key]
    return True
