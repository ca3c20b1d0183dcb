"""Where a run computes: device, precision, memory format and processes."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from udas.config import Config
from udas.data.sampling import seed_of
from udas.errors import RunError

M = TypeVar("M", bound=nn.Module)


class RuntimeConfig(Config):
    """How to compute. Nothing here changes what is computed, so changing it never restarts a stage."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto = cuda if there is one, else cpu")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto = bf16 where the hardware has it")
    channels_last: bool = Field(True, description="NHWC memory format of pictures and convolutions")
    compile: bool = Field(False, description="torch.compile the networks' encoders: slow start, faster steps on a GPU")
    workers: int | Literal["auto"] = Field("auto", description="loader processes per training process")
    threads: int | None = Field(None, gt=0, description="CPU threads per training process")


@dataclass(frozen=True)
class Runtime:
    """One of `world` processes, its device and its precision."""

    device: torch.device
    precision: Literal["bf16", "fp32"]
    channels_last: bool = True
    compile: bool = False
    workers: int = 0
    rank: int = 0
    world: int = 1

    @classmethod
    def start(cls, config: RuntimeConfig) -> Runtime:
        """Join the processes that torchrun (or any launcher setting its variables) started, and choose the device.

        Raises:
            RunError: when the device does not exist, or more processes were asked than there are devices.
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = _device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.set_flush_denormal(True)  # denormal activations slow CPU convolutions many times over
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
        precision = _precision(config.precision, device)
        return cls(device, precision, config.channels_last, config.compile, _workers(config, device), rank, world)

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of pictures on the device."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, module: M) -> M:
        """Move a module to the device and its convolutions into the memory format; returns it."""
        module.to(self.device)
        module.to(memory_format=self.memory_format)
        return module

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision for the enclosed code.

        Casts of weights are not cached: an update inside the block would leave them stale for the next forward.
        """
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def seed(self, seed: int, step: int) -> None:
        """Make the randomness of a step a function of (seed, step, rank) alone."""
        torch.manual_seed(seed_of(seed, "step", step, self.rank))

    def average(self, flat: Tensor) -> None:
        """Replace `flat` by its mean over the processes."""
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def describe(self) -> dict[str, str | int]:
        """The machine, for manifests and reports."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _cpu_name()
        return {
            "device": name,
            "precision": self.precision,
            "processes": self.world,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count() or 1,
        }


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    backend = getattr(torch, wanted)
    if not backend.is_available():
        raise RunError(f"device {wanted!r} was asked for, but this machine or this torch build has none")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > backend.device_count():
        raise RunError(f"{processes} processes were asked for, but there are {backend.device_count()} {wanted} devices")
    device = torch.device(wanted, local_rank)
    if wanted == "cuda":
        torch.cuda.set_device(device)
    return device


def _precision(wanted: str, device: torch.device) -> Literal["bf16", "fp32"]:
    if wanted != "auto":
        return "bf16" if wanted == "bf16" else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    if device.type == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older torch
        return "bf16" if capabilities.get("avx512_bf16") else "fp32"
    return "fp32"


def _workers(config: RuntimeConfig, device: torch.device) -> int:
    """On a CPU one worker: it decodes while the others compute; on a GPU up to eight."""
    if config.workers != "auto":
        return config.workers
    return 1 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "CPU"
