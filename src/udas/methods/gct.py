"""Guided collaborative training: two networks learn from each other where a flaw detector trusts the other one more."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from pydantic import Field
from torch import Tensor

from udas.config import SemiSupervisedConfig, Share
from udas.data.batch import IGNORE, Batch, Block, Stream, together
from udas.data.mixing import inside_picture
from udas.losses import masked_mean
from udas.methods.adversary import CriticOptimiser
from udas.methods.base import Optimised, SegmentationMethod, Task
from udas.methods.domains import label_loss, supervise
from udas.methods.ramps import exponential
from udas.networks.encoders import batch_norms
from udas.networks.flaw_detector import FlawDetector
from udas.networks.segmenters import Segmenter, build_segmenter

FLAWLESS = 0.1  # a map that stays below has no flaw; released code
TINY = 1e-9  # keeps the scaling of a flat map finite; released code


class GCTConfig(SemiSupervisedConfig):
    """Settings of guided collaborative training."""

    name: Literal["gct"] = "gct"
    detector_optimiser: CriticOptimiser = CriticOptimiser()
    consistency: float = Field(100.0, ge=0, description="lambda_dc, weight of the dynamic consistency L_dc")
    correction: float = Field(1.0, ge=0, description="lambda_fc, weight of the flaw correction L_fc")
    detection: float = Field(10.0, ge=0, description="weight of L_fd, from which the flaw detector learns")
    threshold: Share = Field(0.6, description="xi; a larger flaw counts as 1; where both are larger, L_fc acts")
    ramp_up: Share = Field(0.15, description="share of the steps during which the weight of L_dc grows")
    nu: int = Field(1, ge=0, description="nu, how often the flaws of a labelled picture are dilated and blurred")
    detector_width: int = Field(64, gt=1, description="channels of the flaw detector's first stage")
    detector_stages: int = Field(4, gt=0, description="stages of the flaw detector, F; each halves the picture")
    batch_share: Share = Field(0.5, description="share of F's channels with batch norm, the others have instance norm")
    keep: Literal["left", "right"] = Field("left", description="the network that is evaluated and handed on")


class GCT(SegmentationMethod[GCTConfig]):
    """GCT (Ke et al., ECCV 2020): L_k = CE(T_k(x_l), y_l) + ramp(t) lambda_dc L_dc + lambda_fc L_fc for k = l, r.

    T_l, T_r: two networks with heads of their own; F: the flaw detector; x: labelled and unlabelled pictures together;
    p_k = softmax T_k(x), F_k = F(x, p_k), G_k = `postprocess_flaws`(F_k), where 1 replaces what is above xi.

    q_l  = p_r where G_r < G_l, p_l elsewhere, without gradient; q_r likewise: the less flawed of both, own if equal
    L_dc = mean of (p_k - q_k)^2 over classes and pixels inside the pictures
    L_fc = mean over pixels inside the pictures of F_k^2 where both G are above xi, 0 elsewhere

    and then the flaw detector, on detached predictions for labelled pictures, C = `ground_truth`,

    L_fd = detection 1/2 sum_k mean over all pixels of (F_k - C(p_k, y_l))^2

    C is about 0 where there is no label, so that F finds no flaw there.
    """

    settings = GCTConfig
    needs = frozenset({Stream.LABELLED, Stream.UNLABELLED})
    optional = frozenset({Stream.SOURCE})

    def __init__(self, config: GCTConfig, task: Task) -> None:
        super().__init__(config, task)
        self.right = with_new_head(task.segmenter())
        self.detector = FlawDetector(
            len(task.taxonomy.classes), config.detector_width, config.detector_stages, config.batch_share
        )

    def model(self) -> Segmenter:
        """What `keep` says; they differ by chance alone."""
        return self.right if self.config.keep == "right" else self.segmenter

    def optimised(self) -> dict[str, Optimised]:
        """One optimiser for each network and one for the flaw detector."""
        return {
            "left": Optimised.segmenter(self.segmenter, self.config.optimiser),
            "right": Optimised.segmenter(self.right, self.config.optimiser),
            "detector": Optimised.module(self.detector, self.config.detector_optimiser),
        }

    def smallest_picture(self) -> int:
        """What gives the flaw detector one score."""
        return self.detector.smallest

    def step(self, batch: Batch) -> None:
        """Train both networks against the present flaw detector, then the flaw detector on their predictions."""
        source, labelled, unlabelled = batch.source, batch.labelled, batch.unlabelled
        assert labelled is not None
        assert unlabelled is not None
        image = together(labelled, unlabelled)
        inside = inside_picture(image)
        networks = {"left": self.segmenter, "right": self.right}
        predictions = {side: self._predict(network, image) for side, network in networks.items()}
        *targets, mask = exchange(predictions["left"], predictions["right"], self.config.threshold)
        for (side, network), target in zip(networks.items(), targets, strict=True):
            with self.update(side) as minimise:
                terms = self._terms(predictions[side], labelled, target, mask, inside)
                minimise({f"{side} {name}": term for name, term in terms.items()})
                if source is not None:
                    supervise(minimise, network, source, f"{side} source", self.config.auxiliary, self.config.source)
        with self.update("detector") as minimise:
            for side in networks:
                loss = self.config.detection / 2 * self._detection(image, predictions[side], labelled)
                minimise(loss, f"detector {side}")

    def _predict(self, network: Segmenter, image: Tensor) -> Prediction:
        outputs = network.levels(image)
        probabilities = outputs[0].softmax(1)
        return Prediction(outputs, probabilities, self.detector(image, probabilities))

    def _terms(
        self, prediction: Prediction, labelled: Block, target: Tensor, mask: Tensor, inside: Tensor
    ) -> dict[str, Tensor]:
        """The terms of L_k, of one forward pass.

        Args:
            prediction: of network k.
            labelled: the first pictures of the batch.
            target: q_k, [B, C, H, W].
            mask: [B, 1, H, W] bool, where L_fc acts.
            inside: [B, H, W] bool, the pixels that L_dc and L_fc count.
        """
        c = self.config
        ramp = exponential(self.steps_done, round(c.ramp_up * self.task.steps))
        distance = (prediction.probabilities - target).square().mean(1)
        terms = {
            "labelled": label_loss(prediction.outputs, labelled, c.auxiliary),
            "consistency": ramp * c.consistency * masked_mean(distance, inside),
        }
        if c.correction:
            terms["correction"] = c.correction * masked_mean((mask * prediction.flaws.square())[:, 0], inside)
        return terms

    def _detection(self, image: Tensor, prediction: Prediction, labelled: Block) -> Tensor:
        """L_fd of one network. The detector sees all pictures, as its batch norms do in the networks' turns."""
        assert labelled.label is not None
        count, probabilities = len(labelled.image), prediction.probabilities.detach()
        truth = ground_truth(probabilities[:count], labelled.label, self.config.nu)
        return F.mse_loss(self.detector(image, probabilities)[:count], truth)


