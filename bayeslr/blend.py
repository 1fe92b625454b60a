"""Two models of one LR: a transferred one and a fitted law, weighed by what they predict.

Both are the valley model on the same runs; they differ in the prior card. Under ``transfer`` the
exponents of the base LR are near zero, as muP and its kin intend, under a law's card they are those
of published laws; enough runs overrule either. Each card is fitted without the largest shapes, and
scored by the log density that it then gives to their optima; the weights follow from the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr.errors import DataError
from bayeslr.posterior import Posterior
from bayeslr.predict import (
    TargetDraws,
    family_of,
    predict,
    slice_target,
    summary,
    target_draws,
    target_list,
)
from bayeslr.runs import RunTable
from bayeslr.sampling import fit
from bayeslr.specs import Target

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

CARDS = ("transfer", "moe-default")
NUM_DRAWS = 2000

# Shapes of more than this share of the largest one's active parameters are held out together.
_LARGE = 1 / 1.5


@dataclass(frozen=True, kw_only=True)
class Blend:
    """One prediction from several cards, and each alone.

    weights: by card, adding up to 1. scores: by card, mean log density of the held-out optima of a
    shape, added over shapes, in nats; empty where no shape could be held out, and then the weights
    are equal. predictions, alone: tables as those of `predict`, without what needs one fit.
    doubted: cards whose fit without the held-out shape, which the scores are of, did not converge.
    """

    weights: Mapping[str, float]
    scores: Mapping[str, float]
    num_held_out: int
    posteriors: Mapping[str, Posterior]
    alone: Mapping[str, pd.DataFrame]
    predictions: pd.DataFrame
    doubted: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """What the weights rest on."""
        shares = ", ".join(f"{100 * w:.0f} % {card}" for card, w in self.weights.items())
        if not self.scores:
            return f"No larger shape could be held out, so each card counts alike ({shares})."
        optima = "optimum" if self.num_held_out == 1 else f"{self.num_held_out} optima"
        said = f"Weighed by the {optima} of the largest shape, held out: {shares}"
        if self.doubted:
            said += f" (without it the fit under {' and '.join(self.doubted)} did not converge)"
        return f"{said}."


def blend(
    runs: RunTable, targets: Iterable[Target], *, cards: Sequence[str] = CARDS, seed: int = 1
) -> Blend:
    """Fit a table under each card and blend their predictions.

    runs: of one parametrisation, for an LR of one does not compare with an LR of another.
    Raises: DataError if the table mixes parametrisations or holds no usable run.
    """
    targets = target_list(targets)
    kinds = sorted(runs.frame["parametrization"].fillna("sp").unique())
    if len(kinds) > 1:
        raise DataError(
            f"a transferred LR is that of one parametrization; the runs have {', '.join(kinds)}"
        )
    posteriors = {card: fit(runs, card, seed=seed) for card in cards}
    held_out, rest = _split(posteriors[cards[0]])
    scores: dict[str, float] = {}
    doubted: tuple[str, ...] = ()
    if rest is not None:
        optimum = np.concatenate([p.flat("lr_opt") for p in posteriors.values()])
        refits = {card: fit(rest, card, seed=seed, fast=True) for card in cards}
        doubted = tuple(card for card, refit in refits.items() if not refit.trustworthy)
        shapes = _shapes_of(posteriors[cards[0]], held_out)
        for card, refit in refits.items():
            predicted = target_draws(refit, list(held_out.values())).log_lr
            each = {
                s: log_score(predicted[:, i], optimum[:, s]) for i, s in enumerate(held_out)
            }  # fmt: skip
            scores[card] = math.fsum(
                float(np.mean([each[s] for s in slices])) for slices in shapes.values()
            )
    weights = weights_of(scores) if scores else {card: 1 / len(cards) for card in cards}
    return Blend(
        weights=weights,
        scores=scores,
        num_held_out=len(held_out) if scores else 0,
        posteriors=posteriors,
        alone={card: predict(p, targets) for card, p in posteriors.items()},
        predictions=blended(posteriors, weights, targets),
        doubted=doubted,
    )


def weights_of(scores: Mapping[str, float]) -> dict[str, float]:
    """Weights proportional to the held-out densities, exp(score)."""
    best = max(scores.values())
    raw = {card: math.exp(score - best) for card, score in scores.items()}
    total = math.fsum(raw.values())
    return {card: value / total for card, value in raw.items()}


def log_score(predicted: FloatArray, optimum: FloatArray) -> float:
    """Log density that predicted draws (draw,) give to an optimum known by its draws (draw,).

    The prediction's density is smoothed by Silverman's rule, and averaged over what is known of the
    optimum: an optimum that its own runs leave open says little about anybody. Nats.
    """
    x = np.asarray(predicted)[:: max(1, len(predicted) // 500)]
    y = np.asarray(optimum)[:: max(1, len(optimum) // 500)]
    width = max(0.9 * float(x.std()) * len(x) ** -0.2, 1e-3)
    z = (y[:, None] - x[None]) / width
    density = np.exp(-0.5 * z**2).mean() / (width * math.sqrt(2 * math.pi))
    return float(np.log(max(density, 1e-300)))


def blended(
    posteriors: Mapping[str, Posterior], weights: Mapping[str, float], targets: Sequence[Target]
) -> pd.DataFrame:
    """Predictions table of the mixture, with the columns of `summary`."""
    import pandas as pd

    parts = [target_draws(p, targets, max_draws=NUM_DRAWS) for p in posteriors.values()]
    found = summary(_mixture(parts, [weights[card] for card in posteriors]))
    anyone = next(iter(posteriors.values()))
    unseen = [family_of(anyone, target) is None for target in targets]
    found["loss_q50"][unseen] = np.nan
    return pd.DataFrame({"target_id": [target.target_id for target in targets], **found})


def _mixture(parts: Sequence[TargetDraws], weights: Sequence[float]) -> TargetDraws:
    """Draws of each part in proportion to its weight, evenly thinned."""
    counts = [round(NUM_DRAWS * weight) for weight in weights]
    joined: dict[str, Any] = {}
    for field in fields(TargetDraws):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "diverged_loss":
            joined[field.name] = max(values)
            continue
        width = max(v.shape[1] for v in values)
        kept = [
            np.broadcast_to(v, (len(v), width))[np.linspace(0, len(v) - 1, n).astype(int)]
            for v, n in zip(values, counts, strict=True)
        ]
        joined[field.name] = np.concatenate(kept)
    return TargetDraws(**joined)


def _split(posterior: Posterior) -> tuple[dict[int, Target], RunTable | None]:
    """Slices of the largest shapes as targets, and the runs of the others; None if none is left."""
    runs, design = posterior.runs, posterior.design
    if runs is None or design is None or design.num_shapes < 2:
        return {}, None
    # Of the design, not of the table: a failed run has no optimum, however large it was to be.
    log_n_active = design.slice_features()["log_n_active"]
    ended = design.annealed[design.cell_of_slice]
    if not ended.any():
        return {}, None
    limit = float(log_n_active[ended].max()) + math.log(_LARGE)
    held_out = {
        int(s): slice_target(posterior, int(s))
        for s in np.flatnonzero(ended & (log_n_active > limit))
    }
    frame = runs.frame
    rest = frame[np.log(frame["n_active"].to_numpy(dtype=float)) <= limit]
    finished = set(rest.loc[rest["status"] == "ok", "family"])
    if not {target.family for target in held_out.values()} <= finished:
        return {}, None
    kept = RunTable(
        frame=rest.reset_index(drop=True), quarantine=runs.quarantine.iloc[:0], warnings=(),
        source=f"{runs.source} without its largest shapes",
    )  # fmt: skip
    return held_out, kept


def _shapes_of(posterior: Posterior, slices: Mapping[int, Target]) -> dict[int, list[int]]:
    """Slices by shape: those of one shape share what is peculiar to it, so they count as one."""
    found: dict[int, list[int]] = {}
    assert posterior.design is not None
    for s in slices:
        found.setdefault(int(posterior.design.shape_of_slice[s]), []).append(s)
    return found
