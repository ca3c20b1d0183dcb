"""Every training of every packaged run can be built: settings, streams, teachers and prototypes fit each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_run import CPU
from udas.config import preset_names
from udas.data.batch import Stream
from udas.data.dataset import Domain
from udas.pipeline import build, context
from udas.pipeline.build import sketch_method
from udas.pipeline.config import TrainStage, load_run, several
from udas.pipeline.context import Context

ROOTS = ("GTA5", "SYNTHIA", "CITYSCAPES", "CITYSCAPES256", "CARLA")
BUILT: set[Any] = set()
"""What was built already: the presets share much."""


@pytest.fixture(autouse=True)
def no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets that are not there, as far as nobody opens a picture."""

    def granted(domain: Domain, split: str, labelled: Any = None) -> list[str]:
        return [] if (labelled or domain.config.labelled) == "none" else ["a picture"]

    monkeypatch.setattr(Domain, "labelled_names", granted)
    monkeypatch.setattr(context, "ensure", lambda *_: None)
    for root in ROOTS:
        monkeypatch.setenv(f"{root}_ROOT", str(tmp_path))


@pytest.mark.parametrize("name", preset_names("runs"))
def test_weights_files_go_with_their_encoder(name: str) -> None:
    """The bases name a Caffe ResNet-101; a preset with another encoder has to name other weights."""
    for stage in load_run(name).stages.values():
        if isinstance(stage, TrainStage) and str(stage.network.weights).startswith("resnet101_caffe"):
            assert (stage.network.encoder, stage.network.style) == ("resnet101", "caffe")


@pytest.mark.parametrize("name", [name for name in preset_names("runs") if name.endswith(("_gta5", "_synthia"))])
def test_published_crops_have_no_black_borders(name: str) -> None:
    """Critics would tell the domains by them."""
    config = load_run(name)
    for stage in config.stages.values():
        if not isinstance(stage, TrainStage) or stage.training.augment.crop is None:
            continue
        only_source = stage.streams == [Stream.SOURCE]
        for domain in [config.data.source] if only_source else [config.data.source, config.data.target]:
            assert domain is not None
            assert domain.size is not None
            smallest = [round(side * stage.training.augment.scale[0]) for side in domain.size]
            assert all(have >= wanted for have, wanted in zip(smallest, stage.training.augment.crop, strict=True))


@pytest.mark.parametrize("name", preset_names("runs"))
def test_every_packaged_training_can_be_built(name: str, tmp_path: Path) -> None:
    config = load_run(name)
    here = Context(config, tmp_path, CPU)
    for title, stage in config.stages.items():
        build._check_classes(here, title, stage)
        if not isinstance(stage, TrainStage):
            continue
        names = [name for role in (stage.teacher, stage.prototypes) if role for name in several(role)]
        others = [config.stages[name] for name in names]
        key = (stage.method.model_dump_json(), stage.network, here.streams(title, stage), str(others), config.taxonomy)
        if key not in BUILT:
            BUILT.add(key)
            with torch.device("meta"):
                sketch_method(here, title, stage)
