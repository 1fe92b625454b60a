"""What the runs changed: prior against posterior, and what either still decides.

Overlap of prior and posterior, and power-scaling sensitivity (Kallioinen et al. 2023, Statistics
and Computing 34, 57): how fast a quantity's posterior moves when the prior, or the likelihood, is
raised to a power. Both come from the draws at hand; nothing is fitted again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr.pointwise import log_likelihood
from bayeslr.posterior import smoothed_weights
from bayeslr.predict import new_family
from bayeslr.priors import OUTPUTS, SLOPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayeslr.posterior import Posterior
    from bayeslr.priors import Prior

    FloatArray = NDArray[np.float64]

# The quantities that are judged, as a sentence lists them: "X in Y" is the exponent of X in Y.
QUANTITIES = {
    "lr_level": "level of LR*",
    "lr_n_active": "LR* in active parameters",
    "lr_sparsity": "LR* in sparsity",
    "lr_tokens": "LR* in tokens",
    "lr_batch_below": "LR* in small batches",
    "lr_batch_above": "LR* in large batches",
    "best_batch_level": "level of the best batch",
    "best_batch_n_active": "best batch in active parameters",
    "best_batch_tokens": "best batch in tokens",
    "log_curvature_level": "curvature of the valley",
    "curvature_n_active": "curvature in active parameters",
    "curvature_tokens": "curvature in tokens",
    "curvature_batch": "curvature in batch",
    "log_skew": "skew of the valley",
    "log_edge_offset": "distance of the divergence edge",
    "loss_exponent_n_active": "loss in active parameters",
    "loss_exponent_tokens": "loss in tokens",
}

# What each verdict means, in a word or two.
VERDICTS = {
    "card": "the card's: not touched by the runs",
    "both": "card and runs",
    "runs": "the runs'",
    "conflict": "the runs', against the card",
}

# Entry of the card behind a quantity that goes by another name.
_ENTRY = {
    "lr_level": "lr_intercept", "best_batch_level": "best_batch_intercept",
    "log_curvature_level": "curvature_intercept", "log_skew": "skew",
    "log_edge_offset": "edge_offset",
}  # fmt: skip

# Prior and posterior that share so much probability are one: 0.9 is a shift of a quarter sd, or
# a width that shrank by a fifth. Above a half the card still tells a good part of the story.
UNTOUCHED, SHARED = 0.9, 0.5

# Sensitivity above which a component matters (Kallioinen et al. 2023, section 3.3).
SENSITIVE = 0.05

# Of fits under a right card so many contradict it: the quantities that runs touched share them, for
# with a twentieth each one fit of five would (docs/log.md).
SURPRISING = 0.05

# Draws that a posterior is worth at least (posterior.py): they set the width of its smoothing.
_EFFECTIVE = 200.0

_DELTA = 0.01  # Powers 1 / 1.01 and 1.01: the gradient at one (Kallioinen et al. 2023).
_NUM_PRIOR, _MAX_DRAWS, _SEED = 8000, 2000, 20_260_105
_MAX_CELLS = 20_000_000  # Draws times runs whose likelihood is worked out.


@dataclass(frozen=True, kw_only=True, slots=True)
class Influence:
    """What prior and runs did to one quantity.

    ``overlap`` of prior and posterior in [0, 1]; ``by_card`` and ``by_runs`` the power-scaling
    sensitivities to the card's entry and to the likelihood, ``noise`` what the latter would be of
    draws that have nothing to do with it; ``surprise`` the prior's two-sided tail beyond the
    posterior median. ``family`` is None for what all families share. ``verdict`` is ``card`` (the
    runs did not touch it), ``both``, ``runs`` or ``conflict`` (they contradict the card).
    """

    name: str
    family: str | None
    overlap: float
    by_card: float
    by_runs: float
    noise: float
    surprise: float
    verdict: str

    def document(self) -> dict[str, Any]:
        """JSON-safe form, as it stands in fit.json."""
        return dataclasses.asdict(self)


def influence(posterior: Posterior) -> list[Influence]:
    """What the card and the runs did to every quantity, family by family.

    Empty for a method without a prior, and for a card alone.
    """
    if posterior.design is None or posterior.info["method"] != "bayes":
        return []
    kept = posterior.thinned(int(np.clip(_MAX_CELLS // posterior.design.num_runs, 200, _MAX_DRAWS)))
    runs = log_likelihood(posterior, kept)
    before = prior_draws(posterior.prior, posterior.info["centre"])
    families = posterior.info["families"]
    design = posterior.design
    dense = not bool((design.log_sparsity < -1e-9).any())
    found: list[Influence] = []
    for name in QUANTITIES:
        if name == "lr_sparsity" and dense:
            continue
        own = name in OUTPUTS or name in SLOPES
        for g, family in enumerate(families if own else [None]):
            after = quantity_draws(posterior, name, g)
            below = float((before[name] < np.median(after)).mean())
            surprise = 2.0 * min(below, 1.0 - below)
            shared = overlap(before[name], after)
            card = power_scaling(after[kept], _log_prior(posterior, name, g)[kept])
            found.append(Influence(
                name=name, family=family, overlap=shared, by_card=card,
                by_runs=power_scaling(after[kept], runs), noise=_noise(after[kept], runs),
                surprise=surprise, verdict=_verdict(shared, card),
            ))  # fmt: skip
    return _contradicted(found)


def _verdict(shared: float, by_card: float) -> str:
    if shared >= UNTOUCHED:
        return "card"
    return "both" if shared >= SHARED or by_card >= SENSITIVE else "runs"


def _contradicted(found: Sequence[Influence]) -> list[Influence]:
    """The same, with the verdict ``conflict`` where what runs touched is too far from the card."""
    touched = [one.verdict != "card" for one in found]
    return [
        dataclasses.replace(one, verdict="conflict")
        if mine and one.surprise < SURPRISING / sum(touched) else one
        for one, mine in zip(found, touched, strict=True)
    ]  # fmt: skip


def _log_prior(posterior: Posterior, name: str, family: int) -> FloatArray:
    """Log density (draw,), constants left out, of the card's entry behind a quantity."""
    entry = posterior.prior[_ENTRY.get(name, name)]
    values = posterior.flat(entry.name)
    values = values[:, family] if values.ndim == 2 else values
    away = values - entry.location if entry.kind == "normal" else np.log(values / entry.location)
    return np.asarray(-0.5 * (away / entry.scale) ** 2)


