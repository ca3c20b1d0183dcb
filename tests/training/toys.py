"""Methods of a few weights, and pictures to train them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from udas.config import AugmentConfig, MethodConfig, OptimiserConfig
from udas.data.batch import Batch, Block, Stream
from udas.data.dataset import PictureSet
from udas.data.layout import Picture
from udas.methods.base import Method, Optimised, Task
from udas.taxonomy import Taxonomy
from udas.training.engine import TrainingEngine
from udas.training.loop import LoggingConfig, Training, TrainingConfig
from udas.training.runtime import Runtime

CPU = Runtime(torch.device("cpu"), "fp32")
TOWN = Taxonomy("town", ("road", "sky"), ((128, 64, 128), (70, 130, 180)))
SGD = OptimiserConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0, schedule="constant")


class ToyConfig(MethodConfig):
    name: Literal["toy"] = "toy"
    painter: OptimiserConfig = SGD
    critic: OptimiserConfig = SGD


class Toy(Method[ToyConfig]):
    """Two networks that share a graph, as generator and discriminator do; `bad_step` makes the loss NaN."""

    settings = ToyConfig
    needs = frozenset({Stream.UNLABELLED})

    def __init__(self, config: ToyConfig | None = None, taxonomy: Taxonomy = TOWN, width: int = 4) -> None:
        super().__init__(config or ToyConfig(), Task(taxonomy, self._none, self.needs, 10))
        self.painter = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1))
        self.critic = nn.Conv2d(3, 2, 3)
        self.bad_step = -1

    def optimised(self) -> dict[str, Optimised]:
        return {
            "painter": Optimised.module(self.painter, self.config.painter),
            "critic": Optimised.module(self.critic, self.config.critic),
        }

    def step(self, batch: Batch) -> None:
        assert batch.unlabelled is not None
        factor = torch.nan if getattr(self.engine, "step", None) == self.bad_step else 1.0
        with self.update("painter") as minimise:
            painted = self.painter(batch.unlabelled.image)
            minimise(factor * self.critic(painted).square().mean(), "fool")
        with self.update("critic") as minimise:
            minimise((self.critic(painted.detach()) - 1).square().mean(), "judge")

    def model(self) -> nn.Module:
        return self.painter

    def save_model(self, path: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.painter.state_dict().items()}, path)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.unlabelled is not None
        return {"painted": self.painter(batch.unlabelled.image)}

    @staticmethod
    def _none() -> Any:
        raise AssertionError("a toy has no segmenter")


def toy(seed: int = 0, **options: Any) -> Toy:
    torch.manual_seed(seed)
    return Toy(**options)


def engine(method: Method[Any], steps: int = 10, runtime: Runtime = CPU) -> TrainingEngine:
    return TrainingEngine(method.to(memory_format=runtime.memory_format), runtime, steps)


def advance(method: Method[Any], lent: TrainingEngine, steps: range) -> None:
    """Steps on noise that is a function of the step."""
    for step in steps:
        lent.begin(step)
        image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        method.step(Batch(unlabelled=Block(image, None, None, (0, 1), ("a", "b"))))


def pictures(folder: Path) -> dict[Stream, PictureSet]:
    """Five small unlabelled pictures."""
    random, found = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(5):
        path = folder / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        found.append(Picture(f"picture{number}", path))
    return {Stream.UNLABELLED: PictureSet("town", tuple(found), len(TOWN.classes))}


def training(folder: Path, method: Method[Any], steps: int = 6, validate: Any = None, **logging: int) -> Training:
    settings = TrainingConfig(steps=steps, batch=2, augment=AugmentConfig(flip=False))
    told = LoggingConfig.model_validate({"every": 1, "checkpoint_every": 2, **logging})
    return Training(method, settings, told, folder, CPU, seed=0, validate=validate)
