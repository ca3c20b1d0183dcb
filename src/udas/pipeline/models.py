"""Networks that earlier stages left, as inference uses them: one, several averaged, or re-weighted by prototypes."""

from __future__ import annotations

from torch import Tensor, nn

from udas.methods.prototypes import Prototypes, fitting_prototypes
from udas.networks.ensemble import Averaged, Ensemble, as_one
from udas.networks.segmenters import Outputs, Segmenter
from udas.networks.weights import load_segmenter
from udas.pipeline.config import several
from udas.pipeline.context import Context
from udas.pipeline.prototypes import load_prototypes
from udas.training.runtime import Runtime

MODEL = "model.safetensors"


class Reweighted(nn.Module):
    """A network whose probabilities are multiplied by prototype weights: q_k = w_k p_k / sum_j w_j p_j.

    Source: ProDA (Zhang et al., CVPR 2021, equation 6). log w, at the size of the features, is enlarged bilinearly and
    added to the logits.
    """

    def __init__(self, network: Segmenter, prototypes: Prototypes) -> None:
        super().__init__()
        self.network, self.prototypes = network, prototypes

    def forward(self, image: Tensor) -> Tensor:
        """RGB [B, 3, H, W] in [0, 1] -> logits of q, float32 [B, C, H, W]."""
        return self.levels(image)[0]

    def levels(self, image: Tensor) -> tuple[Tensor, ...]:
        """Logits of every level; only those of the main one are re-weighted."""
        outputs = self.network.outputs(image)
        main, *others = outputs.levels
        weights = self.prototypes.log_weights(outputs.representation)
        return main + outputs.resized(weights, main.shape[-2:]), *others


def load_trained(context: Context, stage: str) -> Segmenter:
    """The segmenter that an earlier stage left. Raises `WeightsError` when it is of another label space."""
    return load_segmenter(context.folder / stage / MODEL, taxonomy=context.taxonomy)[0]


def load_averaged(context: Context, names: str | list[str], average: Averaged) -> Segmenter | Ensemble:
    """The segmenter of an earlier stage, or of several as one. Raises `WeightsError` as `load_trained`."""
    return as_one([load_trained(context, name) for name in several(names)], average)


def reweighted(context: Context, model: Segmenter, stage: str) -> Reweighted:
    """The segmenter with the prototypes of a prototypes stage.

    Raises:
        ConfigError: the prototypes are of another network or label space.
        WeightsError: they cannot be read.
    """
    vectors = load_prototypes(context.folder / stage)
    fitting = fitting_prototypes(vectors, len(context.taxonomy.classes), model.decoder.channels)
    return Reweighted(model, Prototypes(fitting))


def placed(model: nn.Module, runtime: Runtime) -> Inference:
    """The model on the run's device, ready for inference in its precision."""
    return Inference(runtime.place(model), runtime).eval()


class Inference(nn.Module):
    """A network as inference uses it: the run's memory format and precision."""

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.model, self.runtime = model, runtime

    def forward(self, image: Tensor) -> Tensor:
        """RGB [B, 3, H, W] in [0, 1] -> whatever the network gives, in float32."""
        with self.runtime.autocast():
            result: Tensor = self.model(self._formatted(image))
        return result.float()

    def levels(self, image: Tensor) -> tuple[Tensor, ...]:
        """All outputs of a segmenter, main first."""
        assert isinstance(self.model, Segmenter | Ensemble | Reweighted)
        with self.runtime.autocast():
            return self.model.levels(self._formatted(image))

    def outputs(self, image: Tensor) -> Outputs:
        """All outputs of a segmenter and its representation."""
        assert isinstance(self.model, Segmenter)
        with self.runtime.autocast():
            return self.model.outputs(self._formatted(image))

    def _formatted(self, image: Tensor) -> Tensor:
        return image.contiguous(memory_format=self.runtime.memory_format)
