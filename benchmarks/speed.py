"""Speed and memory as ratios measured in one run: every method, bf16 against fp32, depthwise kernels, the loader alone.

    python benchmarks/speed.py --out docs/results/speed
    python benchmarks/speed.py my_run.yaml training.batch=8 "training.augment.crop=[512, 512]" --out speed

Every method, with its default settings and all streams it takes (pseudo-labels only where it needs them), trains the
network of the run's first segmentation stage on random pictures of the run's crop and batch; the loader reads the run's
own (those of the demo are rendered on first use). Every repeat times every case once, so that a busy moment of the
machine meets all of them; ratios are taken within a repeat. Peak memory is that of a process of its own per method.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from segmentation_models_pytorch.encoders import TimmUniversalEncoder
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from udas import __version__
from udas.data.batch import Batch, Block, Stream
from udas.data.loader import make_loader
from udas.errors import ConfigError
from udas.methods.base import Task
from udas.names import METHODS, load_method
from udas.networks import segmenters
from udas.networks.generators import ResnetGenerator
from udas.networks.segmenters import build_segmenter
from udas.pipeline.config import RunConfig, TrainStage, load_run
from udas.pipeline.context import Context
from udas.taxonomy import load_taxonomy
from udas.training.engine import TrainingEngine
from udas.training.runtime import Runtime

UNIT = "supervised"  # on synthetic pictures alone: one pass; every other method on all streams it takes
PRECISIONS = ("fp32", "bf16")
NEEDED = {"cct": {"foreground": ["person", "vehicle"]}}  # settings without a default
NETWORKS = (TimmUniversalEncoder, ResnetGenerator)
STEPS = 1000  # the length of the schedules; none is trained to its end
DEMO = ["training.batch=4", "training.augment.crop=[128, 128]"]
DEMO += ["network.name=deeplabv2_multi", "network.output_stride=16"]  # two outputs, which some methods need
for domain in ("source", "target"):
    DEMO += [f"data.{domain}.root=runs/speed/data/{domain}", f"data.{domain}.streets.pictures={{train: 32, val: 4}}"]


class Case:
    """One method in one precision, on one random batch that stays on the device."""

    def __init__(self, config: RunConfig, name: str, precision: str) -> None:
        self.stage = first_segmentation(config)
        self.runtime = runtime(config, precision)
        taxonomy, method = load_taxonomy(config.taxonomy), load_method(name)
        streams = frozenset([Stream.SOURCE]) if name == UNIT else method.needs | method.optional - {Stream.PSEUDO}
        prototypes = torch.randn(len(taxonomy.classes), self._network(taxonomy).decoder.channels)
        task = Task(
            taxonomy,
            lambda: self._network(taxonomy),
            streams,
            STEPS,
            teacher=lambda: self._network(taxonomy),
            prototypes=prototypes,
        )
        settings = method.settings.model_validate({"name": name} | NEEDED.get(name, {}))
        self.method = self.runtime.place(method(settings, task)).train()
        self.engine = TrainingEngine(self.method, self.runtime, STEPS)
        blocks = {stream.value: self._block(stream, len(taxonomy.classes)) for stream in sorted(streams)}
        self.batch = Batch(**blocks).to(self.runtime.device, self.runtime.memory_format)

    def _network(self, taxonomy: Any) -> segmenters.Segmenter:
        return build_segmenter(self.stage.network.model_copy(update={"weights": None}), len(taxonomy.classes))

    def _block(self, stream: Stream, classes: int) -> Block:
        count, size = self.stage.training.batch_of(stream), self.stage.training.augment.crop
        label = None if stream == Stream.UNLABELLED else torch.randint(classes, (count, *size))
        confidence = torch.rand(count, *size) if stream == Stream.PSEUDO else None
        return Block(torch.rand(count, 3, *size), label, confidence, tuple(range(count)), ("random",) * count)

    def seconds(self, steps: int) -> float:
        """Seconds per training step."""
        began = time.perf_counter()
        for step in range(steps):
            self.engine.begin(step)
            with self.runtime.autocast():
                self.method.step(self.batch)
        self.engine.take_losses()  # waits for the device
        return (time.perf_counter() - began) / steps

    def passes(self) -> tuple[int, int]:
        """Passes of a step through the networks that learn the task, in batches: forward, and backward again."""
        seen: list[tuple[int, bool]] = []

        def note(part: nn.Module, _: Any, output: Any) -> None:
            if isinstance(part, NETWORKS):
                last = output[-1] if isinstance(output, list) else output
                seen.append((len(last), last.requires_grad))

        hook = register_module_forward_hook(note)
        self.seconds(1)
        hook.remove()
        unit = self.stage.training.batch_of(Stream.SOURCE)
        return sum(count for count, _ in seen) // unit, sum(count for count, learns in seen if learns) // unit


def first_segmentation(config: RunConfig) -> TrainStage:
    """The stage whose network, crop and batch all methods are timed with."""
    stages = [stage for stage in config.stages.values() if isinstance(stage, TrainStage)]
    return next(stage for stage in stages if load_method(stage.method.name).makes == "segmenter")


def runtime(config: RunConfig, precision: str) -> Runtime:
    """The run's runtime in `precision`; bf16 is with channels_last."""
    changes = {"precision": precision, "channels_last": precision == "bf16"}
    return Runtime.start(config.runtime.model_copy(update=changes))


