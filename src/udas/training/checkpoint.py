"""Checkpoints that survive a kill at any moment: safetensors written beside and renamed over the old file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from udas.errors import RunError
from udas.methods.base import Method
from udas.storage import write_atomically
from udas.taxonomy import differences
from udas.training.engine import TrainingEngine

FORMAT = 3


@dataclass(frozen=True)
class Progress:
    """Where a training stands: steps done, and the best validation so far (shown only, never used)."""

    step: int = 0
    best_miou: float = -1.0
    seconds: float = 0.0


def save_checkpoint(path: Path, method: Method[Any], engine: TrainingEngine, progress: Progress) -> None:
    """Write networks, buffers, the engine's state and progress into one file."""
    tensors = {f"method/{name}": tensor for name, tensor in method.state_dict().items()}
    tensors |= {f"engine/{name}": tensor for name, tensor in engine.state().items()}
    meta = {"format": FORMAT, "progress": vars(progress), "classes": method.task.taxonomy.classes}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(plain, metadata={"udas": json.dumps(meta)}))


def load_checkpoint(path: Path, method: Method[Any], engine: TrainingEngine) -> Progress:
    """Restore what `save_checkpoint` wrote.

    Raises:
        RunError: when the file is broken, of another format version, another label space or another network.
    """
    tensors, meta = _read(path)
    if meta["format"] != FORMAT:
        raise RunError(f"{path}: checkpoint format {meta['format']}, this version reads {FORMAT}")
    if tuple(meta["classes"]) != method.task.taxonomy.classes:
        detail = differences(meta["classes"], method.task.taxonomy.classes)
        raise RunError(f"{path}: checkpoint of another label space: {detail}; remove it to start the stage again")
    own = _below("method/", tensors)
    try:
        method.load_state_dict(own)
    except RuntimeError:
        raise RunError(_difference(path, method.state_dict(), own)) from None
    engine.load(_below("engine/", tensors))
    return Progress(**meta["progress"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads(file.metadata()["udas"])
            if meta["format"] == FORMAT:  # of another one no more is known
                itemgetter("classes", "progress")(meta)
            return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path}: not a checkpoint of udas, or a broken one ({error}); delete it to start again"
        ) from None


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _difference(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    wrong = [name for name in expected.keys() | found.keys() if _shape(expected, name) != _shape(found, name)]
    shown = ", ".join(f"{name}: {_shape(found, name)} -> {_shape(expected, name)}" for name in sorted(wrong)[:3])
    return f"{path}: checkpoint of another network; {len(wrong)} tensors differ, such as {shown}"


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
