"""Feature vectors in the plane, in the colours of their classes, with the prototypes among them."""

from __future__ import annotations

import io
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from udas.errors import ConfigError
from udas.taxonomy import Taxonomy

Projection = Literal["auto", "umap", "tsne", "pca"]
LIBRARIES = {"umap": ("umap", "umap-learn"), "tsne": ("sklearn", "scikit-learn")}
"""Projection -> the module it needs, and what to install."""


def scatter(
    features: Tensor, label: Tensor, prototypes: Tensor, taxonomy: Taxonomy, shown: list[int], projection: str
) -> bytes:
    """Draw features (dots) and prototypes (diamonds) of the classes `shown`.

    Args:
        features: [N, D].
        label: [N] class ids.
        prototypes: [C, D]; rows of zeros are not drawn.
        taxonomy: names and colours.
        shown: ids of the classes that are drawn; the others take no part in the projection.
        projection: how D dimensions become two: umap, tsne or pca.

    Returns:
        A PNG.
    """
    dots = torch.isin(label, torch.tensor(shown))
    seen = [k for k in shown if prototypes[k].any()]
    places = _project(torch.cat([features[dots], prototypes[seen]]).numpy(), projection)
    split = int(dots.sum())
    return _draw(places[:split], label[dots].numpy(), places[split:], seen, taxonomy)


def choose(projection: Projection) -> str:
    """The projection to use; auto = umap where it is installed, else pca.

    Raises:
        ConfigError: the one asked for is not installed.
    """
    if projection == "auto":
        return "umap" if find_spec("umap") else "pca"
    module, package = LIBRARIES.get(projection, (None, None))
    if module and not find_spec(module):
        raise ConfigError(f"projection: {projection} needs {package}; pip install {package}, or take pca")
    return projection


def _project(vectors: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """[N, D] -> [N, 2]."""
    if len(vectors) < 3 or vectors.shape[1] < 2:  # nothing to choose a plane from
        return np.pad(vectors[:, :2], ((0, 0), (0, max(0, 2 - vectors.shape[1]))))
    if name == "pca":
        return _principal(vectors)
    return _learnt(vectors, name)


def _principal(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The two directions of largest variance; of each, the sign that makes its largest part positive."""
    centred = vectors - vectors.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    axes *= np.sign(axes[np.arange(2), np.abs(axes).argmax(1)])[:, None]
    projected: NDArray[np.float32] = centred @ axes.T
    return projected


def _learnt(vectors: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    if name == "umap":
        method = import_module("umap").UMAP(random_state=0)
    else:
        method = import_module("sklearn.manifold").TSNE(random_state=0, perplexity=min(30, (len(vectors) - 1) / 3))
    return np.asarray(method.fit_transform(vectors), np.float32)


def _draw(
    dots: NDArray[np.float32],
    label: NDArray[np.int64],
    marks: NDArray[np.float32],
    seen: list[int],
    taxonomy: Taxonomy,
) -> bytes:
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    colours = taxonomy.palette() / 255
    axes.scatter(dots[:, 0], dots[:, 1], s=8, c=colours[label], alpha=0.5, linewidths=0)
    for k, (x, y) in zip(seen, marks, strict=True):
        axes.scatter(
            x, y, s=90, marker="D", color=colours[k], edgecolors="black", linewidths=1.2, label=taxonomy.classes[k]
        )  # fmt: skip
    if seen:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
