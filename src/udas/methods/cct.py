"""Cross-consistency training: decoders that see perturbed features agree with the one that sees them whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self, assert_never, cast

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from udas.config import Config, SemiSupervisedConfig, Share
from udas.data.batch import IGNORE, Batch, Block, Stream
from udas.data.mixing import channel_dropout, inside_picture
from udas.data.sampling import seed_of
from udas.losses import masked_mean, outputs_cross_entropy
from udas.methods import perturbations, ramps
from udas.methods.base import Optimised, SegmentationMethod, Task, trainable
from udas.methods.domains import supervise
from udas.methods.regions import region_boxes
from udas.networks.decoder import resize
from udas.networks.pixel_shuffle import PixelShuffleHead

OBJECTS = 64  # boxes per picture that are cut at most; the largest ones

Kind = Literal["dropout", "feature_drop", "noise", "cutout", "context", "objects", "adversarial"]
"""A perturbation: the fields of `Decoders`."""


class Decoders(Config):
    """How many auxiliary decoders see each perturbation; together K."""

    dropout: int = Field(2, ge=0, description="Drop: whole channels are lost")
    feature_drop: int = Field(2, ge=0, description="F-Drop: the most active places are lost")
    noise: int = Field(2, ge=0, description="F-Noise: noise in proportion to the features")
    cutout: int = Field(2, ge=0, description="G-Cutout: a window of each object is lost")
    context: int = Field(1, ge=0, description="Con-Msk: all but the objects is lost")
    objects: int = Field(1, ge=0, description="Obj-Msk: the objects are lost")
    adversarial: int = Field(1, ge=0, description="I-VAT: a step in the direction that changes the prediction most")


class CCTConfig(SemiSupervisedConfig):
    """Settings of cross-consistency training."""

    name: Literal["cct"] = "cct"
    decoders: Decoders = Decoders()
    foreground: list[str] = Field(
        default_factory=list, description="classes that are objects, for cutout, context and objects"
    )
    consistency: float = Field(30.0, ge=0, description="omega_u, weight of L_u after its ramp")
    ramp_up: Share = Field(0.1, description="share of the training in which the weight of L_u grows")
    supervised: Literal["cross_entropy", "bootstrapped"] = Field(
        "cross_entropy", description="L_s: plain, or annealed and bootstrapped (ab-CE): sure pixels do not count"
    )
    threshold: Share = Field(
        0.9, description="`supervised: bootstrapped` only: eta at the end of its growth, from 1 / C on"
    )
    annealing: Share = Field(
        0.4, description="`supervised: bootstrapped` only: share of the training in which eta grows"
    )
    drop: float = Field(0.5, ge=0, lt=1, description="Drop: probability that a channel is lost")
    active: tuple[Share, Share] = Field(
        (0.7, 0.9), description="F-Drop: range of the threshold as a share of the maximum: from, to"
    )
    strength: float = Field(0.3, ge=0, description="F-Noise: n ~ U(-strength, strength)")
    erase: Share = Field(0.4, description="G-Cutout: sides of the window, as shares of the object's")
    outline: float = Field(50.0, ge=0, description="G-Cutout: pixels of outline above which a region is an object")
    epsilon: float = Field(2.0, ge=0, description="I-VAT: epsilon, length of the step")

    @field_validator("active")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("the first share is larger than the second")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        counts = self.decoders
        if not sum(dict(counts).values()):
            raise ValueError("`decoders` are all 0; without one there is no consistency (method `supervised`)")
        if counts.cutout + counts.context + counts.objects and not self.foreground:
            raise ValueError(
                "`foreground` is missing: name the classes that are objects, such as [vehicle] in street11; "
                "or set decoders.cutout, decoders.context and decoders.objects to 0"
            )
        return self


class Guide(NamedTuple):
    """What the perturbations know of the objects in the pictures, in cells of the features.

    objects: [B, h, w] bool.
    boxes: [B, K, 4], see `region_boxes`; none where no decoder asks for them.
    """

    objects: Tensor
    boxes: Tensor


class CCT(SegmentationMethod[CCTConfig]):
    """CCT (Ouali et al., CVPR 2020): L = L_s + omega(t) L_u (+ source CE(f(x_s), y_s)).

    f = g h: the network, h to its representation and g its classifier; g_k: auxiliary decoders; P_k: perturbations.

        L_s = CE(f(x_l), y_l)
        L_u = 1/K sum_k mean over classes and pixels inside the pictures of (softmax g_k(P_k(z)) - p)^2,   z = h(x_u)
        p   = softmax g(z), without gradient
        omega(t) = consistency exp(-5 (1 - min(t / T, 1))^2),   T = ramp_up * steps

    With supervised = bootstrapped, L_s counts pixels with softmax(f(x_l))_y < eta(t) alone, and
    eta = 1/C + (threshold - 1/C) (1 - exp(-5 min(t / T', 1))), T' = annealing * steps. The g_k are thrown away.
    """

    settings = CCTConfig
    needs = frozenset({Stream.LABELLED, Stream.UNLABELLED})
    optional = frozenset({Stream.SOURCE})

    def __init__(self, config: CCTConfig, task: Task) -> None:
        super().__init__(config, task)
        channels, stages = self.segmenter.decoder.channels, round(math.log2(self.segmenter.stride))
        self.kinds = [cast("Kind", kind) for kind, count in config.decoders for _ in range(count)]
        self.heads = nn.ModuleList(PixelShuffleHead(channels, self.segmenter.classes, stages) for _ in self.kinds)
        self.foreground: Tensor
        self.register_buffer("foreground", _members(config.foreground, task))

    def optimised(self) -> dict[str, Optimised]:
        """One optimiser, for the network and the auxiliary decoders, which learn as fast as its decoder."""
        network = Optimised.segmenter(self.segmenter, self.config.optimiser)
        heads = {"params": trainable(self.heads.parameters()), "factor": self.config.optimiser.head_factor}
        return {"segmenter": Optimised([*network.groups, heads], self.config.optimiser)}

    def step(self, batch: Batch) -> None:
        """Learn labels with the network, and its predictions with the auxiliary decoders."""
        labelled, unlabelled, c = batch.labelled, batch.unlabelled, self.config
        assert labelled is not None
        assert unlabelled is not None
        weight = c.consistency * ramps.exponential(self.steps_done, self._steps(c.ramp_up))
        with self.update("segmenter") as minimise:
            if batch.source is not None:
                supervise(minimise, self.segmenter, batch.source, "source", c.auxiliary, c.source)
            minimise(self._supervised(labelled), "labelled")
            minimise(weight * self._consistency(unlabelled.image, unlabelled.seeds), "consistency")

    def _supervised(self, block: Block) -> Tensor:
        """L_s."""
        assert block.label is not None
        outputs, label = self.segmenter.levels(block.image), block.label
        if self.config.supervised == "bootstrapped":
            label = unsure_labels(outputs[0], label, self._eta())
        return outputs_cross_entropy(outputs, label, auxiliary=self.config.auxiliary)

    def _eta(self) -> float:
        """eta(t)."""
        start = 1 / self.segmenter.classes
        growth = 1 - math.exp(-5 * ramps.linear(self.steps_done, self._steps(self.config.annealing)))
        return start + (self.config.threshold - start) * growth

    def _steps(self, share: float) -> int:
        return round(share * self.task.steps)

    def _consistency(self, image: Tensor, seeds: Sequence[int]) -> Tensor:
        """L_u."""
        outputs = self.segmenter.outputs(image)
        z, target = outputs.representation, outputs.levels[0].detach().softmax(1)
        guide, inside = self._guide(target, z), inside_picture(image)
        losses = []
        for number, (kind, head) in enumerate(zip(self.kinds, self.heads, strict=True)):
            own = [seed_of(seed, "decoder", number) for seed in seeds]
            seen = head(self._perturb(kind, z, guide, head, own)).float()
            seen = seen if seen.shape == target.shape else resize(seen, like=target)
            losses.append(masked_mean((seen.softmax(1) - target).square().mean(1), inside))
        return torch.stack(losses).mean()

    def _guide(self, target: Tensor, z: Tensor) -> Guide:
        """The objects that the probabilities [B, C, H, W] show."""
        objects = self.foreground[target.argmax(1)]
        objects = F.interpolate(objects[:, None].float(), size=z.shape[-2:], mode="nearest")[:, 0] > 0
        if "cutout" not in self.kinds:
            return Guide(objects, objects.new_zeros(len(objects), 0, 4))
        return Guide(objects, region_boxes(objects, OBJECTS, self.config.outline / self.segmenter.stride))

    def _perturb(self, kind: Kind, z: Tensor, guide: Guide, head: nn.Module, seeds: Sequence[int]) -> Tensor:
        """P_k(z), z [B, D, h, w]."""
        c = self.config
        match kind:
            case "dropout":
                return channel_dropout(z, seeds, c.drop, "cct")
            case "feature_drop":
                return perturbations.drop_active(z, seeds, *c.active)
            case "noise":
                return perturbations.add_noise(z, c.strength)
            case "cutout":
                return perturbations.cut_objects(z, guide.boxes, seeds, c.erase)
            case "context":
                return perturbations.hide_context(z, guide.objects)
            case "objects":
                return perturbations.hide_objects(z, guide.objects)
            case "adversarial":
                return perturbations.add_adversarial(z, head, c.epsilon)
            case _:
                assert_never(kind)


def unsure_labels(logits: Tensor, label: Tensor, threshold: float) -> Tensor:
    """The labels [B, H, W] with IGNORE where softmax(logits)_y, [B, C, H, W], has reached the threshold."""
    probability = logits.detach().softmax(1)
    given = probability.gather(1, label.where(label != IGNORE, 0)[:, None])[:, 0]
    return torch.where(given < threshold, label, IGNORE)


def _members(names: Sequence[str], task: Task) -> Tensor:
    """[C] bool, True for the classes `names`. Raises `ConfigError` for an unknown one."""
    chosen = torch.zeros(len(task.taxonomy.classes), dtype=torch.bool)
    for name in names:
        chosen[task.taxonomy.index(name, "foreground")] = True
    return chosen
