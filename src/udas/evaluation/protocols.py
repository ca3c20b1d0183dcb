"""How a network is asked for its prediction, and what the prediction is compared with.

Published numbers differ in input size, test-time views, the size at which labels are compared and the classes that are
counted; a preset states these for one publication, so that a number can be put beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from udas.config import Config, Size
from udas.errors import ConfigError, RunError
from udas.evaluation.metrics import Reading
from udas.validation import nearest

Network = Callable[[Tensor], Tensor]
"""RGB [B, 3, H, W] in [0, 1] -> logits [B, C, H, W]; one that has `levels` can be asked for all its outputs."""

Scale = Annotated[float, Field(gt=0)]

_SYNTHIA13 = "road,sidewalk,building,traffic light,traffic sign,vegetation,sky,person,rider,car,bus,motorcycle,bicycle"
SUBSETS = {
    "synthia16": (*_SYNTHIA13.split(",")[:3], "wall", "fence", "pole", *_SYNTHIA13.split(",")[3:]),
    "synthia13": tuple(_SYNTHIA13.split(",")),
}
"""The Cityscapes classes that SYNTHIA shares, as published tables count them."""

_HALF, _FULL = (512, 1024), (1024, 2048)
_TSAI = {"input": _HALF, "align_corners": True}
_HRDA = {"input": _FULL, "mode": "slide", "window": (1024, 1024), "stride": (512, 512)}
_PRESETS: dict[str, dict[str, Any]] = {
    "whole": {},
    "adaptsegnet": _TSAI,
    "advent": _TSAI,
    "intrada": _TSAI,
    "tllib": _TSAI,
    "seg_uncertainty": _TSAI
    | {"scales": (1.0, 1.25), "flips": True, "fusion": (1.0, 0.5), "upsample": "probabilities"},
    "proda": {"input": _FULL, "align_corners": True, "reading": "ignore", "restrict": True},
    "fda": {"input": (576, 1344), "align_corners": True, "upsample": "probabilities"},
    "dacs": _TSAI | {"compare": _HALF},
    "cycada": {"input": _FULL},
    "daformer": {"input": _HALF},
    "hrda": _HRDA,
    "mic": _HRDA,
}


class ProtocolConfig(Config):
    """One way to evaluate. In a configuration: a preset's name, or keys of which `preset` may be one."""

    name: str = Field("own", description="shown beside every number")
    input: Size | None = Field(None, description="height, width the network sees; none = the picture's own size")
    mode: Literal["whole", "slide"] = Field(
        "whole", description="whole picture, or overlapping windows (logits averaged)"
    )
    window: Size | None = Field(None, description="height, width of a sliding window")
    stride: Size | None = Field(None, description="rows, columns between two windows")
    scales: tuple[Scale, ...] = Field(
        (1.0,), min_length=1, description="zooms of the input; probabilities are averaged"
    )
    flips: bool = Field(False, description="average with the mirrored picture")
    fusion: tuple[float, ...] | None = Field(
        None, min_length=1, description="weights of the network's outputs, main output first; none = main output"
    )
    compare: Size | None = Field(None, description="height, width labels are compared at; none = label size")
    align_corners: bool = Field(False, description="how the output is enlarged to the size labels are compared at")
    upsample: Literal["logits", "probabilities"] = Field("logits", description="what is enlarged to that size")
    subset: Literal["synthia16", "synthia13"] | tuple[str, ...] | None = Field(
        None, description="classes that are scored: names, synthia16 or synthia13; none = all"
    )
    reading: Reading = Field(
        "subset", description="pixels of other classes: subset = they are errors where predicted, ignore = dropped"
    )
    restrict: bool = Field(False, description="the network may choose classes of the subset only")

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, raw: Any) -> Any:
        given = {"preset": raw} if isinstance(raw, str) else raw
        if not isinstance(given, dict) or "preset" not in given:
            return given
        name, own = given["preset"], {key: value for key, value in given.items() if key != "preset"}
        if name not in _PRESETS:
            raise ValueError(f"no protocol {name!r}{nearest(str(name), list(_PRESETS))}")
        return {"name": name if not own else f"{name}, changed", **_PRESETS[name], **own}

    @model_validator(mode="after")
    def _windows(self) -> Self:
        if self.mode == "whole":
            if self.window or self.stride:
                raise ValueError("`window` and `stride` belong to `mode: slide`")
        elif not self.window or not self.stride:
            raise ValueError("`mode: slide` needs `window` and `stride`")
        elif self.stride[0] > self.window[0] or self.stride[1] > self.window[1]:
            raise ValueError("`stride` is larger than `window`: pixels between the windows would have no prediction")
        return self

    def scored(self, classes: Sequence[str]) -> tuple[str, ...]:
        """The classes that are scored, in the order of the label space `classes`.

        Raises:
            ConfigError: when `subset` names a class that the label space does not have.
        """
        chosen = SUBSETS[self.subset] if isinstance(self.subset, str) else self.subset or tuple(classes)
        for name in chosen:
            if name not in classes:
                raise ConfigError(
                    f"protocol.subset: no class {name!r} in this label space{nearest(name, list(classes))}"
                )
        return tuple(name for name in classes if name in chosen)

    def excluded(self, classes: Sequence[str]) -> list[int]:
        """Ids of the classes that the network may not choose. Raises `ConfigError` as `scored`."""
        scored = self.scored(classes)
        return [number for number, name in enumerate(classes) if name not in scored] if self.restrict else []

    def describe(self, classes: Sequence[str]) -> str:
        """One line for the foot of a table; without classes, what holds for every label space."""
        parts = [f"{self.name}: whole picture" if self.mode == "whole" else f"{self.name}: {self._slide()}"]
        parts.append(f"input {_size(self.input)}" if self.input else "input at its own size")
        parts.append(
            "scales " + ", ".join(f"{scale:g}" for scale in self.scales) if len(self.scales) > 1 else "one scale"
        )
        parts.append("with flips" if self.flips else "no flips")
        if self.fusion:
            parts.append("outputs fused " + " : ".join(f"{weight:g}" for weight in self.fusion))
        corners = ", align_corners" if self.align_corners else ""
        parts.append(f"compared at {_size(self.compare) if self.compare else 'label size'} ({self.upsample}{corners})")
        return "; ".join([*parts, self._classes(classes)] if classes else parts)

    def _slide(self) -> str:
        return f"windows of {_size(self.window)} every {_size(self.stride)}"

    def _classes(self, classes: Sequence[str]) -> str:
        scored = self.scored(classes)
        if len(scored) == len(classes):
            return f"all {len(classes)} classes"
        others = "count as errors where predicted" if self.reading == "subset" else "are dropped"
        choice = ", the network chooses among these only" if self.restrict else ""
        return (
            f"{len(scored)} of {len(classes)} classes, reading {self.reading!r}: pixels of the others {others}{choice}"
        )


