"""MRNet, stage I of Seg-Uncertainty: two classifiers remember on target pictures what they agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from udas.config import AdaptationConfig, Share
from udas.data.batch import Batch, Block, Stream
from udas.errors import ConfigError
from udas.losses import balanced_cross_entropy, kl_divergence
from udas.methods.adversary import FAKE, REAL, Critic, CriticOptimiser, Gan, OutputAdversary, detached, softmax
from udas.methods.base import Optimised, SegmentationMethod, Task
from udas.methods.domains import supervise
from udas.networks.segmenters import Segmenter

MOMENTUM = 0.9  # of the memory of how often classes are there


class MRNetConfig(AdaptationConfig):
    """Settings of MRNet."""

    name: Literal["mrnet"] = "mrnet"
    critic_optimiser: CriticOptimiser = CriticOptimiser()
    auxiliary: float = Field(0.5, ge=0, description="lambda_seg of the auxiliary output")
    fusion: float = Field(0.5, ge=0, description="weight of the auxiliary logits in the fused prediction m")
    memory: float = Field(0.1, ge=0, description="lambda_mr, weight of the memory regularisation; 0 = none")
    memory_from: Share = Field(0.6, description="share of the steps at which the memory regularisation begins")
    adversarial: float = Field(0.002, ge=0, description="lambda_adv of the main output; 0 = no adversary at all")
    adversarial_auxiliary: float = Field(4e-4, ge=0, description="lambda_adv of the auxiliary output")
    critic: Critic = Field("multiscale", description="discriminator of the predictions")
    gan: Gan = Field("least_squares", description="loss of the adversary")
    penalty: float = Field(0.01, ge=0, description="weight of the critics' squared gradient (R1) on source predictions")
    rare_weight: float = Field(7.0, ge=1, description="weight of a class that is rare in the batch; 1 = no balancing")
    rare_share: Share = Field(1 / 128, description="a class with a smaller share of the batch's pixels is rare")
    hard_share: Share = Field(0.2, description="share of hardest source pixels that count; 1 = all")


class MRNet(SegmentationMethod[MRNetConfig]):
    """Zheng and Yang, IJCAI 2020 and IJCV 2021: L = L_seg + L_adv + lambda_mr L_mr.

    z^main, z^aux: the network's two outputs; P = softmax z; x_s, y_s of the source, x_t unlabelled. The segmenter
    minimises

        L_seg = CE_w(z_s^main, y_s) + lambda_seg CE_w(z_s^aux, y_s)        w of `ClassBalance`, on the hardest pixels
        L_adv = lambda_adv^main l(D_main(P_t^main), real) + lambda_adv^aux l(D_aux(P_t^aux), real)
        L_mr  = mean [KL(m || P_t^main) + KL(m || P_t^aux)]                m = softmax(z_t^main + fusion z_t^aux), fixed

    and then the critics, on detached predictions, with the same m of the source for both,

        L_D   = sum over D of l(D(m_s), real) + l(D(P_t), fake) + penalty mean |grad_m D(m_s)|^2

    where l is the squared distance (least_squares) or binary cross-entropy (vanilla), summed over the critic's scales.
    """

    settings = MRNetConfig
    needs = frozenset({Stream.SOURCE, Stream.UNLABELLED})
    optional = frozenset({Stream.LABELLED})

    def __init__(self, config: MRNetConfig, task: Task) -> None:
        super().__init__(config, task)
        require_two_outputs(self.segmenter, config.name)
        self.balance = ClassBalance(len(task.taxonomy.classes), config.rare_weight, config.rare_share)
        self.critics = OutputAdversary(2, len(task.taxonomy.classes), softmax, config.gan, config.critic)

    def optimised(self) -> dict[str, Optimised]:
        """One optimiser for the segmenter and, with an adversary, one for the critics of its outputs."""
        players = super().optimised()
        if self.config.adversarial:
            players["critic"] = Optimised.module(self.critics, self.config.critic_optimiser)
        return players

    def step(self, batch: Batch) -> None:
        """Train the segmenter against the present critics, then the critics on its detached predictions."""
        source, target, labelled, c = batch.source, batch.unlabelled, batch.labelled, self.config
        assert source is not None
        assert target is not None
        with self.update("segmenter") as minimise:
            z_s = self.segmenter.levels(source.image)
            minimise(self._learn(z_s, source), "source")
            if labelled is not None:
                supervise(minimise, self.segmenter, labelled, "labelled", c.auxiliary, c.labelled)
            if c.adversarial or c.memory:
                z_t = self.segmenter.levels(target.image)
                minimise(self._adapt(z_t))
        if c.adversarial:
            with self.update("critic") as minimise:
                m_s = fuse(detached(z_s), c.fusion)
                minimise(self._judge_source(m_s))
                minimise(self.critics.judge(detached(z_t), FAKE), "critic on target")

    def _learn(self, outputs: Sequence[Tensor], block: Block) -> Tensor:
        """L_seg of a labelled block."""
        assert block.label is not None
        weight = self.balance(block.label)
        main, auxiliary = (balanced_cross_entropy(z, block.label, weight, self.config.hard_share) for z in outputs)
        return main + self.config.auxiliary * auxiliary

    def _adapt(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """L_adv and lambda_mr L_mr, of one forward pass."""
        c, terms = self.config, {}
        if c.adversarial:
            terms["adversarial"] = self.critics.judge(outputs, REAL, (c.adversarial, c.adversarial_auxiliary))
        if c.memory:
            begun = self.steps_done >= round(c.memory_from * self.task.steps)
            terms["memory"] = c.memory * begun * memory_regularisation(outputs, c.fusion)
        return terms

    def _judge_source(self, memory: Tensor) -> dict[str, Tensor]:
        """The critics' loss and penalty on m_s, of one forward pass."""
        c, terms = self.config, {}
        outputs = [memory] * len(self.critics)
        if c.penalty:
            terms["critic on source"], slope = self.critics.judge_with_slope(outputs, REAL)
            terms["critic penalty"] = c.penalty * slope
        else:
            terms["critic on source"] = self.critics.judge(outputs, REAL)
        return terms


