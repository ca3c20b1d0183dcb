"""The training loop on one screen: draw, step, check, log, look, save."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt
from timm.layers import convert_sync_batchnorm
from torch import nn

from udas.config import AugmentConfig, Config
from udas.data.batch import Batch, Stream
from udas.data.dataset import PictureSet
from udas.data.loader import make_loader
from udas.errors import RunError
from udas.methods.base import Method
from udas.storage import write_atomically
from udas.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from udas.training.engine import TrainingEngine
from udas.training.log import Bar, TrainingLog
from udas.training.runtime import Runtime
from udas.training.stop import StopWish

LAST, BEST = "last.safetensors", "best.safetensors"

Validate = Callable[[nn.Module], dict[str, Any]]
"""Scores a model: {"miou", "pixel_accuracy", "iou": {class: value}}."""


class TrainingConfig(Config):
    """How long and on what a stage trains."""

    steps: int = Field(1500, gt=0, description="optimiser steps")
    batch: PositiveInt | dict[Stream, PositiveInt] = Field(
        8, description="pictures per stream and step, over all processes"
    )
    augment: AugmentConfig = AugmentConfig()

    def batch_of(self, stream: Stream) -> int:
        """Pictures of one stream per step."""
        return self.batch if isinstance(self.batch, int) else self.batch.get(stream, 8)


class LoggingConfig(Config):
    """What is told and kept while a stage trains; changing it restarts nothing."""

    every: int = Field(20, gt=0, description="steps between lines of losses")
    evaluate_every: int = Field(0, ge=0, description="steps between validations for the curve; 0 = only at the end")
    checkpoint_every: int = Field(200, gt=0, description="steps between checkpoints")
    preview_every: int = Field(0, ge=0, description="steps between preview pictures of a translator; 0 = never")


def _placed(method: Method[Any], runtime: Runtime) -> Method[Any]:
    """The method on the run's device; with several GPUs, batch norms see the pictures of all of them."""
    runtime.place(method)
    if runtime.world > 1 and runtime.device.type == "cuda":  # PyTorch has no synchronised batch norm on CPUs
        convert_sync_batchnorm(method)
    return method


