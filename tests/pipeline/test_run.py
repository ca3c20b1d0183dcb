"""A chain of stages: what is done, what is kept, and what a plan, a failure or a second run leaves behind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from tiny_run import CPU, QUIET, loaded, make_world, raw_run, run_file
from udas.data.batch import Stream
from udas.errors import ConfigError, DataError, RunError
from udas.pipeline import run as pipeline
from udas.pipeline.config import RunConfig, build_run, load_run
from udas.pipeline.context import Context
from udas.pipeline.plan import _data, plan, settings
from udas.pipeline.run import run, show_plan
from udas.pipeline.stages import train_streams

FIRST = {
    "first": {"method": {"name": "supervised"}, "streams": ["source"], "training": {"augment": {"crop": [32, 32]}}}
}
SECOND = {"labels": {"kind": "label", "model": "first", "rule": {"views": 1, "threshold": 0.0}}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `FIRST` and `SECOND`; nothing may write there."""
    folder = tmp_path_factory.mktemp("finished")
    run(configured(world, folder), folder, CPU, QUIET)
    return folder


def configured(world: Path, folder: Path, *overrides: str) -> RunConfig:
    return loaded(run_file(folder / "file.yaml", world, FIRST | SECOND), *overrides)


def actions(config: RunConfig, folder: Path) -> dict[str, str]:
    return {item.name: str(item.action) for item in plan(Context(config, folder, CPU))}


def manifest(folder: Path, stage: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / stage / "manifest.json").read_text())
    return content


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything below `folder`."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------------------- plan


def test_a_new_run_starts_and_a_finished_one_is_reused(world: Path, finished: Path, tmp_path: Path) -> None:
    names = ["first", "evaluate_first", "labels"]
    assert actions(configured(world, tmp_path), tmp_path / "new") == dict.fromkeys(names, "start")
    assert actions(configured(world, tmp_path), finished) == dict.fromkeys(names, "reuse")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps=3", ["restart", "restart", "restart"]),
        ("seed=1", ["restart", "restart", "restart"]),
        ("stages.labels.rule.views=2", ["reuse", "reuse", "restart"]),
        ("protocol={flips: true}", ["reuse", "restart", "reuse"]),
        ("data.target.labelled=none", ["reuse", "reuse", "reuse"]),  # the stage trains on synthetic labels only
        ("logging.every=7", ["reuse", "reuse", "reuse"]),
        ("stages.first.title=another", ["reuse", "reuse", "reuse"]),
        ("runtime.workers=3", ["reuse", "reuse", "reuse"]),
    ],
)
def test_what_a_change_makes_again(
    world: Path, finished: Path, tmp_path: Path, override: str, expected: list[str]
) -> None:
    assert list(actions(configured(world, tmp_path, override), finished).values()) == expected


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["training.steps=3"], {"first": "training.steps 2 -> 3", "labels": "model is made again"}),
        (["seed=1"], {"first": "seed 0 -> 1"}),
        (["stages.labels.rule.views=2"], {"labels": "rule.views 1 -> 2"}),
        (["data.source.size=[40, 40]"], {"first": "other data: source"}),
        (
            ["training.steps=3", "training.batch=3", "network.encoder=resnet34", "seed=1"],
            {"first": 'seed 0 -> 1, network.encoder "test_resnet" -> "resnet34", 2 more'},
        ),
    ],
)
def test_a_plan_says_what_is_other(
    world: Path, finished: Path, tmp_path: Path, overrides: list[str], why: dict[str, str]
) -> None:
    planned = {item.name: item.why for item in plan(Context(configured(world, tmp_path, *overrides), finished, CPU))}
    assert {name: planned[name] for name in why} == {
        name: f"{text}; the old folder is moved aside" for name, text in why.items()
    }


@pytest.mark.parametrize("content", [None, "{", "same"])
def test_a_folder_that_does_not_say_what_it_was_made_from(
    world: Path, finished: Path, tmp_path: Path, content: str | None
) -> None:
    """Of an older version, damaged, or not of the manifest beside it."""
    folder, context = tmp_path / "run", Context(configured(world, tmp_path, "training.steps=3"), tmp_path / "run", CPU)
    shutil.copytree(finished, folder)
    note = folder / "first" / "made_from.json"
    note.unlink()
    if content:
        note.write_text(json.dumps(plan(context)[0].made_from) if content == "same" else content)
    assert plan(context)[0].why == "configuration, data or an earlier stage changed; the old folder is moved aside"


