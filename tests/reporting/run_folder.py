"""Run folders as a pipeline leaves them, drawn and invented: nothing is trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = {
    "sky": (70, 130, 180),
    "building": (70, 70, 70),
    "vegetation": (107, 142, 35),
    "road": (128, 64, 128),
    "person": (220, 20, 60),
    "car": (0, 0, 142),
    "train": (0, 80, 100),
}
NAMES = list(CLASSES)
SIZE = (512, 256)  # width, height


def scene(seed: int) -> np.ndarray:
    """Class ids [H, W] of a street drawn from `seed`."""
    rng, (width, height) = np.random.default_rng(seed), SIZE
    image = Image.new("L", SIZE, 0)
    draw = ImageDraw.Draw(image)
    for left in range(0, width, 64):
        draw.rectangle([left, int(rng.integers(20, 120)), left + 60, 170], fill=1)
    for _ in range(3):
        x = int(rng.integers(0, width))
        draw.ellipse([x, 100, x + 70, 175], fill=2)
    draw.polygon([(0, height), (0, 160), (width, 160), (width, height)], fill=3)
    for kind, wide, high in ((5, 80, 36), (5, 60, 28), (4, 12, 44), (4, 14, 50)):
        x, y = int(rng.integers(0, width - wide)), int(rng.integers(150, 210))
        draw.rectangle([x, y - high // 2, x + wide, y + high // 2], fill=kind)
    return np.asarray(image)


def worsened(label: np.ndarray, wrong: float, seed: int) -> np.ndarray:
    """`label` with blobs of wrong classes over about `wrong` of its area."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (16, 32), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    return np.where(np.asarray(blobs) < 255 * wrong, rng.integers(0, 6), label).astype(np.uint8)


def coloured(label: np.ndarray) -> Image.Image:
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(NAMES)] = list(CLASSES.values())
    return Image.fromarray(palette[label])


def photographed(label: np.ndarray, seed: int, warm: float = 1.0) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 6, (*label.shape, 3))
    shaded = np.asarray(coloured(label).filter(ImageFilter.GaussianBlur(2))) * [warm, 1, 1] * 0.7 + 50 + noise
    return Image.fromarray(shaded.clip(0, 255).astype(np.uint8))


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, compress_level=1)


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def manifest(folder: Path, kind: str, **changes: Any) -> None:
    content = {
        "stage": folder.name,
        "kind": kind,
        "title": folder.name.replace("_", " ").capitalize(),
        "state": "done",
        "fingerprint": f"f00d{abs(hash(folder.name)):x}",
        "uses": {},
        "seconds": 4321.0,
        "machine": {"host": "larch", "device": "NVIDIA L4", "processes": 1},
        "versions": {"udas": "0.1.0", "torch": "2.11.0"},
        "method": None,
        "steps": None,
    }
    dump(folder / "manifest.json", content | changes)


