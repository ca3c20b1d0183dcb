"""One network, used outside a run: score it, label with it, segment files with it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from udas.config import DomainConfig
from udas.data.dataset import Domain, domain_settings
from udas.evaluation.evaluate import evaluate
from udas.evaluation.protocols import ProtocolConfig
from udas.evaluation.table import table
from udas.networks.segmenters import Segmenter
from udas.networks.weights import load_segmenter
from udas.pipeline.label import LabelConfig, label
from udas.pipeline.models import placed
from udas.predict import predict
from udas.taxonomy import Taxonomy, load_taxonomy
from udas.training.log import Bar
from udas.training.runtime import Runtime, RuntimeConfig
from udas.validation import validate


def open_domain(data: str, root: str | None, taxonomy: str | Taxonomy | None) -> Domain:
    """A data set by preset or YAML file, in a label space; None is the one its `map` leads to."""
    settings = domain_settings(data) | ({"root": root} if root else {})
    config = validate(DomainConfig, settings, data)
    taxonomy = config.taxonomy if taxonomy is None else taxonomy
    return Domain(config, load_taxonomy(taxonomy) if isinstance(taxonomy, str) else taxonomy)


def evaluate_model(model: Path, data: str, root: str | None, split: str, protocol: str, out: Path) -> None:
    """Score a network, print its table, and write `evaluation.json` and pictures to `out`."""
    segmenter, taxonomy, runtime = _load(model)
    settings = validate(ProtocolConfig, {"preset": protocol}, "protocol")
    pictures = open_domain(data, root, taxonomy).labelled(split, "all")
    with Bar("evaluate", len(pictures), unit="pictures") as bar:
        result = evaluate(
            placed(segmenter, runtime), pictures, taxonomy, settings, runtime.device, out, split, progress=bar
        )
    Console().print(table([(model.parent.name, result.summary())]), markup=False, highlight=False)


def label_pictures(
    model: Path, data: str, root: str | None, split: str, views: int, threshold: float, out: Path
) -> None:
    """Write pseudo-labels of a split to `out`."""
    segmenter, taxonomy, runtime = _load(model)
    pictures = open_domain(data, root, taxonomy).unlabelled(split)
    rule = LabelConfig(views=views, threshold=threshold)
    with Bar("label", len(pictures), unit="pictures") as bar:
        statistics = label(placed(segmenter, runtime), pictures, taxonomy, rule, out, runtime.device, bar)
    Console().print(f"{len(pictures)} pictures, {statistics['kept_total']:.0%} of pixels kept, in {out}")


def predict_files(model: Path, inputs: list[str], out: Path, overlay: bool) -> None:
    """Segment files, folders and globs into `out`."""
    segmenter, taxonomy, runtime = _load(model)
    with Bar("predict", 1, unit="pictures") as bar:
        predict(placed(segmenter, runtime), taxonomy, inputs, out, runtime.device, overlay=overlay, progress=bar)
    Console().print(f"masks{', overlays' if overlay else ''} and legend.png in {out}")


def _load(model: Path) -> tuple[Segmenter, Taxonomy, Runtime]:
    segmenter, taxonomy = load_segmenter(model)
    return segmenter, taxonomy, Runtime.start(RuntimeConfig())
