"""Training speed as ratios measured in one run: methods, bf16 with channels_last against fp32, the loader alone.

    python benchmarks/speed.py --out docs/results/speed
    python benchmarks/speed.py my_run.yaml training.batch=8 "training.augment.crop=[512, 512]" --out speed

Without a run file it takes the demo's data, rendered on first use. Every method, with its default settings, trains the
network of the run's first segmentation stage on its crops and batch. Every repeat times every case once, so that a
busy moment of the machine meets all of them; ratios are taken within a repeat.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from segmentation_models_pytorch.encoders import TimmUniversalEncoder
from torch.nn.modules.module import register_module_forward_hook

from udas import __version__
from udas.data.batch import Stream
from udas.data.loader import make_loader
from udas.names import METHODS, load_method
from udas.networks.discriminators import MultiScaleDiscriminator, NLayerDiscriminator, PatchDiscriminator
from udas.networks.generators import ResnetGenerator
from udas.pipeline.config import TrainStage, load_run
from udas.pipeline.context import Context
from udas.pipeline.stages import build_method, train_streams
from udas.training.engine import TrainingEngine
from udas.training.runtime import Runtime

UNIT = "supervised"  # on synthetic pictures alone: one pass; every other method on all streams it takes
PRECISIONS = ("fp32", "bf16")
NETWORKS = (TimmUniversalEncoder, ResnetGenerator)
CRITICS = (PatchDiscriminator, MultiScaleDiscriminator, NLayerDiscriminator)
DEMO = ["training.batch=4", "training.augment.crop=[128, 128]"]
for domain in ("source", "target"):
    DEMO += [f"data.{domain}.root=runs/speed/data/{domain}", f"data.{domain}.streets.pictures={{train: 32, val: 4}}"]


class Case:
    """One method in one precision, on one batch that stays on the device."""

    def __init__(self, context: Context, name: str, base: TrainStage) -> None:
        self.runtime, training = context.runtime, base.training
        streams = [Stream.SOURCE] if name == UNIT else None
        stage = TrainStage(method={"name": name}, streams=streams, network=base.network, training=training)
        pictures = train_streams(context, name, stage)
        self.loading = pictures, {stream: training.batch_of(stream) for stream in pictures}, training.augment
        self.method = self.runtime.place(build_method(context, name, stage)).train()
        self.engine = TrainingEngine(self.method, self.runtime, training.steps)
        self.batch = next(iter(make_loader(*self.loading, 0, 0, 1))).to(self.runtime.device, self.runtime.memory_format)

    def seconds(self, steps: int) -> float:
        """Seconds per training step."""
        began = time.perf_counter()
        for step in range(steps):
            self.engine.begin(step)
            with self.runtime.autocast():
                self.method.step(self.batch)
        self.engine.take_losses()  # waits for the device
        return (time.perf_counter() - began) / steps

    def passes(self) -> str:
        """Forward passes of one step: through the networks that learn the task + through critics."""
        seen: list[torch.nn.Module] = []
        hook = register_module_forward_hook(lambda part, *_: seen.append(part))
        self.seconds(1)
        hook.remove()
        return " + ".join(str(sum(isinstance(part, kinds) for part in seen)) for kinds in (NETWORKS, CRITICS))

    def loader_seconds(self, batches: int) -> float:
        """Seconds per batch of the loader alone, with the run's workers; the first two batches start them."""
        loader = make_loader(*self.loading, 0, 0, batches + 2, workers=self.runtime.workers)
        arrivals = [time.perf_counter() for _ in loader]
        return (arrivals[-1] - arrivals[1]) / batches


def measure(run: str, overrides: list[str], steps: int, repeats: int) -> dict:
    """What was timed, where, and the seconds of every case in every repeat."""
    config = load_run(run, overrides)
    trainings = [stage for stage in config.stages.values() if isinstance(stage, TrainStage)]
    base = next(stage for stage in trainings if load_method(stage.method.name).makes == "segmenter")
    runtimes = {p: config.runtime.model_copy(update={"precision": p, "channels_last": p == "bf16"}) for p in PRECISIONS}
    contexts = {p: Context(config, Path("runs/speed"), Runtime.start(runtime)) for p, runtime in runtimes.items()}
    cases = {f"{m} {p}": Case(context, m, base) for m in METHODS for p, context in contexts.items()}
    passes = {method: cases[f"{method} fp32"].passes() for method in METHODS}
    for case in cases.values():
        case.seconds(1)  # warm-up: memory, autotuning
    rounds = []
    for number in range(repeats):
        rounds.append({name: case.seconds(steps) for name, case in cases.items()})
        rounds[-1]["loader"] = cases[f"{UNIT} bf16"].loader_seconds(10 * steps)
        print(f"repeat {number + 1}/{repeats}", {key: round(value, 4) for key, value in rounds[-1].items()}, flush=True)
    runtime = contexts["bf16"].runtime
    machine = runtime.describe() | {"workers": runtime.workers, "udas": __version__, "torch": torch.__version__}
    setting = {"run": run, "overrides": overrides, "steps": steps, "repeats": repeats}
    setting |= base.model_dump(mode="json", include={"network", "training"})
    return {"machine": machine, "setting": setting, "passes": passes, "seconds": rounds}


def table(result: dict) -> str:
    """The Markdown table, with the setting and the machine below."""
    rounds, setting = result["seconds"], result["setting"]
    middle = {case: median(times[case] for times in rounds) for case in rounds[0]}

    def ratio(above: str, below: str) -> str:
        values = [times[above] / times[below] for times in rounds]
        return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    head = "| method | networks + critics | steps/s fp32 | steps/s bf16 | fp32 / bf16 | bf16 / unit |"
    lines = [head, "|---" * 6 + "|"]
    for method, passes in result["passes"].items():
        fp32, bf16 = f"{method} fp32", f"{method} bf16"
        speeds = f"{1 / middle[fp32]:.3g} | {1 / middle[bf16]:.3g}"
        lines.append(f"| {method} | {passes} | {speeds} | {ratio(fp32, bf16)} | {ratio(bf16, f'{UNIT} bf16')} |")
    fastest = min(middle.keys() - {"loader"}, key=lambda case: middle[case])
    notes = f"""
* networks + critics: forward passes of a step. Unit: `{UNIT}` on synthetic pictures. bf16 is with channels_last.
  Ratios of seconds per step: median (lowest to highest), {setting["repeats"]} repeats x {setting["steps"]} steps.
* Loader alone, on the unit's pictures: {1 / middle["loader"]:.3g} batches/s. Fastest training step ({fastest}) / one
  batch of the loader: {ratio(fastest, "loader")}.
* `{setting["run"]}` {" ".join(setting["overrides"])}; network and training settings in speed.json
* {", ".join(f"{key} {value}" for key, value in result["machine"].items() if key != "precision")}
"""
    return "\n".join(lines) + "\n" + notes


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
