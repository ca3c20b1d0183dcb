from __future__ import annotations

import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udas.config import DomainConfig
from udas.data import batch
from udas.errors import ConfigError, DataError
from udas.taxonomy import IGNORE, LabelMap, Taxonomy, load_taxonomy

TINY = """
name: tiny
classes:
  flat: [128, 64, 128]
  thing: [0, 0, 142]
from:
  street11: {flat: [road, sidewalk], thing: [vehicle]}
"""
FILE = Path("masks/a.png")


def domain(taxonomy: str = "street11", **changes: object) -> DomainConfig:
    rules = {"road": [6, 7], "vehicle": [10, [0, 0, 142]], "ignore": [0, 3, [0, 0, 0]]}
    return DomainConfig.model_validate(
        {"name": "mine", "root": ".", "images": "*.png", "labels": "{stem}.png", "splits": {"train": "all"}}
        | {"taxonomy": taxonomy, "map": rules}
        | changes
    )


@cache
def street() -> Taxonomy:
    return load_taxonomy("street11")


def written(folder: Path, text: str) -> str:
    path = folder / "space.yaml"
    path.write_text(text)
    return str(path)


# ---------------------------------------------------------------------------------------------------- taxonomies


def test_ignore_is_one_value_everywhere() -> None:
    assert IGNORE == 255
    assert batch.IGNORE is IGNORE


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        (
            "cityscapes19",
            "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,"
            "car,truck,bus,train,motorcycle,bicycle",
        ),
        (
            "cityscapes16",
            "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,sky,person,rider,car,bus,"
            "motorcycle,bicycle",
        ),
        (
            "cityscapes13",
            "road,sidewalk,building,traffic light,traffic sign,vegetation,sky,person,rider,car,bus,motorcycle,bicycle",
        ),
        (
            "street11",
            "road,sidewalk,building,wall,fence,pole,traffic sign or light,vegetation,sky,person,vehicle",
        ),
        ("camvid11", "sky,building,pole,road,pavement,tree,sign symbol,fence,car,pedestrian,bicyclist"),
    ],
)
def test_packaged_label_spaces(name: str, classes: str) -> None:
    taxonomy = load_taxonomy(name)
    assert taxonomy.name == name
    assert taxonomy.classes == tuple(classes.split(","))
    assert len(set(taxonomy.colours)) == len(taxonomy.classes)


def test_colours_are_the_published_ones() -> None:
    city = dict(zip(load_taxonomy("cityscapes19").classes, load_taxonomy("cityscapes19").colours, strict=True))
    assert city["road"] == (128, 64, 128)
    assert city["terrain"] == (152, 251, 152)
    assert city["traffic light"] == (250, 170, 30)
    assert city["bicycle"] == (119, 11, 32)
    for name in ("cityscapes16", "cityscapes13"):
        other = load_taxonomy(name)
        assert [city[c] for c in other.classes] == list(other.colours)
    assert load_taxonomy("camvid11").colours[4] == (60, 40, 222)


def test_palette_and_colourise() -> None:
    label = np.array([[0, 10], [IGNORE, 200]], np.uint8)
    assert street().palette().shape == (256, 3)
    assert street().palette().dtype == np.uint8
    assert street().colourise(label).tolist() == [[[128, 64, 128], [0, 0, 142]], [[0, 0, 0], [0, 0, 0]]]


def test_index() -> None:
    assert street().index("vehicle") == 10
    with pytest.raises(ConfigError, match=r"street11 has no class 'vehicel'; did you mean 'vehicle'\?"):
        street().index("vehicel")


