"""What a plan says a stage will cost."""

from __future__ import annotations

from pathlib import Path

from tiny_run import SIDE, make_world, raw_run
from udas.data.batch import Stream
from udas.pipeline.config import build_run
from udas.pipeline.context import Context
from udas.pipeline.estimate import _random_batch, estimate
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
