"""Trains methods with one process and with two; run as a script: processes.py WORLD OUT METHOD..."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiny_run import PER_PROCESS, given, optimisers, per_picture, tiny_segmenter, training
from udas.networks.segmenters import Segmenter
from udas.training.runtime import Runtime, RuntimeConfig

STEPS = 2
# Adam would turn the rounding of a vanishing gradient into a whole step
SGD = {"name": "sgd", "lr": 0.001, "weight_decay": 0}


def segmenter(**changes: Any) -> Segmenter:
    network = per_picture(tiny_segmenter(**changes))
    assert isinstance(network, Segmenter)
    return network


def train(world: Path, out: Path, names: list[str]) -> None:
    """This process's part of every training; the main process leaves log and parameters."""
    runtime = Runtime.start(RuntimeConfig(device="cpu", precision="fp32", workers=0, threads=1))
    for name in names:
        folder = out / str(runtime.world) / name
        changes = optimisers(name, SGD) | PER_PROCESS.get(name, {})
        job = training(folder, name, STEPS, runtime, segmenter, changes)
        before = parameters(job.method)
        job.run(given(world, job.method))
        if runtime.main:
            torch.save((before, parameters(job.method)), folder / "parameters.pt")
        runtime.barrier()


def parameters(method: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in method.named_parameters()}


def forked(work: Any, environment: dict[str, str]) -> int:
    """The process id of a copy of this process that does `work`."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    world, out, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    work = partial(train, world, out, names)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    children = [forked(work, {}), *(forked(work, common | {"RANK": str(rank)}) for rank in range(2))]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(abs(code) for code in codes))


if __name__ == "__main__":
    main()
