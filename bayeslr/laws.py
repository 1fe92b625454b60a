"""Pure mean functions: the valley, the batch knee and penalty, the loss-token law.

Each works on NumPy arrays and on PyTensor tensors alike: ``xp`` is the module whose ``exp``,
``expm1`` and friends are used. All logs are natural; losses are in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# What `noise_scale` asks for, in the order of a card; the last is one for all families.
NOISE = ("noise_sd", "noise_batch", "noise_tokens", "noise_side", "noise_share")

# How sharply the two slopes of the batch knee meet: the bend is over within an e-fold of batch.
KNEE_SHARPNESS = 2.0

# No noise is e^10 times that at the centre: the cap keeps far starts finite.
_MAX_WIDENING = 10.0

# Beyond exp(30) every loss is absurd: the cap keeps far starts and far LRs finite.
_MAX_EXPONENT = 30.0


def linex(u: Any, skew: Any, xp: Any = np) -> Any:
    """Asymmetric bowl: u^2/2 near zero, exponential for u > 0, linear for u < 0.

    2 linex(u, r) is u^2 as r goes to zero; its third derivative at zero is ``skew``. The loss of
    Varian (1975), used here as the shape of a floor over batch: steps run out above the best one.
    """
    x = _exponent(u, skew, xp)
    return (xp.expm1(x) - x) / skew**2


def _exponent(u: Any, skew: Any, xp: Any) -> Any:
    """The product of both, within what can be exponentiated."""
    x = skew * u
    return xp.minimum(x, _MAX_EXPONENT) if xp is np else xp.clip(x, -1e6, _MAX_EXPONENT)


def linex_derivatives(u: Any, skew: Any, xp: Any = np) -> tuple[Any, Any]:
    """First and second derivative of `linex` in u."""
    x = _exponent(u, skew, xp)
    return xp.expm1(x) / skew, xp.exp(x)


def cubic_bowl(u: Any, skew: Any, xp: Any = np) -> Any:
    """Asymmetric bowl: u^2/2 + skew u^3/6 down to its inflection at -1 / skew, straight below.

    Twice continuously differentiable and convex. Of the shapes tried for a valley over ln LR the
    one that Step Law's runs ask for (docs/log.md).
    """
    # By products: NumPy raises to the third power twenty times as slowly.
    reach = 1.0 / skew
    bent = xp.maximum(u, -reach)
    return bent * bent * (0.5 + skew * bent / 6.0) + 0.5 * reach * (bent - u)


def valley_excess(u: Any, curvature: Any, skew: Any, xp: Any = np) -> Any:
    """Loss above the floor, in nats, at u = ln(LR / LR*).

    curvature: nats per unit of u squared at the bottom, so that excess = curvature u^2 there.
    """
    return 2.0 * curvature * cubic_bowl(u, skew, xp)


def covariate_terms(z: Any, d_log_n_active: Any, p: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """What covariates do at z = ln(value / reference): how much ln LR they stand for, the loss
    above that at their best values, and how much of that the reference has, in nats.

    Each term is summed over the last axis, covariates, of ``p``. The best value moves with size.
    """
    best, curvature = best_covariate(d_log_n_active, p), p["covariate_curvature"]
    return (
        (p["covariate_shift"] * z).sum(axis=-1),
        (curvature * (z - best) ** 2).sum(axis=-1),
        (curvature * best**2).sum(axis=-1),
    )


def best_covariate(d_log_n_active: Any, p: Mapping[str, Any]) -> Any:
    """Natural log of each covariate's best value over the reference."""
    return p["covariate_optimum"] + p["covariate_n_active"] * d_log_n_active


def noise_scale(
    excess: Any,
    u: Any,
    d_log_batch: Any,
    d_log_tokens: Any,
    p: Mapping[str, Any],
    loss_se: Any,
    xp: Any = np,
) -> Any:
    """Scale of a final loss about its expectation, nats, at u = ln(LR / LR*).

    ``noise_sd`` of ``p`` is that of equal runs at the bottom of the valley, at the mean batch and
    tokens. It grows with the excess over the floor by ``noise_share``, for a valley is no exact
    bowl; with batch and tokens like powers, ``noise_batch`` and ``noise_tokens``; and from below
    the optimum to above by ``exp(2 noise_side)``. ``loss_se`` is the error of measuring.
    """
    widening = (
        p["noise_batch"] * d_log_batch + p["noise_tokens"] * d_log_tokens
        + p["noise_side"] * xp.tanh(u)
    )  # fmt: skip
    widening = xp.clip(widening, -_MAX_WIDENING, _MAX_WIDENING)
    own = p["noise_sd"] ** 2 + (p["noise_share"] * excess) ** 2
    return xp.sqrt(xp.exp(2.0 * widening) * own + loss_se**2)


def noise_shares(in_trunk: Any, in_order: Any, p: Mapping[str, Any], xp: Any = np) -> Any:
    """Parts of the noise of a row, as shares of its scale: its training run's, its data order's,
    its own. Their squares add up to one.

    in_trunk, in_order: one where the row has such a part, else zero. ``noise_run`` and
    ``noise_order`` of ``p`` are the scales of each over that of the row's own.
    """
    trunk, order = in_trunk * p["noise_run"], in_order * p["noise_order"]
    own = 1.0 / xp.sqrt(1.0 + trunk**2 + order**2)
    return trunk * own, order * own, own


def logistic(x: Any) -> Any:
    """1 / (1 + e^-x), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def softplus(x: Any, xp: Any = np) -> Any:
    """ln(1 + e^x), without overflow in itself or in its gradient."""
    magnitude = xp.abs(x)
    return 0.5 * (x + magnitude) + xp.log1p(xp.exp(-magnitude))


def batch_knee(z: Any, slope_below: Any, slope_above: Any, xp: Any = np) -> Any:
    """Shift of ln LR* at z = ln(batch / best batch): two slopes joined smoothly at z = 0.

    Below the best batch noise limits the step and LR* grows like a power of the batch; above it
    the growth dies down. Zero at z = 0. The surge rule of Li et al. 2024 (arXiv 2405.14578) has
    slopes 1/2 and -1/2.
    """
    above = (softplus(KNEE_SHARPNESS * z, xp) - np.log(2.0)) / KNEE_SHARPNESS
    return slope_below * z + (slope_above - slope_below) * above
