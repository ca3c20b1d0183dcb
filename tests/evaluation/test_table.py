from __future__ import annotations

import csv
import io
import json

import pytest

from udas.evaluation.table import save_tables, table


def result(**changed):
    return {
        "split": "val",
        "protocol": "whole: whole picture",
        "pictures": 500,
        "miou": 0.4567,
        "interval": [0.44, 0.47],
        "pixel_accuracy": 0.9,
        "iou": {"road": 0.9134, "sky": 0.0, "train": None},
        "absent": ["train"],
    } | changed


TRAINED = {"steps": 3000, "seconds_per_step": 0.348}
ROWS = [
    ("source [only]", result()),
    ("udas | ours", result(miou=0.5, iou={"road": 1.0, "bus": 0.25}, absent=[], **TRAINED)),
]


def test_text_has_every_class_once_and_says_how_it_was_measured():
    text = table(ROWS)
    lines = {line.split("  ")[0]: line.split()[-2:] for line in text.splitlines()}
    assert [line for line in text.splitlines() if line.startswith("1") and "source [only]" in line and "45.7" in line]
    assert lines["road"] == ["91.3", "100.0"]
    assert lines["train"] == ["-", "-"]
    assert lines["bus"] == ["-", "25.0"]
    assert "source [only]" in text
    assert "44.0 to 47.0" in text
    assert text.count("500 pictures; whole: whole picture") == 1
    assert "source [only]: left out of the mean, in neither labels nor predictions: train" in text
    assert "\x1b" not in text


def test_text_is_never_cut():
    rows = [(f"a rather long title, number {k}", result()) for k in range(30)]
    assert all(title in table(rows) for title, _ in rows)


def test_classes_of_many_results_stay_within_a_terminal():
    lines = table([(str(k), result(miou=k / 100)) for k in range(1, 21)]).splitlines()
    heads = [line.split()[1:] for line in lines if line.startswith("IoU")]
    assert [number for head in heads for number in head] == [str(k) for k in range(1, 21)]
    assert sum(line.startswith("road") for line in lines) == len(heads) == 3
    assert max(len(line) for line in lines if line.startswith(("IoU", "road", "sky"))) <= 80


def test_different_protocols_are_said_line_by_line():
    text = table([("a", result()), ("b", result(protocol="hrda: windows"))])
    assert "a: 500 pictures; whole: whole picture" in text
    assert "b: 500 pictures; hrda: windows" in text


def test_rows_of_one_title_keep_their_own_protocols():
    text = table([("a", result()), ("a", result(protocol="hrda: windows"))])
    assert "whole: whole picture" in text
    assert "hrda: windows" in text


def test_markdown_has_one_line_per_result():
    lines = table(ROWS, "markdown").splitlines()
    assert lines[0] == "|  | mIoU | 95 % interval | pixel accuracy | steps | s/step | road | sky | train | bus |"
    assert lines[2] == "| source [only] | 45.7 | 44.0 to 47.0 | 90.0 | - | - | 91.3 | 0.0 | - | - |"
    assert lines[3].startswith("| udas \\| ours | 50.0 |")
    assert "| 3000 | 0.348 | 100.0 |" in lines[3]
    assert lines[5] == "* 500 pictures; whole: whole picture"


def test_csv_holds_shares_at_full_precision():
    first, second = csv.DictReader(io.StringIO(table(ROWS, "csv")))
    assert float(first["miou"]) == 0.4567
    assert float(first["low"]) == 0.44
    assert first["train"] == ""
    assert first["absent"] == "train"
    assert float(second["bus"]) == 0.25
    assert second["sky"] == ""
    assert second["title"] == "udas | ours"
    assert [(row["steps"], row["seconds_per_step"]) for row in (first, second)] == [("", ""), ("3000", "0.348")]


def test_json_holds_everything():
    assert json.loads(table(ROWS, "json"))[0] == {"title": "source [only]", **result()}


@pytest.mark.parametrize("form", ["text", "json", "csv", "markdown"])
def test_no_results_are_an_empty_table(form):
    assert table([], form)


def test_all_forms_are_written_beside_each_other(tmp_path):
    save_tables(ROWS, tmp_path / "results")
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    forms = {"text": "txt", "json": "json", "csv": "csv", "markdown": "md"}
    assert written == {f"results.{suffix}": table(ROWS, form) for form, suffix in forms.items()}