def test_own_label_space(tmp_path: Path) -> None:
    taxonomy = load_taxonomy(written(tmp_path, TINY))
    assert taxonomy == Taxonomy(
        "tiny", ("flat", "thing"), ((128, 64, 128), (0, 0, 142)),
        {"street11": {"flat": ("road", "sidewalk"), "thing": ("vehicle",)}},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TINY.replace("[0, 0, 142]", "[0, 0, 256]"), "classes.thing.2: input should be less than or equal to 255"),
        (TINY.replace("thing: [v", "thnig: [v"), "from.street11: no class 'thnig'; did you mean 'thing'?"),
        (TINY.replace("[vehicle]", "[road]"), "from.street11: 'road' is given to more than one class"),
        (TINY.replace("thing: [0", "ignore: [0"), "`ignore` is not a class"),
        (TINY.replace("name: tiny", "nam: tiny"), "nam: unknown key; did you mean 'name'?"),
        ("name: x\nclasses: {}\n", "classes: dictionary should have at least 1 item"),
        ("name: x\nclasses: {" + ", ".join(f"c{i}: [0, 0, 0]" for i in range(255)) + "}\n", "at most 254 items"),
    ],
)
def test_mistakes_in_a_label_space(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_taxonomy(path)
    assert message in str(caught.value)
    assert path in str(caught.value)


def test_unknown_label_space() -> None:
    with pytest.raises(ConfigError, match=r"no label space 'street1'; did you mean 'street11'\?"):
        load_taxonomy("street1")


# ---------------------------------------------------------------------------------------------------- label maps


def test_ids_and_colours() -> None:
    rules = LabelMap(domain(), street())
    ids = rules.apply(np.array([[6, 7, 10], [0, 3, 7]], np.uint8), FILE)
    assert ids.dtype == np.uint8
    assert ids.tolist() == [[0, 0, 10], [IGNORE, IGNORE, 0]]
    colours = np.array([[[0, 0, 142], [0, 0, 0]]], np.uint8)
    assert rules.apply(colours, FILE).tolist() == [[10, IGNORE]]


def test_class_that_the_run_does_not_list_is_ignored(tmp_path: Path) -> None:
    tiny = load_taxonomy(written(tmp_path, TINY))
    rules = domain(map={"road": 7, "sidewalk": 8, "sky": 13, "vehicle": 10, "ignore": 0})
    result = LabelMap(rules, tiny).apply(np.array([[7, 8, 13, 10, 0]], np.uint8), FILE)
    assert result.tolist() == [[0, 0, IGNORE, 1, IGNORE]]


def test_merged_classes() -> None:
    rules = domain("cityscapes19", map={"person": 24, "rider": 25, "bicycle": 33, "terrain": 22, "train": 31})
    raw = np.array([[24, 25, 33, 22, 31]], np.uint8)
    assert LabelMap(rules, street()).apply(raw, FILE).tolist() == [[9, 9, 10, 7, 10]]
    assert LabelMap(rules, load_taxonomy("camvid11")).apply(raw, FILE).tolist() == [[9, 10, 10, 5, 8]]
    assert LabelMap(rules, load_taxonomy("cityscapes16")).apply(raw, FILE).tolist() == [[10, 11, 15, 255, 255]]
    assert LabelMap(rules, load_taxonomy("cityscapes13")).apply(raw, FILE).tolist() == [[7, 8, 12, 255, 255]]


def test_camvid_as_street11_and_cityscapes19() -> None:
    names = load_taxonomy("camvid11").classes
    rules = domain("camvid11", map={name: number for number, name in enumerate(names)})
    raw = np.arange(11, dtype=np.uint8)[None]
    street_ids = [8, 2, 5, 0, 1, 7, 6, 4, 10, 9, 255]
    assert LabelMap(rules, street()).apply(raw, FILE).tolist() == [street_ids]
    city_ids = [10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 18]
    assert LabelMap(rules, load_taxonomy("cityscapes19")).apply(raw, FILE).tolist() == [city_ids]


def test_unmapped_value_says_which_where_and_how_often() -> None:
    raw = np.array([[6, 99, 99], [99, 42, 0]], np.uint8)
    rules = LabelMap(domain(), street())
    assert rules.unmapped(raw) == {99: 3, 42: 1}
    with pytest.raises(DataError) as caught:
        rules.apply(raw, FILE)
    assert str(caught.value) == (
        "masks/a.png: values 99 (3 pixels), 42 (1 pixel) not in `map` of mine; add the values to a class or to `ignore`"
    )


def test_unmapped_colour() -> None:
    raw = np.array([[[0, 0, 142], [1, 2, 3]]], np.uint8)
    rules = LabelMap(domain(), street())
    assert rules.unmapped(raw) == {(1, 2, 3): 1}
    with pytest.raises(DataError, match=r"a\.png: value \[1, 2, 3\] \(1 pixel\) not in `map` of mine"):
        rules.apply(raw, FILE)


@pytest.mark.parametrize("value", [-1, 5, 8, 11, 12, 254, 255, 256, 65535, 2**31 - 1])
def test_values_beside_the_table_are_unmapped(value: int) -> None:
    rules = LabelMap(domain(), street())
    assert rules.unmapped(np.array([[value, 6]], np.int32)) == {value: 1}


def test_everything_mapped_is_nothing_unmapped() -> None:
    assert LabelMap(domain(), street()).unmapped(np.full((3, 4), 7, np.uint8)) == {}


def test_sixteen_bit_ids() -> None:
    rules = LabelMap(domain(map={"road": 26000, "sky": 7}), street())
    assert rules.apply(np.array([[26000, 7]], np.uint16), FILE).tolist() == [[0, 8]]


def test_wrong_kind_of_label_file() -> None:
    only_ids = LabelMap(domain(map={"road": 7}), street())
    with pytest.raises(DataError, match=r"a\.png: holds colours but `map` lists only ids: set `channel`"):
        only_ids.apply(np.zeros((2, 2, 3), np.uint8), FILE)
    only_colours = LabelMap(domain(map={"road": [[1, 2, 3]]}), street())
    with pytest.raises(DataError, match=r"a\.png: holds one id per pixel but `map` lists only colours"):
        only_colours.apply(np.zeros((2, 2), np.uint8), FILE)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"raod": 7}, "mine.map: no class 'raod' in street11; did you mean 'road'?"),
        ({"road": 7, "sky": [8, 7]}, "mine.map: 7 is under 'road' and 'sky'"),
        ({"road": [[1, 2, 3]], "sky": [[1, 2, 3]]}, "mine.map: [1, 2, 3] is under 'road' and 'sky'"),
        ({"road": -1}, "mine.map: -1 is outside 0..65535"),
        ({"road": 65536}, "mine.map: 65536 is outside 0..65535"),
        ({"road": [[1, 2, 256]]}, "mine.map: [1, 2, 256] is outside 0..255"),
        ({}, "mine.map: missing; list the ids or colours of the label files by class"),
    ],
)
def test_mistakes_in_a_map(rules: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LabelMap(domain(map=rules), street())
    assert str(caught.value) == message


def test_domain_without_labels_needs_no_map() -> None:
    LabelMap(domain(labels=None, map={}), street())


def test_no_way_between_label_spaces_lists_the_choices() -> None:
    with pytest.raises(ConfigError) as caught:
        LabelMap(domain(), load_taxonomy("cityscapes19"))
    message = str(caught.value)
    assert "no rule leads from its label space street11 to cityscapes19" in message
    assert "which can be made from: camvid11" in message
    assert "Label spaces that can be made from street11: street11." in message


def test_rule_that_names_an_unknown_class_of_the_other_space(tmp_path: Path) -> None:
    tiny = load_taxonomy(written(tmp_path, TINY.replace("[vehicle]", "[vehicles]")))
    with pytest.raises(ConfigError, match=r"tiny, from\.street11: no class 'vehicles'; did you mean 'vehicle'\?"):
        LabelMap(domain(), tiny)


def test_pickled_without_its_tables() -> None:
    rules = LabelMap(domain(), street())
    raw = np.array([[[0, 0, 142]]], np.uint8)
    rules.apply(raw, FILE)
    content = pickle.dumps(rules)
    assert len(content) < 2000
    assert pickle.loads(content).apply(raw, FILE).tolist() == [[10]]


@settings(max_examples=40, deadline=None)
@given(
    rules=st.dictionaries(
        st.one_of(st.integers(0, 65535), st.tuples(*[st.integers(0, 255)] * 3)), st.integers(0, 11), min_size=1
    ),
    data=st.data(),
)
def test_agrees_with_a_lookup_pixel_by_pixel(rules: dict[object, int], data: st.DataObject) -> None:
    names = [*street().classes, "ignore"]
    by_class: dict[str, list[object]] = {}
    for value, number in rules.items():
        by_class.setdefault(names[number], []).append(value)
    config = domain(map=by_class)
    values = data.draw(st.lists(st.sampled_from(sorted(rules, key=str)), min_size=1, max_size=12))
    kind = [value for value in values if isinstance(value, type(values[0]))]
    raw = np.array([kind], np.uint16 if isinstance(kind[0], int) else np.uint8)
    expected = [255 if rules[value] == 11 else rules[value] for value in kind]
    assert LabelMap(config, street()).apply(raw, FILE).tolist() == [expected]
