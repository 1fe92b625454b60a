"""Hyperparameters beside the LR (weight decay, LR multipliers): where their best values lie.

The model's terms are in `bayeslr.laws.covariate_terms`: a covariate stands for part of the LR, and
has a best value of its own that moves with size. Known for the covariates that differ within some
slice of the fit; of any other the prior card speaks alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr import laws
from bayeslr.posterior import Posterior
from bayeslr.predict import (
    QUANTILES,
    TargetDraws,
    extra_tokens_share,
    family_of,
    target_draws,
    target_features,
    target_list,
)
from bayeslr.priors import PER_COVARIATE
from bayeslr.specs import Target
from bayeslr.units import format_extra_tokens

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from bayeslr.features import Design

    FloatArray = NDArray[np.float64]

_BEST_COLUMNS = tuple(f"best_q{round(100 * q):02d}" for q in QUANTILES)
_COLUMNS = [
    "target_id", "covariate", "reference", "tried_low", "tried_high", "value", *_BEST_COLUMNS,
    "gain_mean", "gain_q05", "extra_tokens", "lr_factor", "sentence",
]  # fmt: skip


def covariate_draws(
    posterior: Posterior, names: Sequence[str], families: Sequence[int | None], max_draws: int
) -> dict[str, FloatArray]:
    """Draws of `PER_COVARIATE`, each (draw, family, covariate), with those of `target_draws`.

    What the fit does not know, of a family or a covariate, is drawn from the card, with the fit's
    own seed.
    """
    kept = posterior.thinned(max_draws)
    known = [] if posterior.design is None else list(posterior.design.covariates)
    found = {}
    for parameter in PER_COVARIATE:
        values = np.empty((len(kept), len(families), len(names)))
        for k, name in enumerate(names):
            for i, g in enumerate(families):
                # The same draws for the same family, whoever asks.
                if g is not None and name in known and parameter in posterior.draws:
                    values[:, i, k] = posterior.flat(parameter)[kept, g, known.index(name)]
                else:
                    own = 0 if g is None else g + 1
                    key = [int(posterior.info["seed"]), own, *parameter.encode(), *name.encode()]
                    rng = np.random.default_rng(key)
                    values[:, i, k] = posterior.prior[parameter].draw(rng, len(kept))
        found[parameter] = values
    return found


def log_ratio(design: Design, name: str, value: float, family: int) -> float:
    """Ln of a covariate's value over the family's reference, as the fit would take it.

    None at all (0) counts as `Design.covariate_least`.
    """
    at = family, design.covariates.index(name)
    reference, least = (float(x[at]) for x in (design.covariate_reference, design.covariate_least))
    return math.log(max(value, least) / reference)


def lr_shifts(posterior: Posterior, targets: Sequence[Target],
              values: Sequence[Mapping[str, float]], max_draws: int) -> FloatArray:  # fmt: skip
    """Draws (draw, target) of what each target's covariates stand for in ln LR.

    values: as of `RunSpec.covariates`; a multiplier that is not stated is 1.
    """
    design = posterior.design
    names = () if design is None else design.covariates
    families = [family_of(posterior, target) for target in targets]
    z = np.zeros((len(targets), len(names)))
    for k, name in enumerate(names):
        assert design is not None
        z[:, k] = [
            log_ratio(design, name, row.get(name, 1.0), g or 0)
            for row, g in zip(values, families, strict=True)
        ]
    shift = _draws_of(posterior, names, families, max_draws)["covariate_shift"]
    return np.asarray((shift * z).sum(axis=2))


def _draws_of(posterior: Posterior, names: Sequence[str], families: Sequence[int | None],
              max_draws: int) -> dict[str, FloatArray]:  # fmt: skip
    """`covariate_draws` of each target's family, (draw, target, covariate)."""
    order = list(dict.fromkeys(families))
    at = [order.index(g) for g in families]
    found = covariate_draws(posterior, names, order, max_draws)
    return {name: values[:, at] for name, values in found.items()}