class Training:
    """One training of one method: resumes from its last checkpoint and ends bit-identical to one never stopped.

    With several processes, what each of them remembers of its own pictures goes on from the first one's.
    """

    def __init__(
        self,
        method: Method[Any],
        config: TrainingConfig,
        logging: LoggingConfig,
        folder: Path,
        runtime: Runtime,
        seed: int,
        validate: Validate | None = None,
    ) -> None:
        self.method = _placed(method, runtime)
        self.config, self.logging, self.folder, self.runtime, self.seed = config, logging, folder, runtime, seed
        self.validate = validate
        self.engine = TrainingEngine(self.method, runtime, config.steps)
        self.progress = Progress()
        self.recent: deque[tuple[int, dict[str, tuple[str, ...]]]] = deque(maxlen=logging.every)

    def run(self, streams: Mapping[Stream, PictureSet], title: str = "train") -> None:
        """Train to the last step on `streams`. Ctrl-C or SIGTERM ends it after its step, with a checkpoint.

        Raises:
            KeyboardInterrupt: after such a stop. Of several processes each stops at once, and no checkpoint is made.
            RunError: when a loss is not finite (the state is saved for inspection), or a checkpoint cannot be used.
            DataError: when a picture or label cannot be read.
        """
        if (self.folder / LAST).exists():
            self.progress = load_checkpoint(self.folder / LAST, self.method, self.engine)
        start, steps = self.progress.step, self.config.steps
        if start >= steps:
            return
        log = TrainingLog(self.folder, start) if self.runtime.main else None
        loader = make_loader(
            streams,
            {stream: self.config.batch_of(stream) for stream in streams},
            self.config.augment,
            self.seed,
            start,
            steps,
            self.runtime.rank,
            self.runtime.world,
            self.runtime.workers,
            pin=self.runtime.device.type == "cuda",
        )
        self.method.train()
        began, earlier = time.monotonic(), self.progress.seconds
        bar = Bar(title, steps, start, visible=self.runtime.main)
        with closing(log) if log else nullcontext(), bar, StopWish(active=self.runtime.world == 1) as stop:
            for step, batch in enumerate(stop.until(loader), start):
                batch = self._step(step, batch)
                self.progress = replace(self.progress, step=step + 1, seconds=earlier + time.monotonic() - began)
                self._tell(log, bar, batch, (step + 1 - start) / (time.monotonic() - began))
            if stop.wanted:
                self._stop()

    def _step(self, step: int, batch: Batch) -> Batch:
        self.recent.append((step, batch.names()))
        self.runtime.seed(self.seed, step)
        self.engine.begin(step)
        batch = batch.to(self.runtime.device, self.runtime.memory_format)
        with self.runtime.autocast():
            self.method.step(batch)
        return batch

    def _tell(self, log: TrainingLog | None, bar: Bar, batch: Batch, rate: float) -> None:
        """Log, validate, preview and save when it is time; always at the last step."""
        done = self.progress.step
        if (
            self._due(self.logging.every)
            or self._due(self.logging.checkpoint_every)
            or self.runtime.device.type == "cpu"
        ):
            self._stop_if_not_finite()
        if self._due(self.logging.every):
            losses = self.engine.take_losses()
            if log:
                log.losses(done, self.progress.seconds, losses, self.engine.learning_rates(), rate)
            bar.say(", ".join(f"{name} {value:.3g}" for name, value in losses.items()))
        if log and self.logging.preview_every and self._due(self.logging.preview_every):
            log.pictures(done, self._preview(batch))
        if self.validate and self.logging.evaluate_every and self._due(self.logging.evaluate_every):
            self._validate(log, bar)
        if self._due(self.logging.checkpoint_every):
            self._save()
        bar(done, self.config.steps)

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.steps

    def _validate(self, log: TrainingLog | None, bar: Bar) -> None:
        assert self.validate is not None
        self.method.eval()
        scores = self.validate(self.method.model())
        self.method.train()
        if log:
            log.validation(self.progress.step, scores)
        bar(self.progress.step, self.config.steps, f"mIoU {scores['miou']:.3f}")
        if scores["miou"] > self.progress.best_miou:
            self.progress = replace(self.progress, best_miou=scores["miou"])
            if self.runtime.main:
                self.method.save_model(self.folder / BEST)

    def _preview(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.method.eval()
        with torch.no_grad(), self.runtime.autocast():
            pictures = self.method.preview(batch)
        self.method.train()
        return pictures

    def _stop(self) -> None:
        self._stop_if_not_finite()
        self._save()
        raise KeyboardInterrupt

    def _save(self) -> None:
        if self.runtime.main:
            save_checkpoint(self.folder / LAST, self.method, self.engine, self.progress)
        self.runtime.barrier()

    def _stop_if_not_finite(self) -> None:
        step = self.engine.failure()
        if step is None:
            return
        names = dict(self.recent).get(step, {})
        losses = {name: float(value) for name, value in self.engine.losses.items()}
        if self.runtime.main:
            save_checkpoint(self.folder / "failed.safetensors", self.method, self.engine, self.progress)
            content = {"step": step, "pictures": names, "losses": {k: str(v) for k, v in losses.items()}}
            write_atomically(self.folder / "failed.json", json.dumps(content, indent=2).encode())
        self.runtime.barrier()  # a launcher stops all processes as soon as one of them fails
        pictures = "; ".join(f"{stream}: {', '.join(members)}" for stream, members in names.items())
        raise RunError(
            f"step {step}: a loss or gradient is not finite. Pictures of the step: {pictures}. "
            f"The state is in {self.folder / 'failed.safetensors'}, losses in failed.json; the last good checkpoint is "
            "kept. Try a smaller learning rate, `clip`, or precision fp32."
        )
