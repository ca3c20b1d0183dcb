"""PseudoSeg: labels for unlabelled pictures, fused from the decoder and from refined class activation maps."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from udas.config import SemiSupervisedConfig, Share
from udas.data.batch import IGNORE, Batch, Block, Stream
from udas.data.masks import cutout_masks
from udas.data.mixing import inside_picture, jitter
from udas.losses import cross_entropy, masked_mean, outputs_cross_entropy
from udas.methods.base import Optimised, SegmentationMethod, Task, trainable
from udas.methods.domains import supervise
from udas.networks.self_attention import SelfAttentionGradCAM


class PseudoSegConfig(SemiSupervisedConfig):
    """Settings of PseudoSeg."""

    name: Literal["pseudoseg"] = "pseudoseg"
    consistency: float = Field(1.0, ge=0, description="weight of L_u, the loss on unlabelled pictures")
    gamma: Share = Field(0.5, description="gamma, share of the decoder in the fused labels; the rest is SGC's")
    temperature: float = Field(0.5, gt=0, description="T of the sharpening; 1 = none")
    calibration: Literal["batch", "picture"] = Field(
        "batch", description="the root mean square r both logits are divided by: of the batch, or of each picture"
    )
    background: str | None = Field(None, description="class that has no activation map, where the label space has one")
    present: Share = Field(0.5, description="probability from which the classifier takes a class for present")
    batch_norm: bool = Field(True, description="SGC's last convolution has a batch norm; else a bias")
    jitter: float = Field(0.5, ge=0, le=1, description="brightness, contrast, saturation of strong views; hue half")
    cutout: Share = Field(0.195, description="side of the hidden square, of the shorter side; 100 of 513 pixels")


class PseudoSeg(SegmentationMethod[PseudoSegConfig]):
    """Zou et al., "PseudoSeg: Designing Pseudo Labels for Semantic Segmentation", ICLR 2021.

    f: the network; s, m: image-level scores and pixel-level logits of SGC (`udas.networks.self_attention`), which sees
    f's encoder; x_l, y_l: labelled, x_u: unlabelled pictures; z_l: which classes y_l holds.

        y   = f(x_u),   m = SGC(x_u) with the classes of sigmoid(s) >= present
        p   = gamma softmax(y / r) + (1 - gamma) softmax(m / r),   r^2 = mean of all y^2 and m^2
        q   = p^(1/T) / sum_c p_c^(1/T)
        L_u = mean of -sum_c q_c log softmax f(strong(x_u))_c,   strong: jittered colours, a hidden square
        L   = CE(f(x_l), y_l) + BCE(s(x_l), z_l) + CE(m(x_l), y_l) + consistency L_u   (+ source CE(f(x_s), y_s))

    m(x_l) uses z_l. L_u counts neither pixels of the square nor the loader's padding; no gradient reaches q, and SGC
    learns from labelled pictures alone. y is predicted in training mode, the features of m(x_u) in evaluation mode.
    """

    settings = PseudoSegConfig
    needs = frozenset({Stream.LABELLED, Stream.UNLABELLED})
    optional = frozenset({Stream.SOURCE})

    def __init__(self, config: PseudoSegConfig, task: Task) -> None:
        super().__init__(config, task)
        encoder: Any = self.segmenter.encoder
        channels = [count for count in encoder.out_channels[1:] if count][-2:]
        classes, background = self.segmenter.classes, _background(config, task)
        self.sgc = SelfAttentionGradCAM(channels, classes, background, config.batch_norm)

    def optimised(self) -> dict[str, Optimised]:
        """One optimiser, for the segmenter and SGC, which learns as fast as the decoder."""
        config = self.config.optimiser
        new = {"params": trainable(self.sgc.parameters()), "factor": config.head_factor}
        return {"segmenter": Optimised([*Optimised.segmenter(self.segmenter, config).groups, new], config)}

    def step(self, batch: Batch) -> None:
        """Learn labels with the network and SGC, and their fused labels of weak views on strong ones."""
        source, labelled, target = batch.source, batch.labelled, batch.unlabelled
        assert labelled is not None
        assert target is not None
        fused = self._fused(target.image)
        with self.update("segmenter") as minimise:
            if source is not None:
                supervise(minimise, self.segmenter, source, "source", self.config.auxiliary, self.config.source)
            minimise(self._supervised(labelled))
            minimise(self.config.consistency * self._consistency(target, fused), "consistency")

    @torch.no_grad()
    def _fused(self, image: Tensor) -> Tensor:
        """The labels q of weak views, [B, C, H, W]."""
        c, decoded = self.config, self.segmenter(image)
        pyramid = self._inference_pyramid(image)
        present = (self.sgc.classify(pyramid[-1]).sigmoid() >= c.present).float()
        localised = self._localise(pyramid, image, present)
        return fuse(decoded, localised, c.gamma, c.temperature, per_picture=c.calibration == "picture")

    def _inference_pyramid(self, image: Tensor) -> list[Tensor]:
        """The encoder's maps with running statistics and without dropout."""
        self.segmenter.eval()
        pyramid = self.segmenter.encode(image)
        self.segmenter.train(self.training)
        return pyramid

    def _supervised(self, block: Block) -> dict[str, Tensor]:
        """The three losses on labelled pictures; those of SGC stand apart."""
        assert block.label is not None
        pyramid = self.segmenter.encode(block.image)
        outputs = self.segmenter.decode(pyramid, block.image).levels
        present = self.sgc.foreground(classes_in(block.label, self.segmenter.classes))
        scores, localised = self.sgc.classify(pyramid[-1]), self._localise(pyramid, block.image, present)
        return {
            "labelled": outputs_cross_entropy(outputs, block.label, auxiliary=self.config.auxiliary),
            "classifier": F.binary_cross_entropy_with_logits(scores, present),
            "localised": cross_entropy(localised, block.label),
        }

    def _localise(self, pyramid: list[Tensor], image: Tensor, present: Tensor) -> Tensor:
        """Logits m at the pictures' size, [B, C, H, W]; the pyramid can be of pictures that the network has padded."""
        (height, width), (tall, wide) = image.shape[-2:], pyramid[0].shape[-2:]
        visible = F.pad(inside_picture(image), (0, wide - width, 0, tall - height))
        features = [entry for entry in pyramid[1:] if entry.shape[1]][-2:]
        return self.segmenter.enlarge(self.sgc.refine(features, present, visible), image)

    def _consistency(self, block: Block, target: Tensor) -> Tensor:
        """L_u: soft cross-entropy of strong views against `target`, the mean over the pixels that both views show."""
        height, width = block.image.shape[-2:]
        hidden = cutout_masks(block.seeds, height, width, self.config.cutout, block.image.device)
        strength = self.config.jitter
        image = jitter(block.image, block.seeds, strength, strength, strength, strength / 2)
        image = torch.where(hidden[:, None], self.segmenter.mean, image)
        loss = F.cross_entropy(self.segmenter(image), target, reduction="none")
        valid = inside_picture(block.image) & ~hidden
        return masked_mean(loss, valid)