def test_settings_that_came_later_leave_old_fingerprints_alone() -> None:
    """What a run's stages were told when format 1 was new; a change here makes everybody's finished work again."""
    golden = Path(__file__).parents[1] / "golden"
    known = json.loads((golden / "settings.json").read_text())
    stages = load_run(str(golden / "settings.yaml")).stages
    assert {name: settings(stages[name]) for name in known} == known


def test_unfinished_stages_resume_and_folders_of_unknown_origin_are_not_used(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    for stage, content in (("first", manifest(finished, "first") | {"state": "running"}), ("labels", None)):
        (tmp_path / stage).mkdir()
        if content:
            (tmp_path / stage / "manifest.json").write_text(json.dumps(content))
    planned = actions(configured(world, tmp_path), tmp_path)
    assert planned == {"first": "resume", "evaluate_first": "start", "labels": "restart"}


def test_a_plan_tells_and_writes_nothing(world: Path, finished: Path, tmp_path: Path) -> None:
    config, out = configured(world, tmp_path, "stages.labels.rule.views=2"), io.StringIO()
    before = files(finished) | files(world) | files(tmp_path)
    show_plan(config, finished, CPU, Console(file=out, width=200))
    show_plan(config, tmp_path / "new", CPU, Console(file=out, width=200))
    assert files(finished) | files(world) | files(tmp_path) == before
    text = out.getvalue()
    assert re.search(r"first +│ reuse +│ finished +│", text)
    assert "rule.views 1 -> 2; the old folder is moved aside" in text
    assert "not there yet" in text


# ------------------------------------------------------------------------------------------------------ carrying out


def test_a_finished_run_is_not_touched_but_for_its_report(world: Path, finished: Path) -> None:
    before = {p: s for p, s in files(finished).items() if Path(p).is_file() and Path(p).parent != finished}
    run(configured(world, finished), finished, CPU, QUIET)
    after = files(finished)
    assert {path: after[path] for path in before} == before


def test_results_are_written_with_every_stages_manifest(finished: Path) -> None:
    assert {manifest(finished, stage)["state"] for stage in ("first", "evaluate_first", "labels")} == {"done"}
    assert manifest(finished, "evaluate_first")["uses"] == {"model": "first"}
    assert (manifest(finished, "first")["method"], manifest(finished, "first")["steps"]) == ("supervised", 2)
    assert yaml.safe_load((finished / "run.yaml").read_text())["stages"].keys() == {"first", "evaluate_first", "labels"}
    assert json.loads((finished / "results.json").read_text())
    assert (finished / "report.html").stat().st_size > 1000


def test_a_new_title_renames_a_finished_stage_and_nothing_else(world: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = manifest(folder, "first")
    run(configured(world, folder, "stages.first.title=a better name"), folder, CPU, QUIET)
    assert manifest(folder, "first") == before | {"title": "a better name"}
    assert "a better name" in (folder / "results.txt").read_text()


def test_a_changed_configuration_moves_the_old_work_aside(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def train(context: Context, name: str, stage: Any, folder: Path) -> None:
        steps.append(stage.training.steps)
        (folder / "work").write_text(str(stage.training.steps))

    replace_runners(monkeypatch, train=train)
    for count in (2, 3, 2):
        run(configured(world, tmp_path, f"training.steps={count}"), tmp_path, CPU, QUIET)
    assert steps == [2, 3, 2]
    kept = {place: (tmp_path / place / "work").read_text() for place in ("first", "old/first.0", "old/first.1")}
    assert kept == {"first": "2", "old/first.0": "2", "old/first.1": "3"}
    shutil.rmtree(tmp_path / "old/first.0")
    run(configured(world, tmp_path, "training.steps=4"), tmp_path, CPU, QUIET)
    assert [(tmp_path / "old" / name / "work").read_text() for name in ("first.0", "first.1")] == ["2", "3"]


def replace_runners(monkeypatch: pytest.MonkeyPatch, **runners: Any) -> None:
    """Stages that do nothing, except for those given."""
    nothing = dict.fromkeys(pipeline.RUNNERS, lambda *_: None)
    monkeypatch.setattr(pipeline, "RUNNERS", nothing | runners)
    monkeypatch.setattr(pipeline, "write_results", lambda folder: folder / "report.html")


def test_a_failing_stage_stops_the_run_and_costs_no_finished_work(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, broken = [], [True]

    def train(context: Context, name: str, stage: Any, folder: Path) -> None:
        done.append(name)

    def evaluate(context: Context, name: str, stage: Any, folder: Path) -> None:
        done.append(name)
        if broken.pop():
            raise DataError("val/3.png: cannot be read")

    replace_runners(monkeypatch, train=train, evaluate=evaluate)
    config = configured(world, tmp_path)
    with pytest.raises(DataError, match=r"val/3\.png"):
        run(config, tmp_path, CPU, QUIET)
    assert done == ["first", "evaluate_first"]
    noted = manifest(tmp_path, "evaluate_first")
    assert (noted["state"], noted["error"]) == ("failed", "val/3.png: cannot be read")
    assert actions(config, tmp_path) == {"first": "reuse", "evaluate_first": "resume", "labels": "start"}
    broken.append(False)
    run(config, tmp_path, CPU, QUIET)
    assert done == ["first", "evaluate_first", "evaluate_first"]
    assert "error" not in manifest(tmp_path, "evaluate_first")
    assert set(actions(config, tmp_path).values()) == {"reuse"}


def test_a_second_run_in_the_same_folder_is_refused(world: Path, tmp_path: Path) -> None:
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RunError, match=r"another udas process is running in this folder"):
            run(configured(world, tmp_path), tmp_path, CPU, QUIET)
        other.communicate(b"\n")
    assert not (tmp_path / "run.yaml").exists()


def test_the_lock_of_a_killed_run_does_not_outlive_it_in_its_loaders(tmp_path: Path) -> None:
    """A loader process is a copy that goes on for seconds after its parent was killed."""
    killed = os.fork()
    if killed == 0:
        with pipeline._locked(tmp_path, CPU):
            if os.fork() == 0:
                time.sleep(3)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(killed, 0)
    with pipeline._locked(tmp_path, CPU):
        assert (tmp_path / ".lock").exists()


def test_an_output_folder_that_cannot_be_made_is_an_error_of_the_user(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/run: the output folder cannot be written .* choose another with --out"):
        run(configured(world, tmp_path), tmp_path / "file" / "run", CPU, QUIET)


# ----------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("streams", [["pseudo", "labelled"], ["pseudo"]])
def test_a_student_that_sees_real_labels_has_them_among_the_pseudo_labels(
    world: Path, finished: Path, streams: list[str]
) -> None:
    student = {"student": {"method": {"name": "supervised"}, "streams": streams, "pseudo": "labels"}}
    context = Context(build_run(raw_run(world, FIRST | SECOND | student), "file"), finished, CPU)
    given = train_streams(context, "student", context.config.stages["student"])
    granted = {picture.name for picture in context.labelled(context.config.stages["student"]).pictures}
    pseudo = given[Stream.PSEUDO]
    assert 0 < len(granted) < len(pseudo)
    truth = context.target.labelled("train", "all")
    for index, picture in enumerate(pseudo.pictures):
        real = picture.name in granted and "labelled" in streams
        made = torch.from_numpy(np.array(Image.open(finished / "labels/labels" / f"{picture.name}.png")))
        assert torch.equal(pseudo.label(index), truth.label(index) if real else made)
        assert not torch.equal(truth.label(index), made)


def test_real_labels_among_pseudo_labels_are_part_of_the_fingerprint(world: Path, finished: Path) -> None:
    prints = []
    for streams in (["pseudo"], ["pseudo", "labelled"]):
        student = {"student": {"method": {"name": "supervised"}, "streams": streams, "pseudo": "labels"}}
        context = Context(build_run(raw_run(world, FIRST | SECOND | student), "file"), finished, CPU)
        prints.append(_data(context, "student", context.config.stages["student"])[Stream.PSEUDO])
    assert prints[0] != prints[1]


def test_repainting_by_amplitudes_depends_on_the_pictures_they_are_of(world: Path, tmp_path: Path) -> None:
    prints = []
    for size in ([40, 40], [48, 48]):
        raw = raw_run(world, FIRST | {"repainted": {"kind": "translate", "fourier": {}}})
        raw["data"]["target"]["size"] = size
        context = Context(build_run(raw, "file"), tmp_path, CPU)
        prints.append(_data(context, "repainted", context.config.stages["repainted"]))
    assert prints[0]["source"] == prints[1]["source"]
    assert prints[0]["unlabelled"] != prints[1]["unlabelled"]


# ----------------------------------------------------------------------------------------------------------- rounds


def rounds(**changes: Any) -> dict[str, Any]:
    student = {"method": {"name": "supervised"}, "streams": ["pseudo"]}
    return {"kind": "rounds", "rounds": 2, "model": "first", "student": student} | changes


def expanded(world: Path, **changes: Any) -> RunConfig:
    raw = raw_run(world, FIRST | {"student": rounds(**changes)})
    return build_run(raw, "file")


def test_rounds_are_labels_and_students_by_turns(world: Path) -> None:
    config = expanded(world, label={"views": 2}, title="ours")
    assert list(config.stages) == [
        "first", "evaluate_first",
        "student_label_1", "student_1", "evaluate_student_1",
        "student_label_2", "student_2", "evaluate_student_2",
    ]  # fmt: skip
    stages: dict[str, Any] = config.stages
    assert [stages[name].model for name in ("student_label_1", "student_label_2")] == ["first", "student_1"]
    assert [stages[name].pseudo for name in ("student_1", "student_2")] == ["student_label_1", "student_label_2"]
    assert stages["student_label_2"].rule.views == 2
    assert stages["student_1"].start is None
    assert stages["evaluate_student_2"].title == "ours, round 2"
    assert stages["student_1"].network.encoder == "test_resnet"


def test_students_may_start_from_their_teacher_or_from_one_stage(world: Path) -> None:
    student = rounds()["student"]
    teacher: dict[str, Any] = expanded(world, student=student | {"start": "teacher"}).stages
    first: dict[str, Any] = expanded(world, student=student | {"start": "first"}).stages
    assert [teacher[name].start for name in ("student_1", "student_2")] == ["first", "student_1"]
    assert [first[name].start for name in ("student_1", "student_2")] == ["first", "first"]


def test_rounds_may_label_easy_pictures_alone_and_by_prototypes(world: Path) -> None:
    chain = {
        "ranking": {"kind": "rank", "model": "first"},
        "means": {"kind": "prototypes", "model": "first"},
        "student": rounds(easy="ranking", prototypes="means", student=rounds()["student"] | {"start": "teacher"}),
    }
    stages: dict[str, Any] = build_run(raw_run(world, FIRST | chain), "file").stages
    for name in ("student_label_1", "student_label_2"):
        assert (stages[name].easy, stages[name].prototypes) == ("ranking", "means")


def test_mistakes_in_rounds_are_named(world: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build_run(raw_run(world, {"student": {"kind": "rounds", "rounds": 1, "modell": "first"}}), "file")
    assert set(str(caught.value).splitlines()[1:]) == {
        "  stages.student.modell: unknown key; did you mean 'model'?",
        "  stages.student.model: missing",
        "  stages.student.student: missing",
    }


def test_a_stage_can_only_build_on_an_earlier_one_of_the_right_kind(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages.student.model: 'frist' is not an earlier train stage"):
        expanded(world, model="frist")


def test_a_stage_stopped_by_the_keyboard_is_said_to_be_stopped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(context: Context, name: str, stage: Any, folder: Path) -> None:
        raise KeyboardInterrupt

    replace_runners(monkeypatch, train=train)
    config = configured(world, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, CPU, QUIET)
    assert manifest(tmp_path, "first")["state"] == "stopped"
    assert actions(config, tmp_path)["first"] == "resume"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{}", b"[]", b"{"])
def test_a_manifest_that_cannot_be_read_costs_its_stage_alone(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    replace_runners(monkeypatch)
    config = configured(world, tmp_path)
    run(config, tmp_path, CPU, QUIET)
    (tmp_path / "first" / "manifest.json").write_bytes(content)
    assert actions(config, tmp_path) == {"first": "restart", "evaluate_first": "reuse", "labels": "reuse"}


def test_other_content_of_a_weights_file_restarts_what_starts_from_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_runners(monkeypatch)
    monkeypatch.setattr(pipeline, "rehearse", lambda *_: None)  # the file need not fit
    weights = tmp_path / "encoder.safetensors"
    weights.write_bytes(b"one")
    config = configured(world, tmp_path, f"network.weights={weights}")
    run(config, tmp_path / "run", CPU, QUIET)
    assert set(actions(config, tmp_path / "run").values()) == {"reuse"}
    weights.write_bytes(b"two")
    assert actions(config, tmp_path / "run")["first"] == "restart"


def test_a_plan_says_what_the_run_would_find_wrong(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages.evaluate_first: the target has no split 'valid' to score on"):
        show_plan(configured(world, tmp_path, "data.val_split=valid"), tmp_path / "run", CPU, QUIET)
    assert not (tmp_path / "run").exists()