def add_train(run: Path, name: str, level: float, steps: int = 3000, losses: int = 3, **changes: Any) -> None:
    rng = np.random.default_rng(len(name))
    lines: list[dict[str, Any]] = []
    for step in range(20, steps + 1, 20):
        values = {n: 2 * math.exp(-step / 700 / k) + rng.uniform(0, 0.2) for k, n in enumerate(LOSSES[:losses], 1)}
        lines.append({"step": step, "seconds": step / 4, "losses": values, "lr": {"segmenter": 3e-4}, "rate": 4.0})
        if step % 300 == 0:
            miou = level * (1 - math.exp(-step / 800)) + rng.uniform(-0.01, 0.01)
            lines.append({"step": step, "val": {"miou": miou, "pixel_accuracy": 0.9, "iou": {}}})
    manifest(run / name, "train", **{"method": "udas", "steps": steps} | changes)
    (run / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


LOSSES = ("source", "adversarial", "cutmix", "critic")


def add_evaluation(run: Path, model: str, wrong: float, pictures: int = 3, **changes: Any) -> None:
    folder = run / f"evaluate_{model}"
    confusion = np.zeros((len(NAMES), len(NAMES)), np.int64)
    for k in range(pictures):
        truth = scene(k)
        prediction = worsened(truth, wrong, seed=k + 100)
        np.add.at(confusion, (truth, prediction), 1)
        save(photographed(truth, k), folder / f"pictures/{k}/input.png")
        save(coloured(truth), folder / f"pictures/{k}/truth.png")
        save(coloured(prediction), folder / f"pictures/{k}/prediction.png")
        sure = np.where(truth == prediction, 230, 90).astype(np.uint8)
        save(Image.fromarray(sure).filter(ImageFilter.GaussianBlur(3)), folder / f"pictures/{k}/confidence.png")
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    iou = {n: float(confusion[i, i] / union[i]) if union[i] else None for i, n in enumerate(NAMES)}
    miou = float(np.mean([value for value in iou.values() if value is not None]))
    result = {"domain": "frankfurt", "split": "val", "protocol": "whole", "pictures": 500, "miou": miou}
    result |= {"interval": [miou - 0.02, miou + 0.015]}
    result |= {"pixel_accuracy": float(confusion.trace() / confusion.sum()), "iou": iou, "absent": ["train"]}
    result |= {"confusion": confusion.tolist(), "shown": [f"frankfurt/{k:06d}" for k in range(pictures)]}
    result |= {"classes": NAMES, "colours": list(CLASSES.values())}
    manifest(folder, "evaluate", uses={"model": model}, title=model.replace("_", " ").capitalize(), seconds=95.0)
    dump(folder / "evaluation.json", result | changes)


def add_labels(run: Path, name: str, model: str, wrong: float, shown: int = 3) -> None:
    by_class = {n: 0.9 - 0.1 * i for i, n in enumerate(NAMES)}
    quality = {"miou": 0.612, "coverage": 0.705, "accuracy": 0.951, "iou": {n: v / 1.1 for n, v in by_class.items()}}
    manifest(run / name, "label", uses={"teacher": model}, seconds=640.0)
    content = {"kept": by_class, "kept_total": 0.734, "thresholds": dict.fromkeys(NAMES, 0.9), "confidence": by_class}
    dump(run / name / "statistics.json", content | {"quality": quality})
    for k in range(shown):
        truth = scene(k)
        folder, kept = run / name / f"preview/{k}", worsened(truth, wrong, k + 300) == truth
        save(photographed(truth, k).resize((256, 128)), folder / "input.png")
        save(coloured(np.where(kept, truth, 255)), folder / "label.png")
        save(Image.fromarray((kept * 160 + 60).astype(np.uint8)), folder / "confidence.png")
        save(coloured(truth), folder / "truth.png")


def add_translation(run: Path) -> None:
    manifest(run / "translate", "translate", uses={"model": "style"}, seconds=1800.0)
    for k in range(3):
        save(photographed(scene(k + 50), k), run / f"translate/preview/{k}/original.png")
        save(photographed(scene(k + 50), k, warm=1.5), run / f"translate/preview/{k}/translated.png")


def full_run(run: Path, shown: int = 3) -> Path:
    add_train(run, "style", 0.0, losses=4, method="cyclegan", title="Style")
    log = run / "style/log.jsonl"
    log.write_text("\n".join(line for line in log.read_text().splitlines() if "val" not in line))
    add_translation(run)
    add_train(run, "source_only", 0.4)
    add_train(run, "teacher", 0.55, uses={"source": "translate"})
    add_labels(run, "label_1", "teacher", 0.25, shown)
    add_train(run, "student_1", 0.62, losses=1, uses={"labels": "label_1", "start": "teacher"}, method="supervised")
    for model, wrong in (("source_only", 0.45), ("teacher", 0.36), ("student_1", 0.28)):
        add_evaluation(run, model, wrong, shown)
    text = "name: demo\nseed: 7\ndata:\n  source: {preset: streets_game}\n  target: {preset: streets_camera}\n"
    (run / "run.yaml").write_text(text + "stages: [style, translate, source_only, teacher, label_1, student_1]\n")
    return run
