"""How the report writes numbers."""

from __future__ import annotations

import math
import re

from markupsafe import Markup

from bayeslr.predict import INSIDE
from bayeslr.specs import Target
from bayeslr.units import format_lr, format_quantity


def unbroken_numbers(text: str) -> Markup:
    """The text as HTML in which no line ends within a number such as ``5.60e-4`` or ``90 %``."""
    parts = re.split(r"(\d[\d.]*(?:e-\d+| %))", text)
    return Markup("").join(
        Markup('<span class="number">{}</span>').format(part) if i % 2 else part
        for i, part in enumerate(parts)
    )


def interval_text(low: float, high: float) -> str:
    """Two LRs with a dash."""
    return f"{format_lr(low)} – {format_lr(high)}"


def factor_text(low: float, high: float) -> str:
    """Width of an interval as people say it."""
    return f"a factor of {high / low:.2g}"


def nats_text(nats: float) -> str:
    """A loss difference, to a tenth of the seed noise of a final loss (0.001 nats)."""
    return f"{nats:.4f}" if nats < 0.1 else f"{nats:.2f}"


def share_text(share: float) -> str:
    """A share as a percentage, with no more figures than it has."""
    if not math.isfinite(share):
        return "not known"
    percent = 100 * share
    if percent >= 1000:
        return "> 1000 %"
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.1f} %"


def risk_text(probability: float) -> str:
    """A probability as a percentage; below one in a thousand it is not worth a figure."""
    return "< 0.1 %" if probability < 1e-3 else share_text(probability)


def octaves_text(octaves: float) -> str:
    """A distance in octaves to a tenth, with the typographic minus."""
    return f"{octaves + 0.0:.1f}".replace("-", "−") if math.isfinite(octaves) else "not known"


def octaves_interval(low: float, high: float) -> str:
    """Two distances in octaves."""
    return f"{octaves_text(low)} to {octaves_text(high)}"


def edge_text(low: float, middle: float, high: float) -> str:
    """Where an LR lies that is so many octaves (quantiles) below the divergence edge."""
    side = "below"
    if middle < 0:
        low, middle, high, side = -high, -middle, -low, "above"
    return f"{octaves_text(middle)} octaves {side} the edge (90 %: {octaves_interval(low, high)})"


def extrapolation_text(distance: float) -> str:
    """Distance from the data in words and spreads."""
    if not math.isfinite(distance):
        return "no runs"
    return "inside" if distance < INSIDE else f"{distance:.1f}"


def signed(number: float) -> str:
    """An exponent to two decimals with its sign, the typographic minus included."""
    return f"{number:+.2f}".replace("-", "−")


def scale_text(target: Target) -> str:
    """Size, horizon and batch of a target in one line."""
    size = format_quantity(target.n_active)
    if target.n_total > target.n_active:
        size += f" of {format_quantity(target.n_total)}"
    tokens, batch = format_quantity(target.tokens), format_quantity(target.batch_tokens)
    return f"{size}, {tokens} tokens, batch {batch}"
