"""Trained networks on disk: one safetensors file that says what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from udas.config import NetworkConfig
from udas.errors import ConfigError, WeightsError
from udas.networks.segmenters import Segmenter, build_segmenter, complete
from udas.storage import in_order, write_atomically
from udas.taxonomy import Taxonomy, differences
from udas.validation import validate

FORMAT = "udas.segmenter"
VERSION = 1
_ORIGIN = {"weights", "strict"}  # where the encoder once came from does not matter to a trained network
_TRAINING = {"norm"}  # how its batch norm learns is a choice of the next training


def save_segmenter(path: Path, segmenter: Segmenter, taxonomy: Taxonomy) -> None:
    """Write the network with its configuration, classes, colours and normalisation into one safetensors file.

    The file is replaced at once: a crash leaves the old one or the new one, never a part.

    Raises:
        RunError: the file cannot be written.
        WeightsError: the network has not as many outputs as there are classes.
    """
    if segmenter.classes != len(taxonomy.classes):
        count = len(taxonomy.classes)
        raise WeightsError(f"{path}: {segmenter.classes} outputs for the {count} classes of {taxonomy.name}")
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "network": segmenter.config.model_dump_json(),
        "taxonomy": json.dumps(asdict(taxonomy)),
        "normalisation": json.dumps(asdict(segmenter.normalisation)),
    }
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in segmenter.state_dict().items()}
    write_atomically(path, in_order(save(tensors, metadata)))


def load_segmenter(
    path: Path, network: NetworkConfig | None = None, taxonomy: Taxonomy | None = None
) -> tuple[Segmenter, Taxonomy]:
    """Rebuild a network from its file alone, on the CPU; nothing is ever downloaded.

    Args:
        path: a file of `save_segmenter`.
        network: the configuration it has to have, if that matters; `norm` is taken from here.
        taxonomy: the label space it has to have, if that matters.

    Raises:
        WeightsError: no such file, not a file of ours, broken, or made for another network or label space.
    """
    tensors, metadata = _read(path)
    try:
        config = complete(validate(NetworkConfig, json.loads(metadata["network"]), str(path)))
        found = _taxonomy(json.loads(metadata["taxonomy"]))
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its description cannot be understood: {error}") from error
    if network is not None:
        _same_network(path, config, complete(network))
        config = config.model_copy(update={key: getattr(network, key) for key in _TRAINING})
    if taxonomy is not None:
        _same_classes(path, found, taxonomy)
    segmenter = build_segmenter(config, len(found.classes), pretrained=False)
    _fill(path, segmenter, tensors)
    _same_normalisation(path, segmenter, json.loads(metadata["normalisation"]))
    return segmenter, found


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"{path}: not a segmentation network saved by udas; {_instead(metadata)}")
    if int(metadata["version"]) > VERSION:
        raise WeightsError(f"{path}: format {metadata['version']}, this udas reads up to {VERSION}; update udas")
    return tensors, metadata


def _instead(metadata: Mapping[str, str]) -> str:
    """What the file is, as far as it can be told, and what to do."""
    if "udas" in metadata:
        return "it is a checkpoint to resume from: take model.safetensors of a finished stage"
    if metadata.get("format", "").startswith("udas-translator"):
        return "it repaints pictures: name its stage in a translate stage"
    return "weights of an encoder go into network.weights"


def _taxonomy(raw: Mapping[str, Any]) -> Taxonomy:
    sources = {a: {b: tuple(c) for b, c in rules.items()} for a, rules in raw["sources"].items()}
    colours = tuple((int(r), int(g), int(b)) for r, g, b in raw["colours"])
    return Taxonomy(raw["name"], tuple(raw["classes"]), colours, sources)


def _fill(path: Path, segmenter: Segmenter, tensors: Mapping[str, Tensor]) -> None:
    state = segmenter.state_dict()
    wrong = [f"missing {key}" for key in state if key not in tensors]
    wrong += [f"left over {key}" for key in tensors if key not in state]
    wrong += [f"another shape {key}" for key in state if key in tensors and state[key].shape != tensors[key].shape]
    if wrong:
        rest = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(f"{path}: does not fit {segmenter.config.name}: {', '.join(wrong[:3])}{rest}")
    segmenter.load_state_dict(dict(tensors))


def _same_network(path: Path, found: NetworkConfig, wanted: NetworkConfig) -> None:
    have, want = (network.model_dump(exclude=_ORIGIN | _TRAINING) for network in (found, wanted))
    differences = [f"{key} is {have[key]}, not {want[key]}" for key in want if have[key] != want[key]]
    if differences:
        raise WeightsError(f"{path}: another network: {'; '.join(differences)}")


def _same_classes(path: Path, found: Taxonomy, wanted: Taxonomy) -> None:
    if found.classes == wanted.classes:
        return
    detail = differences(found.classes, wanted.classes)
    advice = f"take a network that was trained for {wanted.name}"
    raise WeightsError(f"{path}: made for the classes of {found.name}, not of {wanted.name}: {detail}; {advice}")


def _same_normalisation(path: Path, segmenter: Segmenter, stored: Mapping[str, Any]) -> None:
    used = json.loads(json.dumps(asdict(segmenter.normalisation)))
    if used != stored:
        raise WeightsError(f"{path}: its description says normalisation {stored}, its tensors say {used}")
