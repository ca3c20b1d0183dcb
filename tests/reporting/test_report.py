"""The report shows what a run holds, in one file, whatever is missing; and a browser can show it."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reporting.run_folder import (
    CLASSES,
    NAMES,
    add_evaluation,
    add_labels,
    add_train,
    add_translation,
    coloured,
    full_run,
    manifest,
    photographed,
    save,
    scene,
)
from udas.errors import RunError
from udas.reporting import write_report
from udas.reporting.pictures import WIDTH, class_map, confidence_map
from udas.reporting.plots import POINTS, thin
from udas.reporting.read import Budget, read_runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_run(tmp_path_factory.mktemp("runs") / "night_city")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report([run], run.parent / "report.html").read_text()


def report(tmp_path: Path, *runs: Path) -> str:
    return write_report(list(runs), tmp_path / "out" / "report.html").read_text()


class Cells(HTMLParser):
    """Rows of one section: lists of (tag, class, text) by table row."""

    def __init__(self, section: str) -> None:
        super().__init__()
        self.section, self.inside, self.rows, self.open = section, False, [], False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "section":
            self.inside = given.get("id") == self.section
        if self.inside and tag == "tr":
            self.rows.append([])
        if self.inside and tag in ("td", "th"):
            self.rows[-1].append([tag, given.get("class") or "", ""])
            self.open = True
        if self.open and tag == "mark":
            self.rows[-1][-1][1] += " marked"

    def handle_endtag(self, tag: str) -> None:
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.open:
            self.rows[-1][-1][2] += data


def rows(page: str, section: str) -> list[list[list[str]]]:
    parser = Cells(section)
    parser.feed(page)
    return parser.rows


# ------------------------------------------------------------------------------------------------------ the promises


def test_results_hold_every_model_with_the_best_of_each_column_marked(run: Path, page: str) -> None:
    header, *body = rows(page, "results")
    assert [cell[2] for cell in header[6:]] == NAMES
    assert [row[0][2] for row in body] == ["Source only", "Teacher", "Student 1"]
    models = ("source_only", "teacher", "student_1")
    stored = [json.loads((run / f"evaluate_{model}/evaluation.json").read_text()) for model in models]
    for row, result in zip(body, stored, strict=True):
        assert row[2][2].split()[0] == f"{100 * result['miou']:.1f}"
        assert f"{100 * result['interval'][0]:.1f} – {100 * result['interval'][1]:.1f}" in row[2][2]
        assert row[3][2] == f"{100 * result['pixel_accuracy']:.1f}"
        assert [c[2] for c in row[6:]] == ["–" if v is None else f"{100 * v:.1f}" for v in result["iou"].values()]
    assert [[cell[2] for cell in row[4:6]] for row in body] == [["3,000", "0.25"], ["3,000", "0.25"], ["6,000", "0.25"]]
    for column, name in enumerate(NAMES[:-1], start=6):
        best = max(result["iou"][name] for result in stored)
        assert [("marked" in row[column][1]) for row in body] == [result["iou"][name] == best for result in stored]
    assert not any("marked" in row[-1][1] for row in body), "a class that nobody has is nobody's best"


def test_one_model_alone_is_not_called_best(tmp_path: Path) -> None:
    add_evaluation(tmp_path / "run", "teacher", 0.3, pictures=1)
    assert not any("marked" in cell[1] for row in rows(report(tmp_path, tmp_path / "run"), "results") for cell in row)


def test_models_measured_differently_stand_in_different_tables(tmp_path: Path) -> None:
    for model, protocol in (("a", "whole"), ("b", "whole"), ("c", "slide")):
        add_evaluation(tmp_path / "run", model, 0.3, pictures=1, protocol=protocol)
    found = rows(report(tmp_path, tmp_path / "run"), "results")
    assert [row[0][2] for row in found] == [
        "frankfurt · val · whole · 500 pictures",
        "A",
        "B",
        "frankfurt · val · slide · 500 pictures",
        "C",
    ]


def test_stages_come_in_order_with_duration_and_what_they_used(page: str) -> None:
    body = {row[0][2]: [cell[2] for cell in row[1:]] for row in rows(page, "stages")[1:]}
    wanted = ["Stylestyle", "Translatetranslate", "Source onlysource_only", "Teacherteacher", "Label 1label_1"]
    assert [title for title in body if title in wanted] == wanted
    assert body["Student 1student_1"][:7] == [
        "done",
        "train",
        "supervised",
        "labels label_1, start teacher",
        "3,000",
        "4",
        "1 h 12 min",
    ]
    assert all(text in page for text in ("NVIDIA L4", "2.11.0", "streets_camera"))


def test_the_steps_of_a_model_are_those_of_all_trainings_behind_it(tmp_path: Path) -> None:
    add_train(tmp_path, "teacher", 0.5, steps=300)
    add_train(tmp_path, "student", 0.6, steps=600, uses={"start": "teacher"})
    add_evaluation(tmp_path, "student", 0.2)
    add_evaluation(tmp_path, "both", 0.2)
    manifest(tmp_path / "evaluate_both", "evaluate", uses={"model": ["teacher", "student"]})
    [run] = read_runs([tmp_path])
    student, both = (next(s for s in run.stages if s.manifest.stage == f"evaluate_{n}") for n in ("student", "both"))
    assert run.budget(student) == Budget(900, 0.25)
    assert run.budget(both) is None  # an ensemble has none of its own


def test_confusion_is_normalised_by_row(run: Path, page: str) -> None:
    counts = np.array(json.loads((run / "evaluate_source_only/evaluation.json").read_text())["confusion"])
    first = rows(page, "confusion")[1 : 1 + len(NAMES)]
    for row, truth in zip(first[:-1], counts[:-1], strict=True):
        expected = [f"{100 * share:.0f}" if share >= 0.005 else "" for share in truth / truth.sum()]
        assert [cell[2] for cell in row[1:]] == expected
    assert all(cell[1] == "none" for cell in first[-1][1:])


def test_pictures_stand_beside_each_other_once_per_stage(page: str) -> None:
    header, *scenes = rows(page, "pictures")
    titles = [re.sub(r"(prediction|pseudo-label).*", "", cell[2]) for cell in header[1:]]
    assert titles == ["Source only", "Teacher", "Label 1", "Student 1"]
    assert len(scenes) == 3, "the label stage's smaller copies are recognised as the same pictures"
    assert [row[0][2].split()[0] for row in scenes] == ["frankfurt/000000", "frankfurt/000001", "frankfurt/000002"]
    section = page[page.index('<section id="pictures">') : page.index('<section id="pseudo-labels">')]
    assert section.count("<img") == 3 * (2 + 4 * 2)


def test_pseudo_labels_show_shares_and_quality(page: str) -> None:
    shown = {cell[2] for row in rows(page, "pseudo-labels") for cell in row}
    for expected in (
        "share of the class's pixels kept",
        "73.4",
        "90.0",
        "quality: iou",
        "threshold",
        "coverage",
        "70.5",
        "95.1",
    ):
        assert expected in shown


def test_repainted_pictures_stand_beside_their_originals(page: str) -> None:
    section = page[page.index('<section id="repainted">') : page.index('<section id="machine">')]
    assert re.findall(r'alt="(\w+)"', section) == ["original", "repainted"] * 3


def test_every_training_has_its_curves(page: str) -> None:
    section = page[page.index('<section id="curves">') : page.index('<section id="confusion">')]
    assert section.count('<svg aria-hidden="true"') == 1 + 4 + 3 + 3 + 1
    assert [cell[2] for row in rows(page, "curves")[1:] for cell in row[:1]] == ["Source only", "Teacher", "Student 1"]
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "two curves with one id would clip each other"


def test_the_file_needs_nothing_from_outside(page: str) -> None:
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\((?!#)", re.sub(r"base64,[\w+/=]+", "", page))
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))


def test_text_of_the_run_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&$\"'"
    run = tmp_path / "run"
    add_train(run, "teacher", 0.5, steps=300, title=evil, machine={evil: evil}, uses={evil: evil}, fingerprint=evil)
    (run / "teacher/log.jsonl").write_text(json.dumps({"step": 1, "losses": {evil: 1.0}}))
    add_evaluation(run, "teacher", 0.3, 1, split=evil, shown=[evil], classes=[evil, *NAMES[1:]], protocol={evil: evil})
    (run / "run.yaml").write_text(json.dumps({"name": evil, "data": {"source": evil}}))
    page = report(tmp_path, run)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 8


@pytest.mark.parametrize("kind", ["train", "evaluate", "label", "translate"])
def test_a_run_of_one_stage(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    add = {"train": lambda: add_train(run, "teacher", 0.5), "translate": lambda: add_translation(run)}
    add["evaluate"] = lambda: add_evaluation(run, "t", 0.3, 1)
    add["label"] = lambda: add_labels(run, "label", "t", 0.3, 1)
    add[kind]()
    (run / "run.yaml").write_text("name: one\n")
    page = report(tmp_path, run)
    assert "could not show" not in page
    wanted = {"train": "curves", "evaluate": "results", "label": "pseudo-labels", "translate": "repainted"}
    assert [name for name in wanted.values() if f'<section id="{name}">' in page] == [wanted[kind]]


def test_unfinished_stages_are_shown_as_such(tmp_path: Path) -> None:
    run = tmp_path / "run"
    add_train(run, "teacher", 0.5, state="running", seconds=None)
    manifest(run / "label_1", "label", state="failed", seconds=None, error="a/<b>.png: cannot be read")
    (run / "run.yaml").write_text("name: one\n")
    page = report(tmp_path, run)
    shown = [row[1][2] for row in rows(page, "stages")[1:]]
    assert shown == ["faileda/<b>.png: cannot be read", "running"]
    assert 'class="badge failed"' in page
    assert "could not show" not in page


def test_broken_and_missing_files_are_named_and_the_rest_is_shown(tmp_path: Path, run: Path) -> None:
    copy = tmp_path / "torn"
    shutil.copytree(run, copy)
    (copy / "evaluate_teacher/evaluation.json").write_text('{"split": "val"')
    (copy / "label_1/statistics.json").unlink()
    (copy / "run.yaml").write_text("a: [")
    (copy / "translate/manifest.json").write_text("{}")
    picture = copy / "evaluate_student_1/pictures/1/prediction.png"
    picture.write_bytes(picture.read_bytes()[:400])
    with (copy / "teacher/log.jsonl").open("a") as log:
        log.write('{"step": 3020, "los')
    page = report(tmp_path, copy)
    notes = page[page.index('id="notes"') : page.index("</section>")]
    for expected in (
        "evaluate_teacher/evaluation.json",
        "label_1/statistics.json: no such file",
        "run.yaml: ",
        "translate/manifest.json: stage",
        "evaluate_student_1/pictures/1/prediction.png: not a readable picture",
        "teacher/log.jsonl: left out what could not be read: line 161",
    ):
        assert expected in notes
    assert [row[0][2] for row in rows(page, "results")[1:]] == ["Source only", "Student 1"]
    assert "not available" in page
    assert '<section id="repainted">' in page


def test_impossible_scores_and_matrices_do_not_reach_the_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    add_evaluation(run, "a", 0.3, 1, confusion=[[1, 2]])
    add_evaluation(run, "b", 0.3, 1, miou=math.nan)
    page = report(tmp_path, run)
    assert "`confusion` is not 7 x 7" in page
    assert rows(page, "results")[1][2][2].split()[0] == "–"


def test_several_runs_prefix_their_rows(tmp_path: Path) -> None:
    for name, wrong in (("plain", 0.4), ("adapted", 0.3)):
        add_evaluation(tmp_path / name, "teacher", wrong, pictures=2)
    page = report(tmp_path, tmp_path / "plain", tmp_path / "adapted")
    assert [row[0][2] for row in rows(page, "results")[1:]] == ["plain · Teacher", "adapted · Teacher"]
    assert len(rows(page, "pictures")) == 1 + 2, "both runs share the pictures"


def test_a_folder_moved_aside_is_not_a_stage(tmp_path: Path) -> None:
    add_train(tmp_path / "run", "teacher", 0.5)
    shutil.copytree(tmp_path / "run/teacher", tmp_path / "run/teacher.1")
    page = report(tmp_path, tmp_path / "run")
    assert len(rows(page, "stages")) == 2
    assert "older version of stage teacher" in page


def test_a_resumed_log_counts_each_step_once(tmp_path: Path) -> None:
    lines = [{"step": s, "losses": {"source": v, "bad": math.nan}} for s, v in ((1, 5.0), (2, 6.0), (2, 1.0), (3, 2.0))]
    add_train(tmp_path / "run", "teacher", 0.5)
    (tmp_path / "run/teacher/log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    log = read_runs([tmp_path / "run"])[0].stages[0].log
    assert log is not None
    assert log.losses == {"source": {1: 5.0, 2: 1.0, 3: 2.0}}


def test_thinning_keeps_the_mean_and_the_range() -> None:
    points = {step: float(step % 7) for step in range(10_000, 0, -1)}
    steps, mean, low, high = thin(points)
    assert (len(steps), steps[-1]) == (POINTS, 10_000)
    assert (np.diff(steps) > 0).all()
    assert mean.mean() == pytest.approx(np.mean(list(points.values())))
    assert (low.min(), high.max()) == (0, 6)


def test_class_colours_survive_shrinking_exactly(tmp_path: Path) -> None:
    save(coloured(scene(1)).resize((2048, 1024), Image.Resampling.NEAREST), tmp_path / "label.png")
    embedded = class_map(tmp_path / "label.png")
    image = Image.open(io.BytesIO(base64.b64decode(embedded.uri.partition(",")[2])))
    assert image.size == (embedded.width, embedded.height) == (WIDTH, WIDTH // 2)
    assert {colour for _, colour in image.convert("RGB").getcolors()} <= set(CLASSES.values())


def test_previews_stand_in_for_a_training_that_nothing_evaluates(tmp_path: Path) -> None:
    for name in ("style", "teacher"):
        add_train(tmp_path / "run", name, 0.5)
        for step in ("0000900", "0001000"):
            save(photographed(scene(1), 1), tmp_path / "run" / name / f"previews/{step}/repainted.png")
    add_evaluation(tmp_path / "run", "teacher", 0.3, 1)
    page = report(tmp_path, tmp_path / "run")
    assert re.findall(r"<h3>(\w+) <small>preview while training, step (\d+)", page) == [("Style", "1000")]


def test_confidence_of_all_stages_has_the_same_colours(tmp_path: Path) -> None:
    save(Image.fromarray(np.full((8, 8), 255, np.uint8)), tmp_path / "grey.png")
    save(Image.fromarray(np.full((8, 8, 3), (253, 231, 37), np.uint8)), tmp_path / "viridis.png")
    for name in ("grey", "viridis"):
        embedded = confidence_map(tmp_path / f"{name}.png")
        pixel = Image.open(io.BytesIO(base64.b64decode(embedded.uri.partition(",")[2]))).getpixel((4, 4))
        assert np.abs(np.subtract(pixel, (253, 231, 37))).max() < 8


def test_missing_run_and_unwritable_place_are_readable_errors(tmp_path: Path, run: Path) -> None:
    with pytest.raises(RunError, match=r"nowhere: no such run folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(RunError, match=r"report\.html: cannot be written"):
        write_report([run], tmp_path / "report.html")
    with pytest.raises(RunError, match="no run folder given"):
        write_report([], tmp_path / "report.html")


def test_a_browser_shows_it(tmp_path: Path, page: str) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium installed")
    (tmp_path / "report.html").write_text(page)
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync hide-scrollbars window-size=1300,1800"
    command = [browser, *(f"--{flag}" for flag in flags.split()), f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--screenshot={tmp_path / 'shot.png'}", (tmp_path / "report.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    assert pixels.shape == (1800, 1300, 3)
    assert len(np.unique(pixels.reshape(-1, 3)[::7], axis=0)) > 50, "nearly one colour: the page is blank"
