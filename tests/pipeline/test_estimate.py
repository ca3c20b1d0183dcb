"""What a plan says a stage will cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_run import SIDE, make_world, raw_run
from udas.data.batch import Stream
from udas.pipeline.config import build_run
from udas.pipeline.context import Context
from udas.pipeline.estimate import _looks, _random_batch, _validations, estimate
from udas.training.runtime import Runtime

STAGES = {
    "whole": {"method": {"name": "supervised"}, "streams": ["source"]},
    "crops": {"method": {"name": "supervised"}, "streams": ["source"], "training": {"augment": {"crop": [32, 48]}}},
}


def test_steps_are_timed_on_pictures_of_the_size_that_is_trained(tmp_path: Path) -> None:
    raw = raw_run(make_world(tmp_path / "world"), STAGES)
    for domain in raw["data"].values():
        domain["size"] = None
    config = build_run(raw, "test")
    context = Context(config, tmp_path / "run", Runtime.start(config.runtime))
    whole, crops = (_random_batch(context, name, config.stages[name]).source.image for name in ("whole", "crops"))
    assert whole.shape[-2:] == (SIDE, SIDE)
    assert crops.shape[-2:] == (32, 48)


def test_an_estimate_is_of_seconds_and_bytes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    config = build_run(raw_run(make_world(tmp_path / "world"), STAGES), "test")
    context = Context(config, tmp_path / "run", Runtime.start(config.runtime))
    seconds, size = estimate(context, "whole", config.stages["whole"])
    assert 0 < seconds < 60
    assert size > 1000
    assert context.streams("whole", config.stages["whole"]) == {Stream.SOURCE}
    assert not (tmp_path / "run").exists()


LOOKING = {
    "warm": {"method": {"name": "supervised"}, "streams": ["source"]},
    "style": {"method": {"name": "cyclegan", "generator": {"width": 4, "blocks": 1}, "critic_width": 4}},
    "painted": {"kind": "translate", "model": "style"},
    "coloured": {"kind": "translate", "fourier": {"beta": 0.1}},
    "ranking": {"kind": "rank", "model": "warm", "easy": 0.5},
    "means": {"kind": "prototypes", "model": "warm"},
    "labels": {"kind": "label", "model": "warm", "rule": {"views": 2, "sample": 4}},
    "constant": {"kind": "label", "model": ["warm", "warm"], "rule": {"rule": "constant"}},
    "easy": {"kind": "label", "model": "warm", "easy": "ranking", "rule": {"sample": 4}},
    "both": {"kind": "evaluate", "model": ["warm", "warm"]},
}


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory) -> Context:
    folder = tmp_path_factory.mktemp("looking")
    config = build_run(raw_run(make_world(folder / "world"), LOOKING), "test")
    return Context(config, folder / "run", Runtime.start(config.runtime))


@pytest.mark.parametrize("name", [name for name in LOOKING if name not in ("warm", "style")])
def test_stages_that_look_at_pictures_take_time_too(looking: Context, name: str) -> None:
    seconds, _ = estimate(looking, name, looking.config.stages[name])
    assert 0 < seconds < 60


@pytest.mark.parametrize(
    ("name", "looks"),
    [
        ("painted", 6),
        ("ranking", 6),
        ("labels", 6 + 4 + 2),  # those that thresholds are found on and those that measure their quality are seen, too
        ("constant", 6 + 2),
        ("easy", 0.5 * (6 + 4) + 2),
    ],
)
def test_every_look_at_a_picture_counts(looking: Context, name: str, looks: float) -> None:
    stage = looking.config.stages[name]
    pictures = looking.source_pictures if stage.kind == "translate" else looking.unlabelled
    assert _looks(looking, stage, pictures) == looks


@pytest.mark.parametrize(("name", "looks"), [("painted", 6), ("labels", 12), ("both", 2)])
def test_seconds_are_those_of_every_look(
    looking: Context, name: str, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("udas.pipeline.estimate._per_picture", lambda *_: 10.0)
    assert estimate(looking, name, looking.config.stages[name])[0] == 10 * looks


def test_validations_on_the_way_take_their_time() -> None:
    assert _validations(steps=5, every=2) == 3  # after steps 2, 4 and 5
    assert _validations(steps=4, every=2) == 2
    assert _validations(steps=4, every=0) == 0
