"""What a run finds out about its methods before the first one starts, and which parts of them it compiles."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_run import CPU, PICTURES, loaded, make_world, run_file
from udas.errors import ConfigError
from udas.networks.segmenters import Segmenter
from udas.pipeline.build import rehearse, sketch_method
from udas.pipeline.context import Context
from udas.training.runtime import Runtime


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def context(world: Path, tmp_path: Path) -> Callable[..., Context]:
    """A run of one stage or more, in these processes."""

    def make(stages: dict[str, Any], runtime: Runtime = CPU) -> Context:
        return Context(loaded(run_file(tmp_path / "file.yaml", world, stages)), tmp_path / "run", runtime)

    return make


MIXING = {
    "cutmixseg": {"mask": "cutout"},
    "fixmatch": {"cutmix": 0},
    "unimatch": {"cutmix": 0},
}
"""Methods that mix pictures of a batch, and how not to."""


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize(("batch", "world_size"), [({"unlabelled": 1}, 1), (2, 2), (4, 4)])
def test_one_picture_per_process_cannot_be_mixed(
    context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch, name: str, batch: Any, world_size: int
) -> None:
    monkeypatch.setattr(Runtime, "barrier", lambda _: None)
    runtime = replace(CPU, world=world_size)
    stage = {"method": {"name": name}, "streams": ["labelled", "unlabelled"], "training": {"batch": batch}}
    text = f"stages.it.training.batch: {name} mixes unlabelled pictures with each other and needs 2 per process"
    with pytest.raises(ConfigError, match=text):
        rehearse(context({"it": stage}, runtime), ["it"])
    rehearse(context({"it": stage | {"method": {"name": name} | MIXING[name]}}, runtime), ["it"])
    rehearse(context({"it": stage | {"training": {"batch": 2 * world_size}}}, runtime), ["it"])


def test_batches_that_the_processes_cannot_share_are_found_before_the_first_stage(
    context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "barrier", lambda _: None)
    stage = {
        "method": {"name": "supervised"},
        "streams": ["source", "labelled"],
        "training": {"batch": {"source": 6, "labelled": 4}},
    }
    text = r"stages.it.training.batch: 6 source pictures cannot be shared by 4 processes; choose a multiple of 4"
    with pytest.raises(ConfigError, match=text):
        rehearse(context({"it": stage}, replace(CPU, world=4)), ["it"])
    rehearse(context({"it": stage}, replace(CPU, world=2)), ["it"])


@pytest.mark.parametrize(
    ("name", "source", "crop", "text"),
    [
        (
            "region_mix",
            [32, 64],
            None,
            "of one size (labelled 64 x 64, source 32 x 64): set",
        ),
        (
            "dacs",
            [32, 64],
            None,
            "of one size (source 32 x 64, unlabelled 64 x 64): set",
        ),
        ("udas", [32, 64], None, "of one size (labelled 64 x 64, source 32 x 64): set"),
        ("gct", [64, 64], [64, 56], "with sides of at least 60, but the labelled ones are 64 x 56"),
    ],
)
def test_sizes_that_a_method_cannot_work_with_are_found_before_the_first_stage(
    context: Callable[..., Context], name: str, source: list[int], crop: list[int] | None, text: str
) -> None:
    def rehearsed(size: list[int], crop: list[int] | None) -> None:
        run = context({"it": {"method": {"name": name}, "training": {"augment": {"crop": crop}}}})
        data = run.config.data
        assert data.source is not None
        domain = data.source.model_copy(update={"size": tuple(size)})
        config = run.config.model_copy(update={"data": data.model_copy(update={"source": domain})})
        rehearse(replace(run, config=config), ["it"])

    with pytest.raises(ConfigError, match=re.escape(f"stages.it: {name} needs pictures {text}")):
        rehearsed(source, crop)
    rehearsed([64, 64], None)
    rehearsed([32, 64], [60, 60])


def test_every_network_is_compiled_whatever_its_method_asks_it_for(
    context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compiled(call: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def counted(*given: Any) -> Any:
            calls.append(call)
            return call(*given)

        return counted

    monkeypatch.setattr(torch, "compile", compiled)
    stages = {
        "teacher": {"method": {"name": "supervised"}, "streams": ["source"]},
        "gct": {"method": {"name": "gct"}},
        "dldm": {"method": {"name": "dldm"}, "teacher": ["teacher", "gct"]},
    }
    for compile_, expected in ((True, 1), (False, 0)):
        run = context(stages, replace(CPU, compile=compile_))
        for name, count in (("teacher", 1), ("gct", 2), ("dldm", 3)):
            method = sketch_method(run, name, run.config.stages[name])  # type: ignore[arg-type]
            networks = [module for module in method.modules() if isinstance(module, Segmenter)]
            assert len(networks) == count
            for network in networks:
                for ask in (network, network.levels, network.outputs, network.encode):
                    calls.clear()
                    ask(torch.rand(2, 3, 32, 32))
                    assert len(calls) == expected


def test_networks_are_scored_on_a_split_that_is_there(context: Callable[..., Context]) -> None:
    stages = {"it": {"method": {"name": "supervised"}, "streams": ["source"]}}
    made = context(stages)
    for split, text in (
        ("valid", "has no split 'valid' to score on; name the one it has as data.val_split (train, val)"),
        ("train", f"{PICTURES['road']['train']} pictures of the split 'train'"),
    ):
        config = made.config.model_copy(update={"data": made.config.data.model_copy(update={"val_split": split})})
        other = replace(made, config=config)
        with pytest.raises(ConfigError, match=f"stages.evaluate_it: .*{re.escape(text)}"):
            rehearse(other, ["it", "evaluate_it"])
        rehearse(other, ["it"])
    rehearse(made, ["it", "evaluate_it"])


def test_pseudo_labels_that_a_method_cannot_use_are_a_mistake(context: Callable[..., Context]) -> None:
    stages = {
        "first": {"method": {"name": "supervised"}, "streams": ["source"]},
        "labels": {"kind": "label", "model": "first"},
        "it": {"method": {"name": "fixmatch"}, "pseudo": "labels"},
    }
    with pytest.raises(ConfigError, match=r"stages.it.pseudo: method fixmatch does not learn from pseudo-labels"):
        rehearse(context(stages), ["it"])


@pytest.mark.parametrize("role", ["teacher", "prototypes"])
def test_a_stage_that_a_method_does_not_learn_from_is_a_mistake(context: Callable[..., Context], role: str) -> None:
    stages = {
        "first": {"method": {"name": "supervised"}, "streams": ["source"]},
        "means": {"kind": "prototypes", "model": "first"},
        "it": {"method": {"name": "udas"}, "start": "first", role: {"teacher": "first", "prototypes": "means"}[role]},
        "proda": {"method": {"name": "proda"}, "start": "first", "teacher": "first", "prototypes": "means"},
    }
    with pytest.raises(ConfigError, match=rf"stages.it.{role}: method udas, as it is set, learns from none"):
        rehearse(context(stages), ["it"])
    rehearse(context(stages), ["proda"])
