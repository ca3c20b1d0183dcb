"""The command line: help without a wait, and errors that are one message naming what is wrong and what to do."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.main import get_command

from tiny_run import NETWORK, described, make_world, raw_run
from udas import cli
from udas.config import NetworkConfig
from udas.data.dataset import load_domain
from udas.data.streets import ensure
from udas.names import METHODS, load_method
from udas.networks import pretrained
from udas.networks.segmenters import build_segmenter
from udas.networks.weights import save_segmenter
from udas.pipeline.config import load_run
from udas.taxonomy import load_taxonomy

GOLDEN = Path(__file__).parent / "golden" / "errors"
TEACHER = {"teacher": {"method": {"name": "supervised"}, "streams": ["source"]}}
STEP = {"training": {"steps": 1, "batch": 6}}


# ------------------------------------------------------------------------------------------------------------ help


HELP = """
import sys
from typer.testing import CliRunner
from udas.cli import app
for command in {commands}:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0, (command, result.output)
    assert "Usage" in result.output, command
heavy = "torch torchvision timm kornia numpy matplotlib segmentation_models_pytorch yaml".split()
print([name for name in heavy if name in sys.modules], sorted(name for name in sys.modules if name.startswith("udas")))
"""


def test_help_of_every_command_imports_nothing_heavy() -> None:
    commands = [[], *([name] for name in get_command(cli.app).commands)]
    assert len(commands) > 10
    done = subprocess.run(
        [sys.executable, "-c", HELP.format(commands=commands)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] ['udas', 'udas.cli', 'udas.errors']"  # pydantic is typer's own import


def test_everything_on_the_command_line_is_described() -> None:
    for name, command in get_command(cli.app).commands.items():
        assert command.help, name
        assert [p.name for p in command.params if not p.help and p.name != "help"] == [], name


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the two tiny domains, for a test to break; also the working directory."""
    shutil.copytree(pristine, tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "world"


def run_with(world: Path, stages: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    """Command line of a run with these changes of its file; `game` and `road` change the two domains."""
    game, road = (described(world, name) | changes.pop(name, {}) for name in ("game", "road"))
    raw = raw_run(world, stages or TEACHER) | STEP | {"data": {"source": game, "target": road}} | changes
    Path("run.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return ["run", "run.yaml", "--out", "out"]


def udas(*arguments: str) -> None:
    """What the entry point does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["udas", *arguments])
        cli.main()


def trained(labels: str = "street11") -> str:
    """A network file."""
    taxonomy = load_taxonomy(labels)
    segmenter = build_segmenter(NetworkConfig.model_validate(NETWORK), len(taxonomy.classes))
    save_segmenter(Path("model.safetensors"), segmenter, taxonomy)
    return "model.safetensors"


def data_file(world: Path, **changes: Any) -> str:
    Path("road.yaml").write_text(yaml.safe_dump(described(world, "road") | changes), encoding="utf-8")
    return "road.yaml"


def cut(path: Path, share: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def finished_run(world: Path) -> list[str]:
    """A run that is done, and the command that would repeat it."""
    command = run_with(world)
    with pytest.raises(SystemExit) as left:
        udas(*command)
    assert left.value.code == 0
    return command


Case = Callable[[Path, pytest.MonkeyPatch], list[str]]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    """Its name is that of the golden file."""
    CASES[make.__name__] = make
    return make


@case
def unknown_keys(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    stages = {
        "teacher": {"method": {"name": "udas", "adverserial": 0.1, "critic": "pach"}, "trainning": {"steps": 3}},
        "students": {"kind": "rounds", "rounds": 2, "model": "teecher", "label": {"view": 3}, "student": {"pseudo": 3}},
        "later": {"kind": "lable", "model": "teacher"},
    }
    road = {"szie": [64, 64], "labelled": {"cuont": 100}}
    return run_with(world, stages, road=road, sede=3, training={"steps": "many", "augment": {"croop": [8, 8]}})


@case
def unknown_references(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(
        world, TEACHER | {"labels": {"kind": "label", "model": "techer"}, "last": TEACHER["teacher"] | {"pseudo": "x"}}
    )


@case
def unknown_run(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["run", "dmeo"]


@case
def unknown_data(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["check", "cityscape"]


@case
def unknown_label_space(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(world, taxonomy="cityscapes18")


@case
def unknown_protocol(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["evaluate", trained(), data_file(world), "--protocol", "prodda"]


@case
def unknown_split(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["evaluate", trained(), data_file(world), "--split", "vla"]


@case
def unknown_network(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(world, TEACHER | {"second": TEACHER["teacher"] | {"network": {"name": "deeplabv2plus"}}})


@case
def unknown_encoder(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(world, network=NETWORK | {"encoder": "resnet_50"})


@case
def unknown_class_in_a_later_stage(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    second = {"method": {"name": "supervised", "class_weights": {"raod": 2}}}
    return run_with(world, TEACHER | {"second": second})


@case
def unknown_foreground(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(world, TEACHER | {"second": {"method": {"name": "cct", "foreground": ["person", "vehicel"]}}})


@case
def missing_foreground(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(world, TEACHER | {"second": {"method": {"name": "cct"}}})


@case
def unknown_background(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(world, TEACHER | {"second": {"method": {"name": "pseudoseg", "background": "backgruond"}}})


@case
def no_labels_for_semi_supervised_training(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(world, TEACHER | {"second": {"method": {"name": "cutmixseg"}, "labelled": "none"}})


@case
def streams_without_a_needed_one(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(world, TEACHER | {"second": {"method": {"name": "fixmatch"}, "streams": ["source", "labelled"]}})


@case
def too_few_pictures_to_mix(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    second = {"method": {"name": "fixmatch"}, "training": {"batch": {"labelled": 2, "unlabelled": 1}}}
    return run_with(world, TEACHER | {"second": second})


@case
def unknown_class_in_a_map(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(world, game={"map": {"road": 7, "sky": 1, "vehicel": 9}})


@case
def unknown_list(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["list", "dat"]


@case
def unknown_name_in_a_list(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["list", "methods", "cutmix_seg"]


@case
def broken_override(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return [*run_with(world), "training.augment.crop=[32, 32"]


@case
def broken_yaml(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    Path("run.yaml").write_text("name: x\nstages:\n  a: {method: {name: udas}\n  b: 1\n")
    return ["run", "run.yaml"]


@case
def missing_file(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["run", "runs/none.yaml"]


@case
def missing_model(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["predict", "runs/none/model.safetensors", str(world)]


@case
def missing_pictures(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["predict", trained(), "nowhere"]


@case
def missing_folder(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(world, game={"root": str(world / "gaem")})


@case
def missing_variable(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.delenv("CITYSCAPES_ROOT", raising=False)
    return ["evaluate", trained(), "cityscapes"]


@case
def missing_label(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (world / "game/labels/train/3.png").unlink()
    return run_with(world)


@case
def missing_stream(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(world, {"student": {"method": {"name": "supervised"}, "streams": ["pseudo"]}})


@case
def truncated_jpeg(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    folder = world / "game/images/train"
    Image.open(folder / "3.png").save(folder / "3.jpg")
    (folder / "3.png").unlink()
    cut(folder / "3.jpg")
    return run_with(world, game={"images": "images/{split}/*"})


@case
def truncated_png(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    cut(world / "game/labels/train/3.png")
    return run_with(world)


@case
def truncated_picture_among_others(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    cut(world / "road/images/val/1.png")
    return ["predict", trained(), str(world / "road/images/val")]


@case
def other_size(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    Image.fromarray(np.full((32, 64), 7, np.uint8)).save(world / "game/labels/train/3.png")
    return run_with(world)


@case
def stray_value(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    label = np.full((64, 64), 7, np.uint8)
    label[:2], label[5, 5] = 200, 13
    Image.fromarray(label).save(world / "game/labels/train/3.png")
    return run_with(world)


@case
def colours_without_a_rule(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(world / "game/labels/train/3.png")
    return run_with(world)


@case
def empty_split(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(world, game={"images": "images/{split}/*.jpg"})


@case
def absent_picture_in_a_list(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (world / "road/labelled.txt").write_text("images/train/1.png\nimages/train/77.png\n")
    return run_with(world, road={"labelled": "labelled.txt"})


@case
def more_labels_than_pictures(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return run_with(world, road={"labelled": {"count": 100}})


@case
def pickled_weights(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    Path("encoder.pth").write_bytes(b"not even opened")
    return run_with(world, network=NETWORK | {"weights": "encoder.pth"})


@case
def hub_out_of_reach(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    def download(*_: str) -> str:
        raise ConnectionError("Name or service not known")

    patch.setattr(pretrained, "hf_hub_download", download)
    return run_with(world, network=NETWORK | {"weights": "hub", "encoder": "resnet18"})


@case
def out_is_not_writable(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    Path("taken").touch()
    return [*run_with(world)[:2], "--out", "taken/run"]


@case
def predictions_are_not_writable(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    Path("taken").touch()
    return ["predict", trained(), str(world / "road/images/val"), "--out", "taken/masks"]


@case
def evaluation_is_not_writable(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    Path("taken").touch()
    return ["evaluate", trained(), data_file(world), "--out", "taken/evaluation"]


@case
def report_of_no_run(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["report", str(world)]


@case
def other_label_space_of_data(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["evaluate", trained("camvid11"), data_file(world)]


@case
def other_label_space_of_model(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    command = finished_run(world)
    Path(trained("camvid11")).replace("out/teacher/model.safetensors")
    shutil.rmtree("out/evaluate_teacher")
    return command


@case
def other_label_space_of_checkpoint(world: Path, patch: pytest.MonkeyPatch) -> list[str]:
    command, stage = finished_run(world), Path("out/teacher")
    with safe_open(stage / "last.safetensors", "pt") as file:
        tensors, meta = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["udas"])  # noqa: SIM118
    classes = [*meta["classes"][:-1], "tram"]
    save_file(tensors, stage / "last.safetensors", {"udas": json.dumps(meta | {"classes": classes})})
    manifest = json.loads((stage / "manifest.json").read_text())
    (stage / "manifest.json").write_text(json.dumps(manifest | {"state": "running"}))
    return command


@pytest.mark.parametrize("name", CASES)
def test_errors_are_golden(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = CASES[name](world, monkeypatch)
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        udas(*command)
    shown = neutral(capsys.readouterr().err, tmp_path)
    assert left.value.code == 1
    assert "Traceback" not in shown
    assert shown == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def neutral(text: str, folder: Path) -> str:
    """Without the place of the test, and without the words of the libraries that decode."""
    text = text.replace(str(folder.resolve()), "TMP").replace(str(folder), "TMP")
    return re.sub(r"(perhaps truncated|not a readable safetensors file) \(.*?\)(?=;|$)", r"\1 (REASON)", text)


def test_every_golden_text_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == CASES.keys()


def test_no_stage_starts_when_a_later_one_has_a_mistake(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mistake in ("unknown_class_in_a_later_stage", "unknown_network"):
        with pytest.raises(SystemExit):
            udas(*CASES[mistake](world, monkeypatch))
        assert not Path("out/teacher").exists()


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Iterator[None]:
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "_load", load)
    with pytest.raises(KeyError):
        udas("run", "demo")


# ------------------------------------------------------------------------------------------------- what commands do


def test_labels_of_another_network_are_not_passed_off_as_this_ones(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["label", trained(), data_file(world), "--views", "1", "--out", "made"]

    def code(*arguments: str) -> object:
        with pytest.raises(SystemExit) as left:
            udas(*arguments)
        return left.value.code

    assert code(*command, "--threshold", "0") == 0
    assert "100% of pixels kept" in capsys.readouterr().out
    assert code(*command, "--threshold", "0") == 0  # goes on with its own
    assert code(*command, "--threshold", "0.9") == 1
    message = "error: made: holds something else, such as labels of another network or rule; choose another --out\n"
    assert capsys.readouterr().err == message
    torch.manual_seed(1)
    trained()
    assert code(*command, "--threshold", "0") == 1
    assert code(*command[:-1], "other", "--threshold", "0.9", "--rule", "constant") == 0
    thresholds = json.loads(Path("other/statistics.json").read_text())["thresholds"]
    assert set(thresholds.values()) == {0.9}


def test_looking_at_the_streets_of_a_run_adds_nothing_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    preset = load_domain("streets_camera").streets
    assert preset is not None
    ensure(preset.model_copy(update={"pictures": {"train": 2, "val": 1}}), Path("mine"))
    before = sorted(Path("mine").rglob("*"))
    with pytest.raises(SystemExit) as left:
        udas("check", "streets_camera", "--root", "mine")
    assert left.value.code == 0
    assert sorted(Path("mine").rglob("*")) == before
    assert "no problems" in capsys.readouterr().out


def test_what_can_be_named_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        udas("list")
    shown = capsys.readouterr().out
    assert left.value.code == 0
    for name in ("demo", "gta5", "street11", "udas", "deeplabv2_multi", "proda"):
        assert re.search(rf"^ *{name} ", shown, re.MULTILINE), name
    assert "AdvEnt on the embedded street world, with each loss, and its mean with MinEnt." in " ".join(shown.split())


def test_a_listed_preset_is_printed_as_a_file_to_begin_with(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        udas("list", "runs", "ssl_demo")
    assert left.value.code == 0
    Path("mine.yaml").write_text(capsys.readouterr().out)
    mine, preset = load_run("mine.yaml"), load_run("ssl_demo")
    assert mine.name == "mine"
    assert mine.stages == preset.stages


@pytest.mark.parametrize("name", METHODS)
def test_a_listed_method_shows_its_formula_and_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        udas("list", "methods", name)
    assert left.value.code == 0
    shown, method = capsys.readouterr().out, load_method(name)
    about, _, settings = shown.partition("method:")
    assert inspect.cleandoc(method.__doc__) in about
    defaults = method.settings.model_construct(None).model_dump(mode="json")
    assert yaml.safe_load(settings) == defaults


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        udas("schema")
    assert left.value.code == 0
    assert "stages" in json.loads(capsys.readouterr().out)["properties"]


def test_check_is_in_the_label_space_of_the_data(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for problem, code in ((False, 0), (True, 1)):
        if problem:
            cut(world / "road/images/train/0.png")
        with pytest.raises(SystemExit) as left:
            udas("check", data_file(world))
        assert left.value.code == code
    shown = capsys.readouterr().out
    assert "images/train/0.png" in shown.replace("\n", "")
    with pytest.raises(SystemExit):
        udas("check", "camvid", "--root", str(world))
    assert capsys.readouterr().err.startswith("error: camvid: no picture")  # nothing about rules to other label spaces


def test_check_reads_all_labels_of_the_splits_that_are_scored(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(Path(data_file(world)).read_text())
    content["splits"] = {"train": "train", "valid": "val"}
    content["labelled"] = {"count": 4}
    Path("renamed.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit, match="1"):
        udas("check", "renamed.yaml")
    assert "4 labelled pictures asked for, 2 exist" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        udas("check", "renamed.yaml", "--scored", "valid")
    assert "no problems" in capsys.readouterr().out


def test_an_evaluation_shows_no_pictures_of_an_earlier_one(world: Path) -> None:
    old, own = Path("again/pictures/4/truth.png"), Path("again/pictures/mine.png")
    old.parent.mkdir(parents=True)
    old.touch()
    own.touch()
    Path("again/evaluation.json").write_text('{"shown": ["a", "b", "c", "d", "e"]}')
    with pytest.raises(SystemExit, match="0"):
        udas("evaluate", trained(), data_file(world), "--out", "again")
    assert not old.exists()
    assert own.exists()
    assert Path("again/pictures/1/truth.png").exists()