class ClassBalance(nn.Module):
    """Class weights that follow the batch: w_c = a_c o_c.

    a_c is `weight` where class c has less than `share` of the batch's pixels, else 1; o_c remembers how often the class
    is missing: o_c <- 0.9 o_c + 0.1 (`weight` where it is absent from the batch, else 1), from o_c = 1 on. Each process
    follows its own pictures. Source: the released code of Seg-Uncertainty.
    """

    missing: Tensor

    def __init__(self, classes: int, weight: float, share: float) -> None:
        super().__init__()
        self.weight, self.share = weight, share
        self.register_buffer("missing", torch.ones(classes))

    @torch.no_grad()
    def forward(self, label: Tensor) -> Tensor:
        """[C] weights for labels [B, H, W], which are remembered."""
        classes = torch.arange(len(self.missing), device=label.device)
        count = (label.flatten() == classes[:, None]).sum(1)
        self.missing.mul_(MOMENTUM).add_((1 - MOMENTUM) * self._raised(count == 0))
        return self._raised(count < self.share * label.numel()) * self.missing

    def _raised(self, chosen: Tensor) -> Tensor:
        return 1 + (self.weight - 1) * chosen.to(self.missing.dtype)


def fuse(outputs: Sequence[Tensor], weight: float) -> Tensor:
    """z^main + weight z^aux, [B, C, H, W]."""
    main, auxiliary = outputs
    return main + weight * auxiliary


def memory_regularisation(outputs: Sequence[Tensor], fusion: float) -> Tensor:
    """Mean over pixels of the sum over outputs of KL(m || P), m = softmax(z^main + fusion z^aux) without gradient."""
    memory = fuse(outputs, fusion).detach()
    return torch.stack([kl_divergence(memory, logits).mean() for logits in outputs]).sum()


def require_two_outputs(segmenter: Segmenter, method: str) -> None:
    """Raises `ConfigError` for a network that has not exactly a main and an auxiliary output."""
    if segmenter.decoder.num_levels != 2:
        raise ConfigError(
            f"network.name: {method} compares two outputs of a network and {segmenter.config.name} has one; "
            "take deeplab_gn_multi or deeplabv2_multi"
        )
