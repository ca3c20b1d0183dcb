"""The labelled domain of an adaptation method: synthetic pictures, or pseudo-labelled real ones in their place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from udas.data.batch import Block, Stream
from udas.errors import ConfigError
from udas.losses import outputs_cross_entropy
from udas.methods.base import Minimise, Task
from udas.networks.segmenters import Segmenter

LABELLED_DOMAINS = frozenset({Stream.SOURCE, Stream.PSEUDO})


def labelled_domain(task: Task) -> Stream:
    """The one stream of `LABELLED_DOMAINS` that a task provides.

    Raises:
        ConfigError: when it provides none or both.
    """
    given = sorted(task.streams & LABELLED_DOMAINS)
    if len(given) != 1:
        found = "both are given" if given else "neither is given"
        raise ConfigError(f"streams: adapts from one labelled domain, source or pseudo, and {found}; name one of them")
    return given[0]


def supervise(
    minimise: Minimise, segmenter: Segmenter, block: Block, name: str, auxiliary: float, weight: float = 1.0
) -> list[Tensor]:
    """Minimise weight (CE(main output) + auxiliary CE(further outputs)) of a labelled block, logged under `name`.

    Returns:
        One detached [B, C, H, W] of logits per output, main output first. With weight 0 none: the block does not pass.
    """
    if weight == 0:
        return []
    outputs = segmenter.levels(block.image)
    minimise(weight * label_loss(outputs, block, auxiliary), name)
    return [output.detach() for output in outputs]


def label_loss(outputs: Sequence[Tensor], block: Block, auxiliary: float) -> Tensor:
    """CE(main output) + auxiliary CE(further outputs) of a labelled block.

    Args:
        outputs: [B, C, H, W] of logits per output; the block's pictures come first, others may follow.
        block: the labelled pictures.
        auxiliary: weight of the further outputs.
    """
    assert block.label is not None
    first = [output[: len(block.image)] for output in outputs]
    return outputs_cross_entropy(first, block.label, auxiliary=auxiliary)