def fuse(first: Tensor, second: Tensor, gamma: float, temperature: float, per_picture: bool = False) -> Tensor:
    """Calibrated fusion of two logits: q of `PseudoSeg`, whose second source can be any (Zou et al., Section 3.3).

    Without the common scale r the source with the larger logits would decide alone.

    Args:
        first: [B, C, H, W].
        second: like `first`.
        gamma: share of `first`, in [0, 1].
        temperature: T > 0.
        per_picture: r is the root mean square of each picture's logits instead of the batch's.

    Returns:
        [B, C, H, W] probabilities.
    """
    power = (first.square() + second.square()) / 2
    scale = (power.mean((1, 2, 3), keepdim=True) if per_picture else power.mean()).add(1e-8).sqrt()
    fused = gamma * (first / scale).softmax(1) + (1 - gamma) * (second / scale).softmax(1)
    return (fused.log() / temperature).softmax(1)  # p^(1/T) / sum p^(1/T), in which small T would leave 0 / 0


def classes_in(label: Tensor, classes: int) -> Tensor:
    """[B, classes] float, 1 for the classes that are in each label [B, H, W]; IGNORE is none."""
    found = torch.zeros(len(label), IGNORE + 1, device=label.device)
    return found.scatter_(1, label.flatten(1), 1.0)[:, :classes]


def _background(config: PseudoSegConfig, task: Task) -> int | None:
    """The id of the class that has no activation map."""
    return None if config.background is None else task.taxonomy.index(config.background, "background")
