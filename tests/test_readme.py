"""What the README and the docs tell to type can be typed: commands parse, files load, names exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from udas.cli import app
from udas.config import DomainConfig, find_yaml, override, preset_names
from udas.errors import ConfigError
from udas.evaluation.protocols import PROTOCOLS
from udas.pipeline.catalogue import LISTS
from udas.pipeline.config import load_run
from udas.validation import validate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = {"run": "runs", "prepare": "runs", "check": "data", "evaluate": "data", "label": "data"}
"""Command -> where the presets are that it can be given."""


def blocks(text: str) -> Iterator[str]:
    """Code blocks of a page: fenced, or indented by four spaces or more."""
    yield from re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield "\n".join(line.strip() for line in plain.splitlines() if line.startswith("    "))


def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of every `udas ...` line of a page, through torchrun and behind variables as well."""
    for block in blocks(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            start = re.match(r"(?:\$ )?(?:[A-Z0-9_]+=\S* +)*(?:\S*/)?(?:torchrun .*-m )?udas(?= |$)", line)
            if start:
                yield shlex.split(line[start.end() :], comments=True)


WRITTEN = [(page.relative_to(ROOT), command) for page in PAGES for command in commands(page)]


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command and its parameters, without carrying it out."""
    group = get_command(app)
    name, command, rest = group.resolve_command(typer.Context(group), arguments)
    assert name is not None
    assert command is not None
    return name, command.make_context(name, rest).params


def test_commands_are_found() -> None:
    told = {arguments[0] for page, arguments in WRITTEN if arguments}
    assert {"check", "run", "predict"} <= {arguments[0] for page, arguments in WRITTEN if page.name == "README.md"}
    assert {"demo", "evaluate", "label", "report", "doctor", "prepare"} <= told


@pytest.mark.parametrize(("page", "arguments"), WRITTEN, ids=[f"{page}: udas {' '.join(a)}" for page, a in WRITTEN])
def test_written_commands_can_be_typed(page: Path, arguments: list[str]) -> None:
    name, given = parsed(arguments)
    file = given.get("config") or given.get("data")
    if file and file.endswith((".yaml", ".yml")):
        assert (ROOT / file).is_file() or "/" not in file, f"{file} is not part of the project"
        override({}, given.get("overrides") or [])
    elif name in ("run", "prepare"):
        load_run(file, given["overrides"])
    elif file:
        assert file in preset_names(FOLDERS[name])
    assert given.get("protocol", "whole") in PROTOCOLS
    if given.get("taxonomy"):
        assert find_yaml(given["taxonomy"], "labels").is_file()
    if name == "list" and given["what"]:
        assert given["what"] in LISTS


def files(page: Path) -> dict[str, str]:
    """YAML files that a page writes out: their first line is a comment with their name."""
    found = re.findall(
        r"^```yaml\n# (\S+\.ya?ml)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return dict(found)


def test_the_readmes_files_make_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = files(ROOT / "README.md")
    for name, content in written.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    shutil.copy(find_yaml("streets_game", "data"), tmp_path / "game.yaml")  # named there, but not written out
    monkeypatch.chdir(tmp_path)
    runs = {name: load_run(name) for name, content in written.items() if "stages:" in content}
    assert all(config.data.target.name == "my_road" for config in runs.values())
    assert "student_2" in runs["my_run.yaml"].stages
    assert runs["my_ssl.yaml"].data.source is None


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("run.yaml")), ids=lambda path: path.parent.name)
def test_runs_of_published_results_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load_run(str(path.relative_to(ROOT))).stages


SMALL = [
    "training={steps: 1, batch: 2, augment: {crop: [32, 64]}}",
    "stages.style.training.batch=1",
    "stages.style.method.generator={width: 4, blocks: 1}",
    "stages.style.method.critic_width=4",
    "data.source.size=[32, 64]",
    "data.source.streets={look: game, pictures: {train: 2, val: 1}}",
    "data.target.size=[32, 64]",
    "runtime.workers=0",
]
"""What makes the README's run one of seconds."""


def make_road(folder: Path) -> None:
    """Pictures and masks below `folder`, as the README's road.yaml describes them."""
    random = np.random.default_rng(0)
    for split, count in {"train": 4, "val": 2}.items():
        for number in range(count):
            image, mask = (folder / f"{kind}/{split}/town" for kind in ("images", "masks"))
            image.mkdir(parents=True, exist_ok=True)
            mask.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (32, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(image / f"{split}_{number}.jpg")
            values = random.choice(np.array([0, 1, 3, 6, 7, 10, 13], np.uint8), (32, 64))
            Image.fromarray(values).save(mask / f"{split}_{number}_mask.png")
    (folder / "splits").mkdir()
    (folder / "splits/labelled_100.txt").write_text("images/train/town/train_0\nimages/train/town/train_2\n")


def test_the_readmes_own_data_is_carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the section, in its order, on data in the layout that the section describes."""
    monkeypatch.chdir(tmp_path)
    make_road(tmp_path / "road")
    for name, content in files(ROOT / "README.md").items():
        Path(name).write_text(content.replace("/data/road", str(tmp_path / "road")), encoding="utf-8")
    shutil.copy(find_yaml("streets_game", "data"), "game.yaml")
    shutil.copytree("road/images/val", "pictures")
    told = [
        command for command in commands(ROOT / "README.md") if {"road.yaml", "my_run.yaml", "pictures/"} & {*command}
    ]
    assert [command[0] for command in told] == ["check", "run", "run", "predict", "run"]
    for command in told[:-1]:  # the last one is of several processes
        done = CliRunner().invoke(app, command + (SMALL if command[0] == "run" else []))
        assert done.exit_code == 0, f"{command}: {done.output}"
    scored = json.loads(Path("runs/my_run/results.json").read_text(encoding="utf-8"))
    assert [row["title"] for row in scored] == ["teacher", "student, round 1", "student, round 2"]
    assert Path("runs/my_run/report.html").is_file()
    assert len(list(Path("predictions").rglob("val_*.png"))) >= 2


def test_documented_files_are_without_mistakes() -> None:
    """Those of the README are run files and data sets; other pages show data sets and label spaces."""
    for page in PAGES:
        for content in map(yaml.safe_load, files(page).values()):
            if "images" in content:
                validate(DomainConfig, content, str(page))


def runs(page: Path) -> Iterator[dict[str, Any]]:
    """Run files that a page writes out, and the chains of stages, which are put on the smallest base."""
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        content = yaml.safe_load(block)
        if isinstance(content, dict) and "stages" in content:
            yield content
        elif isinstance(content, dict) and all(map(is_stage, content.values())):
            yield {"base": "streets", "stages": content}


def is_stage(content: Any) -> bool:
    return isinstance(content, dict) and not content.keys().isdisjoint({"method", "kind"})


CHAINS = [(page, run) for page in PAGES if page.name != "README.md" for run in runs(page)]


@pytest.mark.parametrize(("page", "written"), CHAINS, ids=lambda value: getattr(value, "name", "run"))
def test_documented_chains_are_without_mistakes(page: Path, written: dict[str, Any], tmp_path: Path) -> None:
    """Pages of methods show whole chains; others may show parts that name stages from elsewhere."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    found: list[str] = []
    try:
        load_run(str(tmp_path / "run.yaml"))
    except ConfigError as error:
        found = str(error).splitlines()[1:]
    if page.parent.name != "methods":
        found = [line for line in found if "is not an earlier" not in line]
    assert found == []


def links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert [target for target in links(page) if not (page.parent / target).exists()] == []