class Prediction(NamedTuple):
    """What one network predicts for a batch of pictures, and the flaws that the flaw detector finds there.

    outputs: logits of every level, [B, C, H, W] each.
    probabilities: p, [B, C, H, W].
    flaws: F(x, p), [B, 1, H, W].
    """

    outputs: tuple[Tensor, ...]
    probabilities: Tensor
    flaws: Tensor


def with_new_head(network: Segmenter) -> Segmenter:
    """The network itself, its decoder drawn anew: two copies of one checkpoint would stay the same."""
    fresh = build_segmenter(network.config, network.classes, pretrained=False)
    with torch.no_grad():
        for weight, new in zip(network.decoder.parameters(), fresh.decoder.parameters(), strict=True):
            weight.copy_(new)
    for norm in batch_norms(network.decoder):
        norm.reset_running_stats()
    return network


@torch.no_grad()
def exchange(left: Prediction, right: Prediction, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """q_l and q_r [B, C, H, W], the targets of the networks, and the mask of L_fc [B, 1, H, W] bool: both above xi.

    Args:
        left: of one network.
        right: of the other one.
        threshold: xi.
    """
    flaws_l, flaws_r = postprocess_flaws(left.flaws), postprocess_flaws(right.flaws)
    above_l, above_r = flaws_l > threshold, flaws_r > threshold
    flaws_l, flaws_r = flaws_l.masked_fill(above_l, 1.0), flaws_r.masked_fill(above_r, 1.0)
    target_l = torch.where(flaws_r < flaws_l, right.probabilities, left.probabilities)
    target_r = torch.where(flaws_l < flaws_r, left.probabilities, right.probabilities)
    return target_l, target_r, above_l & above_r


@torch.no_grad()
def postprocess_flaws(flaws: Tensor) -> Tensor:
    """Maps that can be compared: without negative values, smooth, each scaled to [0, 1]; 0 for a map without flaw.

    Unless a map has no flaw, its largest value becomes 1, above any xi. [B, 1, H, W] -> [B, 1, H, W].
    """
    smooth = blur(flaws.clamp(min=0), 16)
    flawed = smooth.amax((1, 2, 3), keepdim=True) > FLAWLESS
    return torch.where(flawed, scaled(smooth), 0.0)


@torch.no_grad()
def ground_truth(probabilities: Tensor, label: Tensor, nu: int) -> Tensor:
    """C(p, y): what the flaw detector should say of a prediction whose label is known, [B, 1, H, W] in [0, 1].

    d = sum_c |[y = c] - p_c| / 2 = 1 - p_y, and 0 without a label; blurred, nu times dilated and blurred wider, and
    scaled: the worst place of every picture is 1.

    Args:
        probabilities: p, [B, C, H, W].
        label: y, [B, H, W].
        nu: repetitions.
    """
    known = (label != IGNORE)[:, None]
    right = probabilities.gather(1, torch.where(known, label[:, None], 0))
    flaws = blur(torch.where(known, 1 - right, 0.0), 8)
    for _ in range(nu):
        flaws = blur(F.max_pool2d(flaws, 3, stride=1, padding=1), 4)
    return scaled(flaws)


def scaled(maps: Tensor) -> Tensor:
    """Each map from its least value to its largest one: [B, 1, H, W] in [0, 1]."""
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    return (maps - low) / (high - low + TINY)


def blur(maps: Tensor, part: int) -> Tensor:
    """Gaussian blur, mirrored at the border, in full precision; its kernel is the `part`-th part of the shorter side.

    sigma = 0.3 ((k - 1) / 2 - 1) + 0.8 pixels for a kernel of k x k, k made odd: OpenCV's rule.
    """
    k = kernel_size(min(maps.shape[-2:]), part)
    sigma = 0.3 * ((k - 1) / 2 - 1) + 0.8
    with torch.autocast(maps.device.type, enabled=False):
        blurred: Tensor = gaussian_blur2d(maps, (k, k), (sigma, sigma), border_type="reflect")
    return blurred


def kernel_size(side: int, part: int) -> int:
    """The kernel's side: side / part, one more where that is even: 41 and 81 for 321 / 8 and 321 / 4."""
    return side // part | 1
