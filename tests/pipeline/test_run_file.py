"""Run files: what they may leave short, where mistakes are told, and the schema that editors check them with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from udas.config import find_yaml, preset_names, read_yaml
from udas.data.batch import Stream
from udas.errors import ConfigError
from udas.pipeline.config import RunConfig, TrainStage, build_run, load_run
from udas.pipeline.expand import Expansion
from udas.pipeline.schema import run_schema

DOMAIN = {
    "name": "mine",
    "root": "/data",
    "images": "images/{split}/*.png",
    "splits": {"train": "train", "val": "val"},
    "taxonomy": "street11",
}
TEACHER = {"method": {"name": "udas"}}
ROUNDS = {"kind": "rounds", "rounds": 2, "model": "teacher", "student": {"method": {"name": "supervised"}}}


def run(stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    data = {"source": "streets_game", "target": DOMAIN}
    return {"name": "mine", "taxonomy": "street11", "data": data, "stages": stages} | changes


def mistakes(raw: dict[str, Any]) -> list[str]:
    """The lines of the error, without its head."""
    with pytest.raises(ConfigError) as caught:
        build_run(copy.deepcopy(raw), "run.yaml")
    head, *lines = str(caught.value).splitlines()
    assert head == f"run.yaml: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


# ------------------------------------------------------------------------------------------------- what is left short


def test_run_wide_defaults_reach_every_train_stage_that_can_use_them() -> None:
    stages = {
        "style": {"method": {"name": "cyclegan"}, "training": {"batch": 1}},
        "repainted": {"kind": "translate", "model": "style"},
        "teacher": TEACHER
        | {"source": "repainted", "network": {"name": "fcn"}, "training": {"augment": {"flip": False}}},
        "students": ROUNDS,
    }
    network, training = (
        {"name": "segnet", "encoder": "resnet18"},
        {"steps": 7, "batch": 3, "augment": {"crop": [32, 32]}},
    )
    config: Any = build_run(run(stages, network=network, training=training), "run.yaml").stages
    assert (config["style"].training.steps, config["style"].training.batch) == (7, 1)
    assert config["style"].network == TrainStage.model_fields["network"].default
    assert (config["teacher"].network.name, config["teacher"].network.encoder) == ("fcn", "resnet18")
    assert (config["teacher"].training.batch, config["teacher"].training.augment.crop) == (3, (32, 32))
    assert config["teacher"].training.augment.flip is False
    assert config["students_2"].network.name == "segnet"


def test_an_evaluation_follows_every_network_that_segments() -> None:
    stages = {
        "style": {"method": {"name": "cyclegan"}},
        "teacher": TEACHER | {"title": "ours"},
        "probe": TEACHER | {"evaluate": False},
    }
    config: Any = build_run(run(stages, protocol="proda"), "run.yaml").stages
    assert list(config) == ["style", "teacher", "evaluate_teacher", "probe"]
    assert (config["evaluate_teacher"].model, config["evaluate_teacher"].title) == ("teacher", "ours")
    assert config["evaluate_teacher"].protocol.name == "proda"


def test_an_evaluation_of_ones_own_has_the_protocol_of_the_run_or_its_own() -> None:
    stages = {
        "teacher": TEACHER,
        "again": {"kind": "evaluate", "model": ["teacher"]},
        "flipped": {"kind": "evaluate", "model": "teacher", "protocol": {"flips": True}},
    }
    config: Any = build_run(run(stages, protocol="proda"), "run.yaml").stages
    assert config["again"].protocol.name == "proda"
    assert (config["flipped"].protocol.name, config["flipped"].protocol.flips) == ("own", True)
    assert mistakes(run(stages, protocol={"flip": True})) == ["protocol.flip: unknown key; did you mean 'flips'?"]


def test_data_sets_by_name_and_with_changes(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    raw = run({"teacher": TEACHER}, data={"source": "gta5", "target": {"preset": "cityscapes", "size": [8, 16]}})
    raw.pop("name")
    file.write_text(yaml.safe_dump(raw | {"taxonomy": "cityscapes19"}))
    config = load_run(str(file), ["data.source.root=/elsewhere", "data.target.labelled.count=5"])
    assert config.name == "run"
    assert config.data.source is not None
    assert (config.data.source.name, config.data.source.root) == ("gta5", "/elsewhere")
    assert (config.data.target.name, config.data.target.size) == ("cityscapes", (8, 16))
    assert config.data.target.labelled.count == 5


def test_the_file_is_not_changed_by_writing_it_out() -> None:
    raw = run({"teacher": TEACHER, "students": ROUNDS}, training={"steps": 3})
    kept = copy.deepcopy(raw)
    assert "students_2" in Expansion(raw).full["stages"]
    assert raw == kept


@pytest.mark.parametrize("name", preset_names("runs"))
def test_every_packaged_run_loads(name: str) -> None:
    config = load_run(name)
    assert config.name
    assert RunConfig.model_validate(json.loads(config.model_dump_json())) == config


# ------------------------------------------------------------------------------------------------------------- base


def write(folder: Path, name: str, content: dict[str, Any]) -> str:
    (folder / name).write_text(yaml.safe_dump(content))
    return str(folder / name)


def test_a_base_gives_what_a_file_does_not_say(tmp_path: Path) -> None:
    training = {"steps": 7, "augment": {"crop": [32, 32], "flip": False}}
    base = write(tmp_path, "base.yaml", run({"old": TEACHER}, training=training, seed=5, network={"name": "fcn"}))
    own = {"base": base, "training": {"augment": {"flip": True}}, "data": {"target": {"labelled": {"count": 3}}}}
    file = write(tmp_path, "mine.yaml", own | {"stages": {"teacher": TEACHER}})
    config: Any = load_run(file, ["training.batch=2"])
    assert (config.name, config.seed, list(config.stages)) == ("mine", 5, ["teacher", "evaluate_teacher"])
    training = config.stages["teacher"].training
    assert (training.steps, training.batch, training.augment.crop, training.augment.flip) == (7, 2, (32, 32), True)
    assert config.stages["teacher"].network.name == "fcn"
    assert (config.data.target.root, config.data.target.labelled.count) == ("/data", 3)
    assert config.data.source.name == "streets_game"


@pytest.mark.parametrize("name", preset_names("bases"))
def test_every_packaged_base_carries_a_run(name: str, tmp_path: Path) -> None:
    config: Any = load_run(write(tmp_path, "run.yaml", {"base": name, "stages": {"teacher": TEACHER}}))
    adapts = config.data.source is not None
    assert (config.data.target.labelled == "none") == adapts, "a base has either a source or real labels"
    assert config.stages["evaluate_teacher"].protocol == config.protocol


def test_mistakes_about_a_base(tmp_path: Path) -> None:
    stages = {"stages": {"teacher": TEACHER}}
    with pytest.raises(ConfigError, match=r"no base of run files 'street'; did you mean 'streets'\?"):
        load_run(write(tmp_path, "run.yaml", {"base": "street"} | stages))
    first = write(tmp_path, "first.yaml", {"base": "streets"})
    with pytest.raises(ConfigError, match=r"first.yaml: is a base and has a `base` itself"):
        load_run(write(tmp_path, "run.yaml", {"base": first} | stages))
    with pytest.raises(ConfigError, match="stages: missing"):
        load_run(first)


# -------------------------------------------------------------------------------------------------------- mistakes


def test_every_mistake_of_a_file_is_told_at_once_where_it_was_written() -> None:
    stages = {
        "teacher": TEACHER | {"training": {"batsh": 4}},
        "students": ROUNDS | {"label": {"view": 2}, "student": {"metod": {}, "source": "repaint"}},
        "more": {"kind": "rounds", "rounds": 0, "modell": "teacher", "student": {}},
    }
    raw = run(stages, data={"source": "gta", "target": DOMAIN | {"szie": [8, 8]}}, training={"step": 3}, sede=1)
    assert set(mistakes(raw | {"protocol": {"flip": True}})) == {
        "data.source: no data preset 'gta'; did you mean 'gta5'?",
        "data.target.szie: unknown key; did you mean 'size'?",
        "sede: unknown key; did you mean 'seed'?",
        "protocol.flip: unknown key; did you mean 'flips'?",
        "training.step: unknown key; did you mean 'steps'?",
        "stages.teacher.training.batsh: unknown key; did you mean 'batch'?",
        "stages.students.label.view: unknown key; did you mean 'views'?",
        "stages.students.student.metod: unknown key; did you mean 'method'?",
        "stages.students.student.method: missing",
        "stages.more.rounds: input should be greater than 0 (got 0)",
        "stages.more.modell: unknown key; did you mean 'model'?",
        "stages.more.model: missing",
    }


def test_references_are_checked_with_everything_else() -> None:
    stages = {
        "style": {"method": {"name": "cyclegan"}},
        "teacher": TEACHER | {"source": "style", "training": {"step": 3}},
        "labels": {"kind": "label", "model": "techer"},
        "student": {"method": {"name": "supervised"}, "pseudo": "labels", "start": "student"},
        "students": ROUNDS | {"model": "labels", "student": {"method": {"name": "supervised"}, "start": "teacher"}},
    }
    assert mistakes(run(stages)) == [
        "stages.teacher.training.step: unknown key; did you mean 'steps'?",
        "stages.teacher.source: 'style' is not an earlier translate stage",
        "stages.labels.model: 'techer' is not an earlier train stage; did you mean 'teacher'?",
        "stages.student.start: 'student' is not an earlier train stage (choose from: style, teacher)",
        "stages.students.model: 'labels' is not an earlier train stage (choose from: student, style, teacher)",
    ]


def test_references_of_every_kind_are_checked() -> None:
    stages = {
        "teacher": TEACHER,
        "ranking": {"kind": "rank", "model": "teacher"},
        "means": {"kind": "prototypes", "model": "ranking"},
        "labels": {"kind": "label", "model": ["teacher", "techer", "x"], "easy": "means"},
        "student": TEACHER | {"hard": "labels", "prototypes": "mean", "teacher": "student"},
        "both": {"kind": "evaluate", "model": ["teacher", "labels"]},
    }
    assert mistakes(run(stages)) == [
        "stages.means.model: 'ranking' is not an earlier train stage (choose from: teacher)",
        "stages.labels.model: 'techer' is not an earlier train stage; did you mean 'teacher'?",
        "stages.labels.easy: 'means' is not an earlier rank stage (choose from: ranking)",
        "stages.student.teacher: 'student' is not an earlier train stage (choose from: teacher)",
        "stages.student.prototypes: 'mean' is not an earlier prototypes stage; did you mean 'means'?",
        "stages.student.hard: 'labels' is not an earlier rank stage (choose from: ranking)",
        "stages.both.model: 'labels' is not an earlier train stage (choose from: student, teacher)",
    ]


def test_prototypes_are_features_of_the_network_they_are_used_with() -> None:
    learner = {"method": {"name": "proda"}, "teacher": "teacher", "prototypes": "means"}
    stages = {
        "teacher": TEACHER,
        "apart": TEACHER,
        "later": TEACHER | {"start": "teacher"},
        "means": {"kind": "prototypes", "model": "teacher"},
        "near": {"kind": "label", "model": "later", "prototypes": "means"},
        "far": {"kind": "label", "model": "apart", "prototypes": "means"},
        "lost": learner,
        "found": learner | {"start": "later"},
        "rounds": ROUNDS | {"prototypes": "means"},
    }
    text = "prototypes: these are features of 'teacher': give `{}: teacher`, or a stage that starts from it"
    assert mistakes(run(stages)) == [
        f"stages.far.{text.format('model')}",
        f"stages.lost.{text.format('start')}",
        f"stages.rounds.{text.format('model')}",  # of round 2: its student does not start from the teacher
    ]


def test_a_stage_has_one_way_to_do_its_work() -> None:
    stages = {
        "teacher": TEACHER,
        "means": {"kind": "prototypes", "model": "teacher"},
        "neither": {"kind": "translate"},
        "two": {"kind": "translate", "model": "teacher", "fourier": {"beta": 0.1}},
        "near": {"kind": "label", "model": ["teacher", "teacher"], "prototypes": "means"},
        "nobody": {"kind": "evaluate", "model": []},
        "none": {"kind": "rank", "model": "teacher", "easy": 0},
    }
    way = "give `model` (a train stage of a translator) or `fourier`, one of them"
    found = {line.split(":")[0]: line.partition(": ")[2] for line in mistakes(run(stages))}
    assert found["stages.neither"] == found["stages.two"] == way
    assert found["stages.near"] == "`prototypes` are features of one network: give one `model`"
    assert "at least 1 item" in found["stages.nobody.model"]
    assert found["stages.none.easy"] == "input should be greater than 0 (got 0)"


def test_nothing_is_said_of_stages_that_name_a_broken_one() -> None:
    stages = {"teacher": {"kind": "tarin"}, "labels": {"kind": "label", "model": "teacher"}}
    assert mistakes(run(stages)) == ["stages.teacher.kind: nothing is called 'tarin'; did you mean 'train'?"]
    stages = {"students": ROUNDS | {"rounds": "two"}, "labels": {"kind": "label", "model": "students_2"}}
    (line,) = mistakes(run(stages))
    assert line.startswith("stages.students.rounds: input should be a valid integer")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"data": {"target": ["gta5"]}},
            "data.target: expected a preset, a YAML file, or the keys of a data set (got ['gta5'])",
        ),
        ({"data": {"target": "no.yaml"}}, "data.target: no.yaml: no such file"),
        ({"data": {}}, "data.target: missing"),
        ({"data": None}, "data: input should be keys with values (got None)"),
        ({"stages": []}, "stages: input should be keys with values (got [])"),
        ({"stages": {"a": None}}, "stages.a: input should be keys with values (got None)"),
    ],
)
def test_parts_of_the_wrong_kind(changes: dict[str, Any], line: str) -> None:
    assert mistakes(run({"teacher": TEACHER}) | changes) == [line]


def test_two_stages_of_one_name() -> None:
    text = "an earlier stage makes a stage of this name by itself; choose another"
    stages = {"teacher": TEACHER, "students": ROUNDS, "students_1": TEACHER, "evaluate_teacher": TEACHER}
    assert set(mistakes(run(stages))) == {f"stages.{name}: {text}" for name in ("students_1", "evaluate_teacher")}


# ---------------------------------------------------------------------------------------------------------- schema


def fits(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """As much of a JSON schema's rules as ours needs."""
    if "$ref" in schema:
        return fits(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], value, root)
    for several in ("anyOf", "oneOf"):
        if several in schema and not any(fits(one, value, root) for one in schema[several]):
            return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    if schema.get("type") == "null":
        return value is None
    if "type" in schema and not isinstance(value, kinds[schema["type"]]):
        return False
    if isinstance(value, dict) and ("properties" in schema or "additionalProperties" in schema):
        return _object_fits(schema, value, root)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return all(fits(schema["items"], element, root) for element in value)
    return not isinstance(value, dict) or set(schema.get("required", [])) <= value.keys()


