"""A chain of every kind of stage, really carried out: what one leaves is what the next one sees."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_run import CPU, QUIET, loaded, make_world, run_file
from udas.data.batch import Stream
from udas.data.fourier import swap_amplitude
from udas.data.sampling import seed_of
from udas.errors import ConfigError
from udas.evaluation.metrics import confusion
from udas.methods.prototypes import Prototypes
from udas.pipeline.build import build_method, rehearse
from udas.pipeline.config import RunConfig
from udas.pipeline.context import Context
from udas.pipeline.models import load_trained
from udas.pipeline.plan import plan
from udas.pipeline.prototypes import load_prototypes
from udas.pipeline.run import run
from udas.pipeline.stages import train_streams

ALL = {"views": 1, "rule": "constant", "threshold": 0.0}
CROP = {"training": {"augment": {"crop": [32, 32]}}}
STAGES = {
    "warm": {"method": {"name": "supervised"}, "streams": ["source"], **CROP},
    "other": {"method": {"name": "supervised"}, "streams": ["labelled"], "evaluate": False, **CROP},
    "ranking": {"kind": "rank", "model": "warm", "easy": 0.34, "rare": ["pole", "person"]},
    "labels": {"kind": "label", "model": ["warm", "other"], "easy": "ranking", "rule": ALL},
    "intra": {
        "method": {"name": "advent"},
        "streams": ["pseudo", "unlabelled"],
        "pseudo": "labels",
        "hard": "ranking",
        **CROP,
    },
    "means": {"kind": "prototypes", "model": "warm", "minimum": 1, "sample": 5},
    "near": {"kind": "label", "model": "warm", "prototypes": "means", "rule": ALL},
    "learner": {"method": {"name": "proda"}, "start": "warm", "teacher": "warm", "prototypes": "means", **CROP},
    "taught": {"method": {"name": "dldm"}, "teacher": ["warm", "other"], "evaluate": False, **CROP},
    "painted": {"kind": "translate", "fourier": {"beta": 0.1}},
    "both": {"kind": "evaluate", "model": ["warm", "other"], "average": "probabilities"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Context:
    """The run when it is done; nothing may write there."""
    folder = tmp_path_factory.mktemp("finished")
    config = configured(world, folder)
    run(config, folder, CPU, QUIET)
    return Context(config, folder, CPU)


def configured(world: Path, folder: Path, *overrides: str) -> RunConfig:
    return loaded(run_file(folder / "file.yaml", world, STAGES), *overrides)


def names(context: Context, part: str) -> set[str]:
    return set((context.folder / "ranking" / f"{part}.txt").read_text().split())


def label_of(context: Context, stage: str, name: str) -> np.ndarray:
    return np.array(Image.open(context.folder / stage / "labels" / f"{name}.png"))


def test_every_stage_is_done_and_nothing_is_done_again(finished: Context) -> None:
    assert {item.action for item in plan(finished)} == {"reuse"}
    page = (finished.folder / "report.html").read_text()
    for section in ("ranking", "prototypes", "repainted", "pseudo-labels"):
        assert f'<section id="{section}">' in page
    assert 'id="notes"' not in page


def test_the_streams_are_the_easy_pictures_with_labels_and_the_hard_ones(finished: Context) -> None:
    easy, hard = names(finished, "easy"), names(finished, "hard")
    assert (len(easy), len(hard)) == (2, 4)
    streams = train_streams(finished, "intra", finished.config.stages["intra"])
    assert {picture.name for picture in streams[Stream.PSEUDO].pictures} == easy
    assert {picture.name for picture in streams[Stream.UNLABELLED].pictures} == hard
    assert not streams[Stream.UNLABELLED].labels


def test_a_training_tells_which_labels_it_saw(finished: Context) -> None:
    folder = finished.folder / "taught"
    assert json.loads((folder / "streams.json").read_text()) == {
        "labelled": 2,
        "unlabelled": 6,
        "labelled, unlabelled too": 2,
    }
    granted = finished.labelled(finished.config.stages["taught"])
    again = finished.target.labelled("train", str(folder / "labelled.txt"))
    assert again.pictures == granted.pictures
    assert not (finished.folder / "warm" / "labelled.txt").exists()


@torch.no_grad()
def test_an_ensemble_labels_by_the_mean_of_logits(finished: Context) -> None:
    one, two = (load_trained(finished, name).eval() for name in ("warm", "other"))
    for index, picture in enumerate(finished.unlabelled.pictures):
        if picture.name in names(finished, "easy"):
            image = finished.unlabelled.image(index)[None].float() / 255
            expected = ((one(image) + two(image)) / 2)[0].argmax(0)
            assert np.mean(label_of(finished, "labels", picture.name) == expected.numpy()) > 0.999


@torch.no_grad()
def test_an_ensemble_is_scored_by_the_mean_of_probabilities(finished: Context) -> None:
    one, two = (load_trained(finished, name).eval() for name in ("warm", "other"))
    assert finished.validation is not None
    total = torch.zeros(11, 11, dtype=torch.long)
    for index in range(len(finished.validation)):
        image = finished.validation.image(index)[None].float() / 255
        chosen = (one(image).softmax(1) + two(image).softmax(1)).argmax(1)
        total += confusion(chosen, finished.validation.label(index)[None].long(), 11)[0]
    found = torch.tensor(json.loads((finished.folder / "both/evaluation.json").read_text())["confusion"])
    assert (found - total).abs().sum() <= 0.001 * total.sum()


@torch.no_grad()
def test_prototypes_reweight_what_is_labelled(finished: Context) -> None:
    network = load_trained(finished, "warm").eval()
    weigh = Prototypes(load_prototypes(finished.folder / "means"))
    changed = 0.0
    for index, picture in enumerate(finished.unlabelled.pictures):
        image = finished.unlabelled.image(index)[None].float() / 255
        (main, *_), features, _ = network.outputs(image)
        log = torch.nn.functional.interpolate(weigh.log_weights(features), main.shape[-2:], mode="bilinear")
        product = main.softmax(1) * log.exp()
        assert np.mean(label_of(finished, "near", picture.name) == product[0].argmax(0).numpy()) > 0.999
        changed += (main.argmax(1) != product.argmax(1)).float().mean().item()
    assert changed > 0


def test_amplitudes_come_from_a_drawn_picture(finished: Context) -> None:
    for index, picture in enumerate(finished.source_pictures.pictures):
        partner = finished.unlabelled.image(seed_of(0, "partner", picture.name) % len(finished.unlabelled))
        source = finished.source_pictures.image(index)
        expected = swap_amplitude(source[None] / 255, partner[None] / 255, 0.1)[0]
        found = np.array(Image.open(finished.folder / "painted" / "images" / f"{picture.name}.png"))
        assert np.abs(found / 255 - expected.permute(1, 2, 0).numpy()).max() < 0.003
        assert not np.array_equal(found, source.permute(1, 2, 0).numpy())


def test_a_method_is_given_its_teacher_and_prototypes(finished: Context) -> None:
    stage = finished.config.stages["learner"]
    task = build_method(finished, "learner", stage).task
    assert task.teacher is not None
    assert torch.equal(task.prototypes, load_prototypes(finished.folder / "means"))
    weights = load_trained(finished, "warm").state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in task.teacher().state_dict().items())


@torch.no_grad()
def test_of_several_teachers_probabilities_are_averaged(finished: Context) -> None:
    task = build_method(finished, "taught", finished.config.stages["taught"]).task
    assert task.teacher is not None
    image = finished.unlabelled.image(0)[None].float() / 255
    one, two = (load_trained(finished, name).eval()(image).softmax(1) for name in ("warm", "other"))
    assert torch.allclose(task.teacher().eval()(image).softmax(1), (one + two) / 2, atol=1e-6)
    manifest = json.loads((finished.folder / "taught/manifest.json").read_text())
    assert manifest["uses"] == {"teacher": ["warm", "other"]}


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("stages.ranking.easy=0.5", {"ranking", "labels", "intra", "evaluate_intra"}),
        ("stages.both.average=logits", {"both"}),
        ("stages.both.model=[other, warm]", {"both"}),
        ("stages.taught.teacher=warm", {"taught"}),
        ("stages.other.training.steps=1", {"other", "labels", "intra", "evaluate_intra", "taught", "both"}),
        ("stages.means.minimum=2", {"means", "near", "learner", "evaluate_learner"}),
        ("stages.painted.fourier.beta=0.2", {"painted"}),
        ("stages.labels.rule.protocol={flips: true}", {"labels", "intra", "evaluate_intra"}),
        ("data.val_size=own", {"evaluate_warm", "evaluate_intra", "evaluate_learner", "both"}),
    ],
)
def test_what_a_change_makes_again(
    world: Path, finished: Context, tmp_path: Path, override: str, again: set[str]
) -> None:
    planned = plan(Context(configured(world, tmp_path, override), finished.folder, CPU))
    assert {item.name for item in planned if item.action == "restart"} == again


def test_an_unknown_class_is_found_before_anything_starts(world: Path, tmp_path: Path) -> None:
    for override, text in (
        ("stages.ranking.rare=[pol]", "stages.ranking.rare: street11 has no class 'pol'; did you mean 'pole'"),
        ("stages.means.classes=[rod]", "stages.means.classes: street11 has no class 'rod'; did you mean 'road'"),
    ):
        context = Context(configured(world, tmp_path, override), tmp_path / "run", CPU)
        with pytest.raises(ConfigError, match=text.replace("[", r"\[")):
            rehearse(context, ["ranking", "means"])


def test_a_rehearsal_needs_no_earlier_stage(world: Path, tmp_path: Path) -> None:
    config = configured(world, tmp_path)
    rehearse(Context(config, tmp_path / "run", CPU), list(config.stages))
    assert not (tmp_path / "run").exists()


def test_scores_may_be_at_the_files_own_size(world: Path, tmp_path: Path) -> None:
    half = ["data.target.size=[32, 32]", "data.val_size=own"]
    context = Context(configured(world, tmp_path, *half), tmp_path, CPU)
    assert context.validation is not None
    assert context.probe is not None
    assert (context.validation.image(0).shape[-1], context.probe.image(0).shape[-1]) == (64, 32)
    assert context.unlabelled.image(0).shape[-1] == 32
    with_size = Context(configured(world, tmp_path, "data.val_size=[16, 24]"), tmp_path, CPU)
    assert with_size.validation is not None
    assert with_size.validation.label(0).shape == (16, 24)


def test_the_table_of_scores_can_be_read_by_anyone(finished: Context) -> None:
    with (finished.folder / "ranking/ranking.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["rank", "picture", "score", "part"]
    assert {row["picture"] for row in rows if row["part"] == "hard"} == names(finished, "hard")