def loader_seconds(config: RunConfig, batches: int) -> float:
    """Seconds per batch of the loader alone, with the run's workers; the first two batches start them."""
    context = Context(config, Path("runs/speed"), runtime(config, "bf16"))
    training, pictures = first_segmentation(config).training, {Stream.SOURCE: context.source_pictures}
    sizes = {Stream.SOURCE: training.batch_of(Stream.SOURCE)}
    loader = make_loader(
        pictures, sizes, training.augment, 0, 0, batches + 2, workers=context.runtime.workers
    )  # fmt: skip
    arrivals = [time.perf_counter() for _ in loader]
    return (arrivals[-1] - arrivals[1]) / batches


def peak(run: str, overrides: list[str], name: str) -> float:
    """Peak memory in MB of two steps in bf16, in this process: on the device, or of the process beyond its start."""
    config = load_run(run, overrides)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case = Case(config, name, "bf16")
    case.seconds(2)
    if case.runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


@contextmanager
def library_kernels() -> Iterator[None]:
    """Networks built inside keep PyTorch's own depthwise convolutions."""
    with patch.object(segmenters, "use_fast_depthwise"):
        yield


def measure(run: str, overrides: list[str], steps: int, repeats: int) -> dict[str, Any]:
    """What was timed, where, and the seconds of every case in every repeat."""
    config = load_run(run, overrides)
    memory, left_out = {}, []
    # first: a process starts with the peak of the one that starts it
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for method in METHODS:
            try:
                memory[method] = pool.apply(peak, (run, overrides, method))
            except ConfigError as error:  # such as a method of two outputs and a network of one
                left_out.append(f"{method}: {error}")
    cases = {f"{m} {p}": Case(config, m, p) for m in memory for p in PRECISIONS}
    with library_kernels():
        cases |= {f"library {p}": Case(config, UNIT, p) for p in PRECISIONS}
    passes = {method: cases[f"{method} fp32"].passes() for method in memory}
    for case in cases.values():
        case.seconds(1)  # warm-up: memory, autotuning
    rounds = []
    for number in range(repeats):
        rounds.append({name: case.seconds(steps) for name, case in cases.items()})
        rounds[-1]["loader"] = loader_seconds(config, 10 * steps)
        print(f"repeat {number + 1}/{repeats}", {key: round(value, 4) for key, value in rounds[-1].items()}, flush=True)
    used = cases[f"{UNIT} bf16"].runtime
    machine = used.describe() | {"workers": used.workers, "udas": __version__, "torch": torch.__version__}
    setting = {"run": run, "overrides": overrides, "steps": steps, "repeats": repeats}
    setting |= first_segmentation(config).model_dump(mode="json", include={"network", "training"})
    timed = {"passes": passes, "memory": memory, "seconds": rounds}
    return {"machine": machine, "setting": setting, "left_out": left_out} | timed