def _noise(values: FloatArray, log_component: FloatArray, num_shifts: int = 3) -> float:
    """Sensitivity to the same component told at other draws: what finitely many draws feign."""
    length = len(values)
    shifts = np.linspace(0.1, 0.9, num_shifts) * length
    return float(np.mean(
        [power_scaling(values, np.roll(log_component, int(shift))) for shift in shifts]
    ))  # fmt: skip


def sentences(found: Sequence[Influence], at_most: int | None = None) -> list[str]:
    """What a planner should know of the card's part, a sentence a verdict.

    at_most: quantities that a sentence names; the rest are counted.
    """
    patterns = {
        "card": "Not touched by the runs, so as the prior card has it: {}.",
        "conflict": "Against the prior card (does it hold for this recipe?): {}.",
    }
    families = list(dict.fromkeys(one.family for one in found if one.family is not None))
    told = []
    for verdict, pattern in patterns.items():
        names: dict[str, list[str]] = {}
        for one in found:
            if one.verdict == verdict:
                names.setdefault(QUANTITIES[one.name], []).append(one.family or "")
        listed = [
            name if len(families) < 2 or where in ([""], families) else
            f"{name} ({', '.join(where)})"
            for name, where in names.items()
        ]  # fmt: skip
        if at_most is not None and len(listed) > at_most + 1:
            listed = [*listed[:at_most], f"and {len(listed) - at_most} more"]
        if listed:
            told.append(pattern.format("; ".join(listed)))
    return told


