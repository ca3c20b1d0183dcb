"""AdvEnt: the entropy of predictions on target pictures has to look like that on source pictures."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from udas.losses import self_information
from udas.methods.adaptsegnet import AdaptSegNet, OutputSpaceConfig


class AdvEntConfig(OutputSpaceConfig):
    """Settings of AdvEnt."""

    name: Literal["advent"] = "advent"


class AdvEnt(AdaptSegNet):
    """Vu et al., CVPR 2019, section 3.2: `AdaptSegNet` whose critics see the weighted self-information.

    P = softmax f(x) of an output, main or auxiliary, over C classes;

        I     = -P log2(P) / log2(C)                  C channels, whose sum is the normalised entropy
        L_seg = CE(P_s^main, y_s) + lambda_seg CE(P_s^aux, y_s)
        L_adv = lambda_adv^main l(D_main(I_t^main), real) + lambda_adv^aux l(D_aux(I_t^aux), real)
        L_D   = 1/2 (l(D(I_s), real) + l(D(I_t), fake))

    so that the step is that of AdaptSegNet, with I in the place of P.
    """

    settings = AdvEntConfig

    @staticmethod
    def evidence(logits: Tensor) -> Tensor:
        """What the critics see of an output: I, [B, C, H, W] in [0, 1]."""
        return self_information(logits.softmax(1))
