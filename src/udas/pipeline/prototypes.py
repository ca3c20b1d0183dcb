"""Prototypes of a trained network: the mean feature of every class on unlabelled pictures, and a look at the features.

ProDA (Zhang et al., CVPR 2021, Section 3): eta_k is the mean, over the pictures in which the network predicts at least
`minimum` pixels of class k, of the mean feature of those pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from udas.config import Config
from udas.data.dataset import PictureSet
from udas.data.sampling import seed_of
from udas.errors import RunError, WeightsError
from udas.methods.prototypes import class_means
from udas.networks.segmenters import Outputs
from udas.pipeline.label_files import write_json
from udas.pipeline.label_work import ahead
from udas.reporting.scatter import Projection, choose, scatter
from udas.storage import write_atomically
from udas.taxonomy import Taxonomy

PROTOTYPES, FEATURES, SCATTER = "prototypes.safetensors", "features.safetensors", "scatter.png"

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all) of this process."""


class PrototypesConfig(Config):
    """How prototypes are collected."""

    minimum: int = Field(10, ge=1, description="pixels, at the features' size, that a class must have in a picture")
    sample: int = Field(200, ge=1, description="feature vectors per class that are kept for the scatter plot")
    classes: list[str] | None = Field(None, description="classes of the scatter plot; null = all")
    projection: Projection = Field("auto", description="umap, tsne or pca; auto = umap where it is installed, else pca")
    seed: int = Field(0, description="seed of the sample")


class Describes(Protocol):
    """A segmentation network, or what wraps one for inference."""

    def outputs(self, image: Tensor) -> Outputs:
        """RGB [B, 3, H, W] in [0, 1] -> logits and the features before the classifier."""


@torch.inference_mode()
def collect_prototypes(
    model: Describes,
    pictures: PictureSet,
    taxonomy: Taxonomy,
    config: PrototypesConfig,
    folder: Path,
    device: torch.device,
    progress: Progress | None = None,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any]:
    """Collect what `load_prototypes` reads, a sample of features and a plot of them; begins anew after a kill.

    Writes `prototypes.safetensors` (`prototypes` [C, D] float32, zero for a class that was never seen; `count` [C]
    int64, pictures that each is the mean over), `features.safetensors` (`features` [N, D] float32 and `label` [N]
    int64, at most `sample` per class, every pixel of a class being as likely), `scatter.png` and `statistics.json`.

    Args:
        model: the network; a module is put into evaluation mode.
        pictures: seen whole, one at a time; labels, if there are any, are not read.
        taxonomy: the label space of the run.
        config: the settings.
        folder: of this stage.
        device: where the model is.
        progress: told about every finished picture of this process.
        rank: this process; with `world` > 1 a process group must be up. Pictures i with i mod world = rank are its own.
        world: number of processes.

    Returns:
        The content of `statistics.json`: pictures; count by class; projection of the plot.

    Raises:
        ConfigError: an unknown class in `classes`, or a projection that is not installed.
        RunError: the model is of another label space or its features are not finite.
        DataError: a picture cannot be read.
    """
    shown = [taxonomy.index(name) for name in config.classes or taxonomy.classes]
    projection = choose(config.projection)
    if isinstance(model, nn.Module):
        model.eval()
    mine = range(rank, len(pictures), world)
    part: _Part | None = None
    for done, (index, image) in enumerate(ahead(lambda k: (k, pictures.image(k)), mine), 1):
        name = pictures.pictures[index].name
        features, label = _see(model, image.to(device), name, len(taxonomy.classes))
        part = part or _Part(len(taxonomy.classes), features.shape[1])
        part.add(features, label, _keys(config.seed, name, label.numel()), config)
        if progress is not None:
            progress(done, len(mine))
    if (everything := _gather(part, folder, rank, world, config.sample)) is not None:
        _write(everything, taxonomy, shown, projection, len(pictures), folder)
    if world > 1:
        dist.barrier()
    content: dict[str, Any] = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))
    return content


def load_prototypes(folder: Path) -> Tensor:
    """[C, D] float32 of a finished stage; zero for classes that were never seen. Raises `WeightsError`."""
    path = folder / PROTOTYPES
    try:
        return load_file(path)["prototypes"]
    except (OSError, SafetensorError, KeyError) as error:
        raise WeightsError(f"{path}: not a readable file of prototypes ({error})") from error


