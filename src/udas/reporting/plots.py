"""Curves as inline SVG: drawn by matplotlib, coloured by the page's style sheet so that they follow light and dark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import count

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLOURS = ("#3b7dd8", "#e07a1f", "#2e9e6b", "#c8417b", "#8a63d2", "#b8930b", "#1798a8", "#d4513d")
DASHES = ("", "7 3", "2 2.5")
POINTS = 200
"""A curve keeps at most this many points: more cannot be seen at its width."""

_INK, _GRID = "#010203", "#040506"  # stand-ins that no curve uses; replaced by variables of the style sheet
_numbers = count()


@dataclass(frozen=True)
class Curve:
    """One line: {step: value}, stroke colour, SVG dash pattern; `band` also shows the range of thinned points."""

    points: dict[int, float]
    colour: str = COLOURS[0]
    dash: str = ""
    band: bool = False


def style(index: int) -> tuple[str, str]:
    """Colour and dash of the index-th curve of a comparison; 24 differ."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def draw(curves: Sequence[Curve], width: int, height: int, percent: bool = False) -> Markup:
    """One set of axes with `curves` over steps, `width` x `height` CSS pixels. `percent` shows values times 100."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "udas", "path.simplify": True}):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            _plot(axes, curve, 100.0 if percent else 1.0)
        _dress(axes, width)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True)
    return Markup(_inline(text.getvalue()))  # safe: numbers only, no text of the run


def _plot(axes: Axes, curve: Curve, scale: float) -> None:
    steps, mean, low, high = thin(curve.points)
    dashes = tuple(float(length) for length in curve.dash.split())
    marker = "o" if len(steps) < 40 and not curve.band else None
    line = (0, dashes) if dashes else "-"
    axes.plot(steps, mean * scale, color=curve.colour, linestyle=line, linewidth=1.6, marker=marker, markersize=3.2)
    if curve.band and len(steps) < len(curve.points):
        axes.fill_between(steps, low * scale, high * scale, color=curve.colour, alpha=0.18, linewidth=0)


def thin(points: dict[int, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, means, minima and maxima of at most `POINTS` neighbouring groups of `points`, in the order of steps."""
    pairs = sorted(points.items())
    groups = np.array_split(np.array(pairs, dtype=float), min(POINTS, len(pairs)))
    steps = np.array([group[-1, 0] for group in groups])
    values = [group[:, 1] for group in groups]
    mean, low, high = (np.array([reduce(v) for v in values]) for reduce in (np.mean, np.min, np.max))
    return steps, mean, low, high


def _dress(axes: Axes, width: int) -> None:
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=12 if width > 500 else 9, length=0, pad=5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)
    axes.xaxis.set_major_locator(MaxNLocator(max(3, width // 90), integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 1000 else f"{x:g}"))
    axes.margins(x=0.02, y=0.08)
    axes.set_xlim(left=0)


def _inline(svg: str) -> str:
    """The bare <svg> element: no document type, metadata or fixed size; ids of its own; the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", svg, count=5)
    number = next(_numbers)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>p{number}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    return svg.replace(_INK, "var(--soft)").replace(_GRID, "var(--line)").replace("<svg", '<svg aria-hidden="true"', 1)