def _object_fits(schema: dict[str, Any], value: dict[str, Any], root: dict[str, Any]) -> bool:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for key, inner in value.items():
        rule = known.get(key, others)
        if rule is False or (isinstance(rule, dict) and not fits(rule, inner, root)):
            return False
    return set(schema.get("required", [])) <= value.keys()


SCHEMA = run_schema()


def accepted(raw: Any) -> bool:
    return fits(SCHEMA, raw, SCHEMA)


@pytest.mark.parametrize("name", preset_names("runs"))
def test_packaged_runs_fit_the_schema(name: str) -> None:
    assert accepted(read_yaml(find_yaml(name, "runs")))


def test_the_schema_knows_what_may_be_left_short_and_refuses_the_rest() -> None:
    plain = DOMAIN | {"labels": "labels/{stem}.png", "map": {"road": 7, "sky": [1, [9, 9, 9]], "ignore": [0]}}
    good = run(
        {"teacher": TEACHER, "students": ROUNDS}, data={"target": plain}, training={"steps": 3}, protocol="proda"
    )
    assert accepted(good)
    assert accepted(good | {"data": {"source": "gta5", "target": {"preset": "cityscapes", "labelled": {"count": 3}}}})
    assert accepted(good | {"protocol": {"preset": "proda", "subset": "synthia16"}})
    stages = {"a": {"kind": "rank", "model": "teacher"}, "b": {"kind": "evaluate", "model": ["teacher"]}}
    assert accepted({"base": "streets", "stages": stages})
    assert accepted({"base": "streets", "data": {"target": {"labelled": "all"}}, "stages": {}})
    for content in (
        {"base": "streets"},
        {"base": "streets", "data": {"target": {"szie": [3, 4]}}, "stages": {}},
        {"data": {"target": {"labelled": "all"}}, "taxonomy": "street11", "stages": {}},
        {"base": "streets", "stages": {"a": {"kind": "rank", "model": "teacher", "easi": 0.5}}},
    ):
        assert not accepted(content), content
    for changes in (
        {"sede": 1},
        {"training": {"step": 3}},
        {"data": {"target": {"root": "/data"}}},
        {"data": {"target": plain | {"szie": [3, 4]}}},
        {"protocol": "prado"},
        {"stages": {"students": ROUNDS | {"round": 2}}},
        {"stages": {"teacher": {"method": {"name": "udas", "lambda": 2}}}},
        {"stages": {"teacher": {"kind": "tarin"}}},
    ):
        assert not accepted(good | changes), changes