# ------------------------------------------------------------------------------------------- what a process has seen


class _Part:
    """Sums over pictures, and a sample of their pixels: per class those with the smallest random keys.

    A pixel's key follows from (seed, picture, place), so that the sample of several processes is that of one.

    total: [C, D] float64, sum of the pictures' mean features.
    count: [C] int64, pictures in `total`.
    keys, label, features: of the sample, [N] float64, [N] int64 and [N, D] float32.
    """

    def __init__(self, classes: int, channels: int) -> None:
        self.total = torch.zeros(classes, channels, dtype=torch.float64)
        self.count = torch.zeros(classes, dtype=torch.int64)
        self.keys, self.label = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
        self.features = torch.zeros(0, channels)

    def add(self, features: Tensor, label: Tensor, keys: Tensor, config: PrototypesConfig) -> None:
        """Add one picture: features [1, D, h, w], label [1, h, w], keys [h w]."""
        means, pixels = (found[0].cpu() for found in class_means(features, label, len(self.count)))
        enough = pixels >= config.minimum
        self.total += torch.where(enough[:, None], means, 0)
        self.count += enough
        self._draw(keys, label.flatten().cpu(), features[0].flatten(1).T.float().cpu(), config.sample)

    def merge(self, other: dict[str, Tensor], sample: int) -> None:
        """Add what another process has seen, as `tensors` gives it."""
        self.total += other["total"]
        self.count += other["count"]
        self._draw(other["keys"], other["label"], other["features"], sample)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        return {name: tensor.contiguous() for name, tensor in vars(self).items()}

    def _draw(self, keys: Tensor, label: Tensor, features: Tensor, sample: int) -> None:
        keys, label = torch.cat([self.keys, keys]), torch.cat([self.label, label])
        order = keys.argsort()
        kept = torch.cat([order[label[order] == k][:sample] for k in range(len(self.count))])
        self.keys, self.label = keys[kept], label[kept]
        self.features = torch.cat([self.features, features])[kept]


def _see(model: Describes, image: Tensor, name: str, classes: int) -> tuple[Tensor, Tensor]:
    """Features [1, D, h, w] of a picture [3, H, W] and what the network says there, [1, h, w]."""
    outputs = model.outputs(image[None].float() / 255)
    logits, features = outputs.levels[0], outputs.representation
    if logits.shape[1] != classes:
        raise RunError(f"the network predicts {logits.shape[1]} classes, but the label space has {classes}")
    if not features.isfinite().all():
        raise RunError(f"{name}: the network's features are not finite; check its weights, or use fp32")
    return features, outputs.labels()


def _keys(seed: int, name: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of(seed, "features", name))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _gather(part: _Part | None, folder: Path, rank: int, world: int, sample: int) -> _Part | None:
    """What all processes have seen, in the main one; the others get None."""
    if world == 1:
        return part
    own = folder / f"part-{rank}.safetensors"
    write_atomically(own, save({} if part is None else part.tensors()), durable=False)
    dist.barrier()
    if rank:
        return None
    for other in range(1, world):
        path = folder / f"part-{other}.safetensors"
        tensors = load_file(path)
        if tensors:
            assert part is not None
            part.merge(tensors, sample)
        path.unlink()
    own.unlink()
    return part


# ------------------------------------------------------------------------------------------------- what is written


def _write(part: _Part, taxonomy: Taxonomy, shown: list[int], projection: str, pictures: int, folder: Path) -> None:
    mean = (part.total / part.count.clamp(min=1)[:, None]).float()
    write_atomically(folder / PROTOTYPES, save({"prototypes": mean, "count": part.count}))
    write_atomically(folder / FEATURES, save({"features": part.features, "label": part.label}))
    write_atomically(folder / SCATTER, scatter(part.features, part.label, mean, taxonomy, shown, projection))
    count = dict(zip(taxonomy.classes, part.count.tolist(), strict=True))
    write_json(folder / "statistics.json", {"pictures": pictures, "count": count, "projection": projection})
