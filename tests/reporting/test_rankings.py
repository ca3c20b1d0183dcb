"""What the report says of rank and prototypes stages, whole or broken."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reporting.run_folder import add_train, coloured, dump, manifest, photographed, save, scene
from udas.reporting import write_report

SCORES = [0.02, 0.05, 0.11, 0.4]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one training, a ranking of four pictures by it, and prototypes of three classes."""
    folder = tmp_path / "night_city"
    add_train(folder, "teacher", 0.5)
    manifest(folder / "ranking", "rank", uses={"model": "teacher"}, title="easy and hard")
    parts = ["easy", "easy", "hard", "hard"]
    rows = [f"{k},street/{k},{score},{part}" for k, (score, part) in enumerate(zip(SCORES, parts, strict=True), 1)]
    (folder / "ranking/ranking.csv").write_text("\n".join(["rank,picture,score,part", *rows]) + "\n")
    for k, end in enumerate(("easy_0", "hard_0")):
        place = folder / "ranking/preview" / end
        save(photographed(scene(k), k), place / "input.png")
        save(coloured(scene(k)), place / "prediction.png")
        save(Image.fromarray(np.full((256, 512, 3), 40, np.uint8)), place / "entropy.png")
    manifest(folder / "means", "prototypes", uses={"model": "teacher"}, title="prototypes")
    (folder / "means/prototypes.safetensors").write_bytes(b"not read here")
    count = {"road": 1200, "sky": 900, "train": 0}
    dump(folder / "means/statistics.json", {"pictures": 1234, "count": count, "projection": "pca"})
    save(coloured(scene(5)), folder / "means/scatter.png")
    return folder


def section(run: Path, name: str) -> str:
    page = write_report([run], run / "report.html").read_text()
    found = re.search(rf'<section[^>]* id="{name}">(.*?)</section>', page, re.DOTALL)
    return found.group(1) if found else ""


def test_a_ranking_is_drawn_with_both_ends(run: Path) -> None:
    text = section(run, "ranking")
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert facts == {
        "easy pictures": "2",
        "hard pictures": "2",
        "lowest score": "0.02",
        "highest score": "0.4",
        "highest score of an easy one": "0.05",
    }
    assert text.count("<img") == 6
    assert [text.count(end) for end in ("<figcaption>easy 0", "<figcaption>hard 0", "<svg")] == [1, 1, 1]


def test_prototypes_are_shown_with_what_they_rest_on(run: Path) -> None:
    text = section(run, "prototypes")
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert facts == {"pictures": "1,234", "road": "1,200", "sky": "900", "train": "0"}
    assert text.count("<img") == 1
    assert "pca" in text


@pytest.mark.parametrize(
    ("file", "content", "note"),
    [
        ("ranking/ranking.csv", None, "ranking/ranking.csv: cannot be read"),
        ("ranking/ranking.csv", "rank,picture\n1,a\n", "ranking/ranking.csv: not a table with the columns"),
        ("ranking/ranking.csv", "score,part\nmany,easy\n", "ranking/ranking.csv: not a table with the columns"),
        ("ranking/preview/easy_0/input.png", "", "ranking/preview/easy_0/input.png: not a readable picture"),
        ("means/statistics.json", "{}", "means/statistics.json: pictures: Field required"),
        ("means/scatter.png", None, "means/scatter.png: no such file"),
    ],
)
def test_what_cannot_be_shown_is_a_note(run: Path, file: str, content: str | None, note: str) -> None:
    (run / file).unlink() if content is None else (run / file).write_text(content)
    assert note in section(run, "notes")
    assert section(run, "stages")


def test_a_ranking_without_hard_pictures_is_drawn(run: Path) -> None:
    table = run / "ranking/ranking.csv"
    table.write_text(table.read_text().replace("hard", "easy"))
    assert "<dt>hard pictures</dt><dd>0</dd>" in section(run, "ranking")


def test_a_kind_is_known_without_its_manifest(run: Path) -> None:
    for stage in ("ranking", "means"):
        (run / stage / "manifest.json").unlink()
    assert section(run, "ranking")
    assert section(run, "prototypes")