def prior_draws(prior: Prior, centre: Mapping[str, float], num_draws: int = _NUM_PRIOR,
                seed: int = _SEED) -> dict[str, FloatArray]:  # fmt: skip
    """Draws (draw,) of every quantity of `QUANTITIES` before any run, for one family.

    Levels are those at ``centre``, natural logs of the regressors, as the model states them.
    """
    rng = np.random.default_rng(seed)
    p = {name: entry.draw(rng, num_draws) for name, entry in prior.parameters.items()}
    away = {name: centre[name] - at for name, at in prior.log_reference.items()}

    def normal(_: Any) -> FloatArray:
        return rng.normal(size=num_draws)

    found = {name: new_family(name, p, prior, away, normal) for name in (*_ENTRY, *SLOPES)}
    return {name: found[name] if name in found else p[name] for name in QUANTITIES}


def quantity_draws(posterior: Posterior, name: str, family: int) -> FloatArray:
    """Draws (draw,) of one quantity of `QUANTITIES` in one family of the fit."""
    if name in SLOPES:
        return posterior.flat("family_slope")[:, family, SLOPES.index(name)]
    values = posterior.flat(name)
    return values[:, family] if values.ndim == 2 else values


def overlap(first: FloatArray, second: FloatArray) -> float:
    """Probability that two sets of draws share: the integral of the smaller density, in [0, 1]."""
    low, high = min(first.min(), second.min()), max(first.max(), second.max())
    if not high > low:
        return 1.0
    edges = np.linspace(low, high, 513)
    densities = []
    for values in (first, second):
        quarter, three = np.quantile(values, [0.25, 0.75])
        width = 0.9 * min(values.std(), (three - quarter) / 1.34) * _EFFECTIVE**-0.2
        counts = np.histogram(values, edges)[0] / len(values)
        step = (edges[1] - edges[0]) / max(width, edges[1] - edges[0])
        reach = np.arange(-512, 513)
        kernel = np.exp(-0.5 * (reach * step) ** 2)
        densities.append(np.convolve(counts, kernel / kernel.sum(), mode="same"))
    return float(np.minimum(*densities).sum() / max(densities[0].sum(), densities[1].sum()))


def distance(values: FloatArray, weights: FloatArray) -> float:
    """Cumulative Jensen-Shannon distance between draws and the same draws weighted, in [0, 1].

    From Nguyen and Vreeken 2015; the larger of the distances of the draws and of their mirror
    image, each over the integral of both distribution functions.
    """
    order = np.argsort(values)
    steps = np.diff(values[order])
    plain = np.arange(1, len(values)) / len(values)
    weighted = np.cumsum(weights[order])[:-1] / weights.sum()
    found = []
    for p, q in ((plain, weighted), (1.0 - plain, 1.0 - weighted)):
        q = np.clip(q, 1e-15, 1.0)
        middle = 0.5 * (p + q)
        apart = p * np.log2(p / middle) + q * np.log2(q / middle)
        whole = float(steps @ (p + q))
        found.append(np.sqrt(max(float(steps @ apart), 0.0) / whole) if whole > 0 else 0.0)
    return float(max(found))


def power_scaling(values: FloatArray, log_component: FloatArray) -> float:
    """Sensitivity of a quantity to raising a component of the density to a power.

    values, log_component: (draw,), the component's log density at each draw. Returns: the distance
    per doubling of the power, at power one (Kallioinen et al. 2023, section 2.3).
    """
    total = 0.0
    for power in (1.0 / (1.0 + _DELTA), 1.0 + _DELTA):
        weights, _ = smoothed_weights((power - 1.0) * log_component)
        total += distance(values, weights)
    return float(total / (2.0 * np.log2(1.0 + _DELTA)))