PROTOCOLS = {name: ProtocolConfig.model_validate(name) for name in _PRESETS}
"""Published protocols by name. For a SYNTHIA table add `subset`; `proda` has the easier reading, as it was published.

Not expressed: which snapshot is chosen. Networks here give logits at the size of their input: `align_corners` acts from
there to the size labels are compared at.
"""


@torch.no_grad()
def probabilities(
    model: Network,
    image: Tensor,
    protocol: ProtocolConfig,
    size: tuple[int, int] | None = None,
    excluded: Sequence[int] = (),
) -> Tensor:
    """Class probabilities by the protocol: mean of the softmax over its scales and flips.

    Args:
        model: the network, in evaluation mode.
        image: [B, 3, H, W] float32, RGB in [0, 1].
        protocol: how the network is asked.
        size: height, width of the result; None = those of `image`.
        excluded: class ids that may not be chosen.

    Returns:
        [B, C, *size] float32.

    Raises:
        RunError: when the protocol fuses more outputs than the network has, or these are not finite.
    """
    views = [(scale, flip) for scale in protocol.scales for flip in ((False, True) if protocol.flips else (False,))]
    size = size or (image.shape[-2], image.shape[-1])
    total: Tensor | None = None
    for scale, flip in views:
        view = _scaled(image, protocol, scale)
        logits = _predict(model, view.flip(-1), protocol).flip(-1) if flip else _predict(model, view, protocol)
        share = _enlarge(logits, protocol, size, excluded)
        total = share if total is None else total + share
    assert total is not None
    if not total.isfinite().all():
        raise RunError("the network's output is not finite; check its weights, or use fp32")
    return total / len(views) if len(views) > 1 else total


def _scaled(image: Tensor, protocol: ProtocolConfig, scale: float) -> Tensor:
    height, width = protocol.input or image.shape[-2:]
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if size == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image, size, mode="bilinear", antialias=True)


def _predict(model: Network, image: Tensor, protocol: ProtocolConfig) -> Tensor:
    if protocol.window is None or protocol.stride is None:
        return _logits(model, image, protocol)
    height, width = image.shape[-2:]
    rows, columns = min(protocol.window[0], height), min(protocol.window[1], width)
    corners = product(_starts(height, rows, protocol.stride[0]), _starts(width, columns, protocol.stride[1]))
    total: Tensor | None = None
    visits = image.new_zeros(1, 1, height, width)
    for top, left in corners:
        here = (..., slice(top, top + rows), slice(left, left + columns))
        logits = _logits(model, image[here], protocol)
        total = logits.new_zeros(*logits.shape[:2], height, width) if total is None else total
        total[here] += logits
        visits[here] += 1
    assert total is not None
    return total / visits


def _starts(length: int, window: int, stride: int) -> list[int]:
    """First rows (or columns) of the windows; the last window ends with the picture."""
    return [*range(0, length - window, stride), length - window]


def _logits(model: Network, image: Tensor, protocol: ProtocolConfig) -> Tensor:
    if protocol.fusion is None:
        return model(image).float()
    levels: tuple[Tensor, ...] = getattr(model, "levels", lambda view: (model(view),))(image)
    if len(levels) < len(protocol.fusion):
        raise RunError(
            f"protocol {protocol.name!r} fuses {len(protocol.fusion)} outputs, this network has {len(levels)}; "
            "set protocol.fusion=null to use the main output"
        )
    return torch.stack([w * level.float() for w, level in zip(protocol.fusion, levels, strict=False)]).sum(0)


def _enlarge(logits: Tensor, protocol: ProtocolConfig, size: tuple[int, int], excluded: Sequence[int]) -> Tensor:
    """Logits -> probabilities at `size`. Classes are excluded beside the softmax: -inf must not be interpolated."""
    if protocol.upsample == "probabilities":
        return _interpolate(_softmax(logits, excluded), size, protocol.align_corners)
    return _softmax(_interpolate(logits, size, protocol.align_corners), excluded)


def _softmax(logits: Tensor, excluded: Sequence[int]) -> Tensor:
    if excluded:
        logits = logits.index_fill(1, torch.tensor(excluded, device=logits.device), -torch.inf)
    return logits.softmax(1)


def _interpolate(maps: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)


def _size(size: Size | None) -> str:
    return f"{size[0]}x{size[1]} (h x w)" if size else ""
