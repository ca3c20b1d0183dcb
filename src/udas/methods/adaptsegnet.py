"""AdaptSegNet: predictions on target pictures have to look like those on source pictures, at every output."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from udas.config import AdaptationConfig
from udas.data.batch import Batch, Stream
from udas.methods.adversary import FAKE, REAL, CriticOptimiser, Gan, OutputAdversary, detached, softmax
from udas.methods.base import Optimised, SegmentationMethod, Task
from udas.methods.domains import LABELLED_DOMAINS, labelled_domain, supervise


class OutputSpaceConfig(AdaptationConfig):
    """What AdaptSegNet and AdvEnt can be told. The network decides the levels: a name in `_multi` has two outputs."""

    critic_optimiser: CriticOptimiser = CriticOptimiser()
    auxiliary: float = Field(0.1, ge=0, description="lambda_seg of the auxiliary output, where the network has one")
    adversarial: float = Field(1e-3, gt=0, description="lambda_adv of the main output")
    adversarial_auxiliary: float = Field(2e-4, ge=0, description="lambda_adv of the auxiliary output")
    gan: Gan = Field("vanilla", description="loss of the adversary; least_squares goes with adversarial: 0.01")


class AdaptSegNetConfig(OutputSpaceConfig):
    """Settings of AdaptSegNet."""

    name: Literal["adaptsegnet"] = "adaptsegnet"


class AdaptSegNet(SegmentationMethod[OutputSpaceConfig]):
    """Tsai et al., CVPR 2018: L = L_seg + L_adv, over the outputs of the network.

    x_s, y_s: pictures and labels of the labelled domain (source or pseudo), x_t: unlabelled, P = softmax f(x) of an
    output, main or auxiliary. The segmenter minimises, with the critics held,

        L_seg = CE(P_s^main, y_s) + lambda_seg CE(P_s^aux, y_s)
        L_adv = lambda_adv^main l(D_main(P_t^main), real) + lambda_adv^aux l(D_aux(P_t^aux), real)

    and then each critic, on detached predictions,

        L_D   = 1/2 (l(D(P_s), real) + l(D(P_t), fake))

    where l is binary cross-entropy (vanilla) or the squared distance (least_squares). Labelled real pictures, where
    there are, add labelled CE(f(x_l), y_l).
    """

    settings: ClassVar[type[OutputSpaceConfig]] = AdaptSegNetConfig
    needs = frozenset({Stream.UNLABELLED})
    optional = LABELLED_DOMAINS | {Stream.LABELLED}

    def __init__(self, config: OutputSpaceConfig, task: Task) -> None:
        super().__init__(config, task)
        self.domain = labelled_domain(task)
        outputs = self.segmenter.decoder.num_levels
        self.critics = OutputAdversary(outputs, len(task.taxonomy.classes), self.evidence, config.gan)
        self.lambda_adv = [config.adversarial] + [config.adversarial_auxiliary] * (outputs - 1)

    @staticmethod
    def evidence(logits: Tensor) -> Tensor:
        """What the critics see of an output: P, [B, C, H, W] in [0, 1]."""
        return softmax(logits)

    def optimised(self) -> dict[str, Optimised]:
        """One optimiser for the segmenter, one for the critics of its outputs."""
        return super().optimised() | {"critic": Optimised.module(self.critics, self.config.critic_optimiser)}

    def step(self, batch: Batch) -> None:
        """Train the segmenter against the present critics, then the critics on its detached predictions."""
        source, target, labelled = getattr(batch, self.domain), batch.unlabelled, batch.labelled
        assert target is not None
        with self.update("segmenter") as minimise:
            f_s = supervise(minimise, self.segmenter, source, self.domain, self.config.auxiliary)
            if labelled is not None:
                supervise(minimise, self.segmenter, labelled, "labelled", self.config.auxiliary, self.config.labelled)
            f_t = self.segmenter.levels(target.image)
            minimise(self.critics.judge(f_t, REAL, self.lambda_adv), "adversarial")
        with self.update("critic") as minimise:
            minimise(0.5 * self.critics.judge(f_s, REAL), f"critic on {self.domain}")
            minimise(0.5 * self.critics.judge(detached(f_t), FAKE), "critic on target")
