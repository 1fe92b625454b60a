"""Tokens, parameters, FLOPs and losses: parsing, printing, conversion."""

from __future__ import annotations

import math
import re
from numbers import Real

from bayeslr.errors import SpecError

_SUFFIX = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_QUANTITY = re.compile(
    r"^([+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([KMGBT]?)$",
    re.I,
)


def parse_quantity(text: str | float, *, name: str = "value") -> float:
    """Read a positive number with an optional K, M, B (or G) or T suffix: ``1.3B``, ``500e9``.

    Raises: SpecError if the text is no number, or the number is not finite and positive.
    """
    if isinstance(text, str):
        match = _QUANTITY.match(text.strip())
        if match is None:
            raise SpecError(
                f"{name} must be a number such as 1.3B, 500e9 or 4M, got {text!r}; "
                "suffixes are K, M, B and T, the decimal sign is a point"
            )
        number = float(re.sub("[_,]", "", match.group(1))) * _SUFFIX[match.group(2).upper()]
    elif isinstance(text, Real) and not isinstance(text, bool):
        number = float(text)
    else:
        raise SpecError(f"{name} must be a number such as 1.3B, got {text!r:.80}")
    if not math.isfinite(number) or number <= 0:
        raise SpecError(f"{name} must be finite and > 0, got {text!r}")
    return number


def parse_count(text: str | float, *, name: str = "value") -> int:
    """Read a positive whole number, as `parse_quantity` does, rounded to the nearest integer."""
    return max(1, round(parse_quantity(text, name=name)))


def format_quantity(number: float) -> str:
    """Print a count with a suffix and at most four figures: 1300000000 as ``1.3B``."""
    if not math.isfinite(number):
        return str(number)
    if abs(number) >= 1e15:
        return f"{number:.3g}"
    number = float(f"{number:.4g}")  # First, so that a hair below 1B is 1B and not 1000M.
    for suffix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= scale:
            return f"{number / scale:.4g}{suffix}"
    return f"{number:.4g}"


def format_lr(lr: float) -> str:
    """An LR to three figures: ``5.60e-4``."""
    if not math.isfinite(lr):
        return str(lr)
    mantissa, exponent = f"{lr:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def format_interval(low: float, high: float) -> str:
    """The 5 and 95 % quantiles of an LR: ``90 % interval 2.00e-4 to 8.00e-4``."""
    return f"90 % interval {format_lr(low)} to {format_lr(high)}"


SECONDS_PER_HOUR = 3600.0

MOST_EXTRA_TOKENS = 100.0
"""Extra tokens, as a share of a target's own, are counted up to here."""


def format_extra_tokens(share: float) -> str:
    """A share of extra tokens as a percentage: ``4.5 %``, ``over 10,000 %``, ``unknown``."""
    if share >= MOST_EXTRA_TOKENS:
        return f"over {100 * MOST_EXTRA_TOKENS:,.0f} %"
    return f"{100 * share:.1f} %" if math.isfinite(share) else "unknown"


def counted(number: float, thing: str) -> str:
    """A number of things: ``1 run``, ``2 runs``."""
    return f"{number:.0f} {thing}" + ("" if number == 1 else "s")


def counted_past(number: float, thing: str) -> str:
    """A number of things that something befell: ``1 run was``, ``2 runs were``."""
    return f"{counted(number, thing)} {'was' if number == 1 else 'were'}"


def train_flops(n_active: float, tokens: float) -> float:
    """FLOPs of training: 6 per active parameter and token (Kaplan et al. 2020, section 2.1)."""
    return 6.0 * n_active * tokens


def gpu_hours(flops: float, flops_per_second: float) -> float:
    """GPU-hours that a device needs at a sustained rate, its peak times the utilisation (MFU)."""
    return flops / flops_per_second / SECONDS_PER_HOUR


def flops_in(hours: float, flops_per_second: float) -> float:
    """FLOPs that a device does in so many hours at a sustained rate."""
    return hours * SECONDS_PER_HOUR * flops_per_second


def format_flops(flops: float, flops_per_second: float | None = None) -> str:
    """FLOPs, GPU-hours beside them where a rate is known: ``2.88e+19 FLOPs (20 GPU-hours)``."""
    text = f"{format_quantity(flops)} FLOPs"
    if flops_per_second is None:
        return text
    return f"{text} ({format_hours(gpu_hours(flops, flops_per_second))})"


def format_hours(hours: float) -> str:
    """GPU-hours to three figures: ``0.0125 GPU-hours``, ``1,250 GPU-hours``."""
    return f"{hours:,.0f} GPU-hours" if hours >= 1000 else f"{hours:.3g} GPU-hours"


def bits_to_nats(bits: float) -> float:
    """Loss in nats from a loss in bits."""
    return bits * math.log(2.0)
