"""One network, used outside a run: score it, label with it, segment files with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rich.console import Console

from udas.config import DomainConfig
from udas.data.dataset import Domain, PictureSet, domain_settings
from udas.data.streets import as_rendered
from udas.errors import RunError
from udas.evaluation.evaluate import SHOWN, evaluate
from udas.evaluation.protocols import ProtocolConfig
from udas.evaluation.table import table
from udas.networks.segmenters import Segmenter
from udas.networks.weights import load_segmenter
from udas.pipeline.context import render_streets
from udas.pipeline.label import LabelConfig, label
from udas.pipeline.models import placed
from udas.predict import predict
from udas.storage import write_atomically
from udas.taxonomy import Taxonomy, load_taxonomy
from udas.training.log import Bar
from udas.training.runtime import Runtime, RuntimeConfig
from udas.validation import validate


def open_domain(data: str, root: str | None, taxonomy: str | Taxonomy | None) -> Domain:
    """A data set by preset or YAML file, in a label space; None is the one its `map` leads to.

    Of the embedded streets, what a folder holds already is taken as it is: it may belong to a run.
    """
    settings = domain_settings(data) | ({"root": root} if root else {})
    config = validate(DomainConfig, settings, data)
    taxonomy = config.taxonomy if taxonomy is None else taxonomy
    domain = Domain(config, load_taxonomy(taxonomy) if isinstance(taxonomy, str) else taxonomy)
    if config.streets is None:
        return domain
    streets = as_rendered(config.streets, domain.root)
    render_streets(config.name, streets, domain.root)
    return Domain(config.model_copy(update={"streets": streets}), domain.taxonomy)


def evaluate_model(model: Path, data: str, root: str | None, split: str, protocol: str, out: Path) -> None:
    """Score a network, print its table, and write `evaluation.json` and pictures to `out`."""
    segmenter, taxonomy, runtime = _load(model)
    settings = validate(ProtocolConfig, {"preset": protocol}, "protocol")
    pictures = open_domain(data, root, taxonomy).labelled(split, "all")
    _clear(out)
    with Bar("evaluate", len(pictures), unit="pictures") as bar:
        result = evaluate(
            placed(segmenter, runtime), pictures, taxonomy, settings, runtime.device, out, split, progress=bar
        )
    console = Console()
    console.print(table([(model.parent.name, result.summary())]), markup=False, highlight=False)
    console.print(f"confusion matrix and pictures: {out / 'evaluation.json'}", soft_wrap=True, highlight=False)


def _clear(out: Path) -> None:
    """Remove the pictures of an earlier evaluation in `out`, as many as it says it wrote, and nothing else."""
    try:
        shown = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["shown"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for number in range(len(shown)):
        for name in SHOWN:
            (out / "pictures" / str(number) / f"{name}.png").unlink(missing_ok=True)


def label_pictures(model: Path, data: str, root: str | None, split: str, rule: LabelConfig, out: Path) -> None:
    """Write pseudo-labels of a split to `out`; what a stopped call left there is gone on with.

    Raises:
        RunError: `out` holds labels of another network, rule or set of pictures.
    """
    segmenter, taxonomy, runtime = _load(model)
    pictures = open_domain(data, root, taxonomy).unlabelled(split)
    _claim(out, model, rule, pictures)
    with Bar("label", len(pictures), unit="pictures") as bar:
        statistics = label(placed(segmenter, runtime), pictures, taxonomy, rule, out, runtime.device, bar)
    kept = f"{len(pictures)} pictures, {statistics['kept_total']:.0%} of pixels kept, in {out}"
    Console().print(f"{kept}; thresholds and shares per class: statistics.json", soft_wrap=True, highlight=False)


def _claim(out: Path, model: Path, rule: LabelConfig, pictures: PictureSet) -> None:
    """Note in `out` what is labelled there by what; refuse a folder where that is something else."""
    note = out / "origin.json"
    digest = hashlib.blake2b(model.read_bytes(), digest_size=12).hexdigest()
    origin = {"model": digest, "rule": rule.model_dump(mode="json"), "pictures": pictures.fingerprint()}
    try:
        found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    except json.JSONDecodeError:
        found = None
    if found != origin and out.exists() and any(out.iterdir()):
        raise RunError(f"{out}: holds something else, such as labels of another network or rule; choose another --out")
    write_atomically(note, json.dumps(origin, indent=1).encode())


def predict_files(model: Path, inputs: list[str], out: Path, overlay: bool) -> None:
    """Segment files, folders and globs into `out`."""
    segmenter, taxonomy, runtime = _load(model)
    with Bar("predict", 1, unit="pictures") as bar:
        predict(placed(segmenter, runtime), taxonomy, inputs, out, runtime.device, overlay=overlay, progress=bar)
    Console().print(f"masks{', overlays' if overlay else ''} and legend.png in {out}")


def _load(model: Path) -> tuple[Segmenter, Taxonomy, Runtime]:
    segmenter, taxonomy = load_segmenter(model)
    return segmenter, taxonomy, Runtime.start(RuntimeConfig())