class Ratios:
    """Ratios of seconds per step, taken within a repeat."""

    def __init__(self, rounds: list[dict[str, float]]) -> None:
        self.rounds = rounds
        self.middle = {case: median(times[case] for times in rounds) for case in rounds[0]}

    def of(self, above: str, below: str) -> list[float]:
        """One ratio per repeat."""
        return [times[above] / times[below] for times in self.rounds]

    def text(self, above: str, below: str) -> str:
        """Median (lowest to highest)."""
        values = self.of(above, below)
        return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(result: dict[str, Any]) -> str:
    """The Markdown table, with the setting and the machine below."""
    ratios, setting = Ratios(result["seconds"]), result["setting"]
    head = (
        "| method | forward + backward | by passes | bf16 / unit | measured / passes | fp32 / bf16 | s/step bf16 | MB |"
    )
    lines = [head, "|---|---|---:|---|---:|---|---:|---:|"]
    unit = _cost(*result["passes"][UNIT])
    for method, (forward, backward) in result["passes"].items():
        bf16, expected = f"{method} bf16", _cost(forward, backward) / unit
        excess = median(ratios.of(bf16, f"{UNIT} bf16")) / expected
        cells = [method, f"{forward} + {backward}", f"{expected:.2f}", ratios.text(bf16, f"{UNIT} bf16")]
        cells += [f"{excess:.2f}", ratios.text(f"{method} fp32", bf16), f"{ratios.middle[bf16]:.3g}"]
        lines.append(_row([*cells, f"{result['memory'][method]:.0f}"]))
    fastest = min((f"{method} bf16" for method in result["passes"]), key=lambda case: ratios.middle[case])
    notes = f"""
* forward + backward: passes of a step through the networks that learn the task, one batch each; critics come on top.
  By passes: a backward pass counts as two forward ones, in units of `{UNIT}` on synthetic pictures.
* Ratios of seconds per step: median (lowest to highest), {setting["repeats"]} repeats x {setting["steps"]} steps. bf16
  is with channels_last.
* MB: peak memory of two steps in bf16, on the device, or beyond what the process had when it started.
* The unit with PyTorch's own depthwise kernels / with ours: bf16 {ratios.text("library bf16", f"{UNIT} bf16")}, fp32
  {ratios.text("library fp32", f"{UNIT} fp32")}.
* Loader alone, on the unit's pictures: {1 / ratios.middle["loader"]:.3g} batches/s. Fastest training step ({fastest})
  / one batch of the loader: {ratios.text(fastest, "loader")}.
* `{setting["run"]}` {" ".join(setting["overrides"])}; network and training settings in speed.json
* {", ".join(f"{key} {value}" for key, value in result["machine"].items() if key != "precision")}
"""
    return "\n".join(lines) + "\n" + notes + "".join(f"* Left out: {why}\n" for why in result["left_out"])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cost(forward: int, backward: int) -> int:
    return forward + 2 * backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="demo", help="run file or preset")
    parser.add_argument("overrides", nargs="*", help="changes to it, as key=value")
    parser.add_argument("--out", type=Path, required=True, help="folder for speed.md and speed.json")
    parser.add_argument("--steps", type=int, default=5, help="training steps per case and repeat")
    parser.add_argument("--repeats", type=int, default=5, help="how often every case is timed")
    given = parser.parse_intermixed_args()
    changes = (DEMO if given.run == "demo" else []) + given.overrides
    result = measure(given.run, changes, given.steps, given.repeats)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
    (given.out / "speed.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