def best_values(
    posterior: Posterior, names: Sequence[str], targets: Sequence[Target], max_draws: int
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Ln of each covariate's best value over the reference, and `covariate_draws` there.

    Each (draw, target, covariate).
    """
    families = [family_of(posterior, target) for target in targets]
    p = _draws_of(posterior, names, families, max_draws)
    d_n = target_features(targets)["log_n_active"] - posterior.info["centre"]["log_n_active"]
    best: FloatArray = laws.best_covariate(d_n[:, None], p)
    return best, p


def least_expected(best: FloatArray, curvature: FloatArray) -> FloatArray:
    """Ln of the value with the least expected loss, over draws in the first dimension."""
    return np.asarray((curvature * best).mean(axis=0) / curvature.mean(axis=0))


def covariate_table(posterior: Posterior, targets: Iterable[Target]) -> pd.DataFrame:
    """Best values of the covariates at targets, one row a target and covariate, in order.

    Columns: target_id, covariate, reference (the value that the LR of the predictions table holds
    for), tried_low, tried_high, value (of least expected loss, within what was tried), best_q05 ..
    best_q95 (of the best value), gain_mean and gain_q05 (nats that the value saves over the
    reference), extra_tokens (share that would save as much), lr_factor (what the LR is to be
    multiplied by with this value), sentence. A covariate that the runs of the target's family do
    not vary has no row, and so has a target of a family that the fit has not seen.
    """
    import pandas as pd

    targets = target_list(targets)
    design = posterior.design
    names = () if design is None or "covariate" not in posterior.draws.dims else design.covariates
    seen = [target for target in targets if names and family_of(posterior, target) is not None]
    rows = [
        _row(posterior, target, name, at)
        for target in seen
        for name, at in _at_target(posterior, target).items()
    ]
    return pd.DataFrame(rows, columns=_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class _AtTarget:
    """Draws (draw,) of one covariate at one target: ln best value, curvature, shift of the LR."""

    best: FloatArray
    curvature: FloatArray
    shift: FloatArray
    valley: TargetDraws


def _at_target(posterior: Posterior, target: Target) -> dict[str, _AtTarget]:
    """By name, the covariates that the runs of the target's family vary."""
    assert posterior.design is not None
    names = [
        name for name in posterior.design.covariates
        if np.ptp(_tried(posterior, target, name)) > 0
    ]  # fmt: skip
    if not names:
        return {}
    valley = target_draws(posterior, [target])
    best, p = best_values(posterior, names, [target], len(valley.log_lr))
    return {
        name: _AtTarget(
            best=best[:, 0, k], curvature=p["covariate_curvature"][:, 0, k],
            shift=p["covariate_shift"][:, 0, k], valley=valley,
        )
        for k, name in enumerate(names)
    }  # fmt: skip


def _tried(posterior: Posterior, target: Target, name: str) -> FloatArray:
    """Ln of a covariate over the reference in the runs of the target's family, (run,)."""
    design = posterior.design
    assert design is not None
    mine = design.family_of_slice[design.slice_of_run] == family_of(posterior, target)
    return np.asarray(design.covariate_of_run[mine, design.covariates.index(name)])


def _row(posterior: Posterior, target: Target, name: str, at: _AtTarget) -> dict[str, Any]:
    design, g = posterior.design, family_of(posterior, target)
    assert design is not None
    k = design.covariates.index(name)
    reference, least = (
        float(of[g, k]) for of in (design.covariate_reference, design.covariate_least)
    )
    tried = _tried(posterior, target, name)
    low, high = float(tried.min()), float(tried.max())
    chosen = float(np.clip(least_expected(at.best, at.curvature), low, high))
    gain = at.curvature * (at.best**2 - (chosen - at.best) ** 2)
    mean = float(gain.mean())
    best = reference * np.exp(np.quantile(at.best, QUANTILES))
    row = {
        "target_id": target.target_id, "covariate": name,
        "reference": _stated(reference, least),
        "tried_low": _stated(reference * math.exp(low), least),
        "tried_high": reference * math.exp(high),
        "value": _stated(reference * math.exp(chosen), least),
        **dict(zip(_BEST_COLUMNS, best.tolist(), strict=True)),
        "gain_mean": mean, "gain_q05": float(np.quantile(gain, 0.05)),
        "extra_tokens": float(extra_tokens_share(at.valley, np.array([max(mean, 0.0)]))[0]),
        "lr_factor": math.exp(-float(at.shift.mean()) * chosen),
    }  # fmt: skip
    return {**row, "sentence": _sentence(row)}


def _stated(value: float, least: float) -> float:
    """A value as the runs have it: what stands for none at all is 0."""
    return 0.0 if math.isclose(value, least) else value


def _sentence(row: Mapping[str, Any]) -> str:
    """One sentence that a planner can quote about a row of the table."""
    told = (
        f"{row['covariate']} for {row['target_id']}: the best value lies between "
        f"{row['best_q05']:.3g} and {row['best_q95']:.3g} with 90 % probability"
    )
    told += f" (tried: {row['tried_low']:.3g} to {row['tried_high']:.3g}); "
    if math.isclose(row["value"], row["reference"], rel_tol=0.02):  # none at all, too
        return f"{told}stay at {row['reference']:.3g}."
    sure = "" if row["gain_q05"] > 0 else ", though it may lose some"
    return (
        f"{told}{row['value']:.3g} instead of {row['reference']:.3g}, with the LR times "
        f"{row['lr_factor']:.2f}, saves an expected {row['gain_mean']:.4f} nats, as much as "
        f"{format_extra_tokens(row['extra_tokens'])} more tokens{sure}."
    )