def test_the_schema_describes_every_key_of_a_run() -> None:
    json.dumps(SCHEMA)
    assert SCHEMA["properties"].keys() == RunConfig.model_fields.keys() | {"base", "network", "training"}
    assert "lambda_adv" in SCHEMA["$defs"]["UDASConfig"]["properties"]["adversarial"]["description"]


@pytest.mark.parametrize("name", ["a/b", "../b", "old", "cache", "", ".hidden", "two words"])
def test_a_stage_has_a_name_that_can_be_its_folder(name: str) -> None:
    [line] = mistakes(run({name: TEACHER | {"evaluate": False}}))
    assert line.startswith(f"stages.{name}")


def test_a_run_has_a_stage() -> None:
    [line] = mistakes(run({}))
    assert line.startswith("stages: ")


def test_streams_that_a_stage_does_not_name_keep_the_pictures_per_step_of_the_run() -> None:
    stages = {"teacher": TEACHER | {"training": {"batch": {"unlabelled": 4}}}}
    training = build_run(run(stages, training={"batch": 2}), "run.yaml").stages["teacher"].training
    assert {stream.value: training.batch_of(stream) for stream in Stream} == {
        "source": 2,
        "labelled": 2,
        "unlabelled": 4,
        "pseudo": 2,
    }


@pytest.mark.parametrize("batch", [0, -2, {"source": 0}])
def test_a_step_has_pictures(batch: Any) -> None:
    assert all("greater than 0" in line for line in mistakes(run({"teacher": TEACHER}, training={"batch": batch})))
