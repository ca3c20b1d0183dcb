"""Reading, overriding and validating configurations; every packaged preset; messages in the words of the user."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from udas.config import (
    Config,
    DomainConfig,
    NetworkConfig,
    expand_environment,
    find_yaml,
    merge,
    override,
    preset_names,
    read_yaml,
)
from udas.data.dataset import load_domain
from udas.errors import ConfigError
from udas.methods.udas import UDASConfig
from udas.names import METHODS, load_method
from udas.pipeline.config import RunConfig
from udas.taxonomy import LabelMap, load_taxonomy
from udas.validation import listing, nearest, problems, validate

DOMAIN = {
    "name": "mine",
    "root": "/data",
    "images": "images/{split}/*.png",
    "splits": {"train": "train"},
    "taxonomy": "street11",
}


def wrong(model: Any, raw: Any) -> dict[str, str]:
    """Place -> message of everything that is wrong."""
    return {".".join(place): text for place, text in problems(model, raw).items()}


# ------------------------------------------------------------------------------------------------------- overrides


def test_a_change_of_one_place_is_not_one_of_all_that_share_an_anchor() -> None:
    raw = yaml.safe_load("first: &rule {views: 3, more: [{a: 1}]}\nsecond: {<<: *rule}\nthird: *rule")
    changed = override(raw, ["first.views=1", "second.views=2"])
    assert [changed[name]["views"] for name in ("first", "second", "third")] == [1, 2, 3]
    assert raw["first"]["views"] == 3


def test_overrides_are_yaml_and_reach_any_depth() -> None:
    raw = {"seed": 0, "data": {"target": {"size": [2, 4]}}, "stages": {"a": {"method": {"name": "udas"}}}}
    kept = copy.deepcopy(raw)
    values = ["seed=1", "data.target.size=[8, 16]", "stages.a.method.average=0.9", "name=x=y", "cache = true", "empty="]
    assert override(raw, values) == {
        "seed": 1,
        "data": {"target": {"size": [8, 16]}},
        "stages": {"a": {"method": {"name": "udas", "average": 0.9}}},
        "name": "x=y",
        "cache": True,
        "empty": None,
    }
    assert raw == kept
    assert override({"network": None}, ["network.weights=hub", "training.steps=3"]) == {
        "network": {"weights": "hub"},
        "training": {"steps": 3},
    }


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "override 'seed': expected key=value, for example seed=1"),
        ("=3", "override '=3': expected key=value, for example seed=1"),
        ("a..b=3", "override 'a..b=3': expected key=value, for example seed=1"),
        ("size=[1, 2", "override 'size=[1, 2': '[1, 2' is not valid YAML"),
        ("seed.more=3", "override 'seed.more': 'seed' is the value 0, not a group of keys"),
    ],
)
def test_mistakes_in_overrides(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override({"seed": 0}, [assignment])
    assert str(caught.value) == message


trees = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8
)
mappings = st.dictionaries(st.sampled_from("abc"), trees, max_size=3)


@settings(max_examples=50, deadline=None)
@given(mappings, mappings)
def test_merged_settings_are_those_of_the_change_and_the_rest_of_the_base(base: dict, change: dict) -> None:
    kept = copy.deepcopy((base, change))
    merged = merge(base, change)
    assert (base, change) == kept
    assert merged.keys() == base.keys() | change.keys()
    for key, value in merged.items():
        if isinstance(base.get(key), dict) and isinstance(change.get(key), dict):
            assert value == merge(base[key], change[key])
        else:
            assert value == change.get(key, base.get(key))
    assert merge(merged, change) == merged


# ------------------------------------------------------------------------------------------------- files and names


def test_files_that_are_no_mappings(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "broken.yaml").write_text("a: 1\nb: [1, 2\nc: 3\n")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file$"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"list\.yaml: expected `key: value` lines, found a list$"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(ConfigError, match=r"empty\.yaml: expected `key: value` lines, found nothing$"):
        read_yaml(tmp_path / "empty.yaml")
    with pytest.raises(ConfigError, match=r"broken\.yaml, line 3: not valid YAML: "):
        read_yaml(tmp_path / "broken.yaml")
    with pytest.raises(ConfigError, match=r"bytes\.yaml: not valid YAML: "):
        read_yaml(tmp_path / "bytes.yaml")
    with pytest.raises(ConfigError, match=r": cannot be read \(Is a directory\)$"):
        read_yaml(tmp_path)


def test_names_of_presets_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_yaml("some/where.yml", "data") == Path("some/where.yml")
    assert find_yaml("gta5", "data").is_file()
    with pytest.raises(ConfigError) as caught:
        find_yaml("gta", "data")
    assert str(caught.value) == "no data preset 'gta'; did you mean 'gta5'?"
    with pytest.raises(ConfigError) as caught:
        find_yaml("xyz", "runs")
    assert str(caught.value) == f"no run preset 'xyz' (choose from: {', '.join(preset_names('runs'))})"
    (tmp_path / "my_run.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        find_yaml("my_run", "runs")
    assert str(caught.value) == "no run preset 'my_run'; did you mean the file my_run.yaml?"


def test_the_nearest_name_or_all_of_them() -> None:
    assert nearest("stpes", ["steps", "batch"]) == "; did you mean 'steps'?"
    assert nearest("xyz", ["steps", "batch"]) == " (choose from: batch, steps)"
    assert nearest("xyz", []) == ""


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_ROOT", "/data/some")
    monkeypatch.delenv("OTHER_ROOT", raising=False)
    assert expand_environment("${SOME_ROOT}/a/${SOME_ROOT}") == "/data/some/a//data/some"
    assert expand_environment("plain/$SOME_ROOT") == "plain/$SOME_ROOT"
    with pytest.raises(ConfigError) as caught:
        expand_environment("${OTHER_ROOT}/a")
    expected = "${OTHER_ROOT}/a: the environment variable OTHER_ROOT is not set; export it, or give `root`"
    assert str(caught.value) == expected


# ------------------------------------------------------------------------------------------------- packaged presets


@pytest.mark.parametrize("name", preset_names("labels"))
def test_every_label_space_loads(name: str) -> None:
    taxonomy = load_taxonomy(name)
    assert taxonomy.name == name
    assert len(taxonomy.classes) == len(taxonomy.colours)


@pytest.mark.parametrize("name", preset_names("data"))
def test_every_data_set_loads_and_leads_to_its_label_space(name: str) -> None:
    domain = load_domain(name)
    assert domain.name == name
    taxonomy = load_taxonomy(domain.taxonomy)
    reached = {*LabelMap(domain, taxonomy).ids.values(), *LabelMap(domain, taxonomy).colours.values()}
    assert len(reached - {255}) > 5


@pytest.mark.parametrize("name", METHODS)
def test_every_method_describes_itself_and_its_settings(name: str) -> None:
    method = load_method(name)
    assert method.settings.model_fields["name"].default == name
    assert method.__doc__
    bare = [key for key, field in method.settings.model_fields.items() if not (field.description or _block(field))]
    assert bare == ["name"]


def _block(field: Any) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Config)


# ------------------------------------------------------------------------------------------------ readable mistakes


def test_all_mistakes_are_told_at_once() -> None:
    found = wrong(DomainConfig, {"nam": "mine", "images": 3, "splits": {}, "taxonomy": "street11", "channel": 7})
    assert found == {
        "nam": "unknown key; did you mean 'name'?",
        "name": "missing",
        "root": "missing",
        "images": "input should be a valid string (got 3)",
        "channel": "input should be less than or equal to 3 (got 7)",
    }
    with pytest.raises(ConfigError) as caught:
        validate(DomainConfig, {"nam": "mine"}, "road.yaml")
    first, *lines = str(caught.value).splitlines()
    assert first == "road.yaml: 6 problems"
    assert "  nam: unknown key; did you mean 'name'?" in lines
    assert len(lines) == 6


def test_one_mistake_is_one_problem() -> None:
    assert listing("file", {("a", "b"): "missing"}) == "file: 1 problem\n  a.b: missing"
    assert listing("file", {(): "a: wrong\nb: wrong"}) == "file: 2 problems\n  a: wrong\n  b: wrong"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"labelled": {"count": -1}}, {"labelled.count": "input should be greater than or equal to 0 (got -1)"}),
        (
            {"labelled": {"cuont": 3}},
            {"labelled.cuont": "unknown key; did you mean 'count'?", "labelled.count": "missing"},
        ),
        (
            {"splits": {"val": {"share": [0, 2]}}},
            {"splits.val.share.1": "input should be less than or equal to 1 (got 2)"},
        ),
        (
            {"splits": {"val": {"shore": [0, 1]}}},
            {"splits.val.shore": "unknown key; did you", "splits.val.share": "missing", "splits.val.file": "missing"},
        ),
        ({"size": [128]}, {"size.1": "missing"}),
        (
            {"size": [128, "x"]},
            {"size.1": "input should be a valid integer, unable to parse string as an integer (got 'x')"},
        ),
        ({"map": {"road": [3, [1, 2]]}}, {"map.road.1.2": "missing"}),
        (
            {"streets": {"look": "gmae", "pictures": {}}},
            {"streets.look": "input should be 'game' or 'camera' (got 'gmae')"},
        ),
    ],
)
def test_places_are_those_the_user_wrote(changes: dict[str, Any], found: dict[str, str]) -> None:
    actual = wrong(DomainConfig, DOMAIN | changes)
    assert actual.keys() == found.keys()
    for place, text in found.items():
        assert actual[place].startswith(text)


def test_a_value_that_fits_no_branch_is_told_of_all() -> None:
    found = wrong(DomainConfig, DOMAIN | {"labelled": 5})
    assert found == {
        "labelled": "input should be keys with values (got 5) or input should be 'all', 'none' or 'existing' (got 5) "
        "or input should be a valid string (got 5)"
    }


def test_suggestions_come_from_the_method_that_was_chosen() -> None:
    raw = {
        "name": "r",
        "taxonomy": "street11",
        "data": {"target": DOMAIN},
        "stages": {"a": {"kind": "train", "method": {"name": "udas", "lambda_a": 1, "averag": 0.5, "gan": "wgan"}}},
    }
    found = wrong(RunConfig, raw)
    assert found["stages.a.method.averag"] == "unknown key; did you mean 'average'?"
    assert "lambda_b" not in found["stages.a.method.lambda_a"]
    assert "critic_optimiser" in found["stages.a.method.lambda_a"]
    assert found["stages.a.method.gan"] == "input should be 'vanilla' or 'least_squares' (got 'wgan')"


def test_wrong_and_missing_names_of_methods_and_kinds() -> None:
    stages = {
        "a": {"kind": "tarin"},
        "b": {"kind": "train", "method": {"name": "udsa"}},
        "c": {"kind": "train", "method": {}},
    }
    raw = {"name": "r", "taxonomy": "street11", "data": {"target": DOMAIN}, "stages": stages}
    assert wrong(RunConfig, raw) == {
        "stages.a.kind": "nothing is called 'tarin'; did you mean 'train'?",
        "stages.b.method.name": "nothing is called 'udsa'; did you mean 'udas'?",
        "stages.c.method.name": "missing",
    }


def test_settings_are_frozen_and_strict_about_keys() -> None:
    config = NetworkConfig()
    with pytest.raises(Exception, match="frozen"):
        config.name = "fcn"
    assert wrong(NetworkConfig, {"encodr": "resnet50"}) == {"encodr": "unknown key; did you mean 'encoder'?"}


def test_a_changed_rate_keeps_the_rest_of_the_critics_optimiser() -> None:
    optimiser = validate(UDASConfig, {"critic_optimiser": {"lr": 1e-3}}, "test").critic_optimiser
    assert (optimiser.name, optimiser.betas, optimiser.weight_decay, optimiser.lr) == ("adam", (0.9, 0.99), 0, 1e-3)
