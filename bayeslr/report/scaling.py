"""The law's part of the report: LR against scale, and the exponents before and after the data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr import laws, predict
from bayeslr.features import REGRESSORS
from bayeslr.priors import PARAMETERS, PER_FAMILY, SLOPES
from bayeslr.report import figures
from bayeslr.report.published import PUBLISHED_EXPONENTS, PUBLISHED_LAWS
from bayeslr.report.slices import QUANTILES, Slice
from bayeslr.report.text import signed
from bayeslr.sensitivity import UNTOUCHED, overlap, prior_draws, quantity_draws
from bayeslr.specs import Target
from bayeslr.units import format_lr, format_quantity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayeslr.features import Design
    from bayeslr.posterior import Posterior

    FloatArray = NDArray[np.float64]

_NUM_POINTS = 60

EXPONENTS = (*SLOPES, "best_batch_tokens", "loss_exponent_n_active", "loss_exponent_tokens")
_TITLES = {
    "lr_n_active": ("Active parameters", "exponent of LR*"),
    "lr_sparsity": ("Sparsity", "exponent of LR* in active / total"),
    "lr_tokens": ("Tokens", "exponent of LR*, at the best batch"),
    "lr_batch_below": ("Small batches", "exponent of LR* below the best batch"),
    "lr_batch_above": ("Large batches", "exponent of LR* above the best batch"),
    "best_batch_tokens": ("Best batch", "its exponent in tokens"),
    "loss_exponent_n_active": ("Loss and parameters", "exponent of the loss"),
    "loss_exponent_tokens": ("Loss and tokens", "exponent of the loss"),
}
_TWO_STAGE = {
    "log_n_active": "lr_n_active", "log_sparsity": "lr_sparsity", "log_tokens": "lr_tokens",
    "log_batch": "lr_batch_below",
}  # fmt: skip


def law_draws(posterior: Posterior, family: int, x: dict[str, FloatArray]) -> FloatArray:
    """Ln LR* of the fitted law, without anything peculiar to a shape, cell or slice.

    x: the regressors, natural logs, each (point,). Returns: (draw, point).
    """
    centre = posterior.info["centre"]
    if "family_slope" not in posterior.draws:
        away = np.stack([x[key] - centre[key] for key in REGRESSORS])
        law = posterior.flat("intercept")[:, family, None] + posterior.flat("coefficient") @ away
        return np.asarray(law, dtype=np.float64)
    d_n, d_s, d_d = (x[key] - centre[key] for key in REGRESSORS[:3])
    column = {
        name: posterior.flat(name)[:, None] for name in ("best_batch_n_active", "best_batch_tokens")
    }
    b_n, b_s, b_d, below, above = (
        posterior.flat("family_slope")[:, family, i, None] for i in range(len(SLOPES))
    )
    best_batch = (
        posterior.flat("best_batch_level")[:, family, None]
        + column["best_batch_n_active"] * d_n
        + column["best_batch_tokens"] * d_d
    )
    level = posterior.flat("lr_level")[:, family, None] + b_n * d_n + b_s * d_s + b_d * d_d
    knee = laws.batch_knee(x["log_batch"] - best_batch, below, above)
    return np.asarray(level + knee, dtype=np.float64)


def scale_figures(
    posterior: Posterior, target: Target, row: dict[str, Any], slices: Sequence[Slice]
) -> list[dict[str, str]]:
    """LR against active parameters and against tokens, all else as at the target."""
    return [
        _scale_figure(posterior, target, row, slices, "n_active", "active parameters"),
        _scale_figure(posterior, target, row, slices, "tokens", "tokens"),
    ]


def _scale_figure(
    posterior: Posterior,
    target: Target,
    row: dict[str, Any],
    slices: Sequence[Slice],
    what: str,
    words: str,
) -> dict[str, str]:
    key = f"log_{what}"
    at_target = float(getattr(target, what))
    ranges = predict.data_ranges(posterior, target)
    low, high = map(math.exp, ranges[key]) if ranges else (0.0, math.inf)
    start = min(low or at_target / 30, at_target) / 1.7
    end = max(high if ranges else at_target * 10, at_target) * 2.0
    if what == "tokens":
        start = max(start, target.batch_tokens)
    x = np.geomspace(start, end, _NUM_POINTS)
    sparsity = target.n_active / target.n_total
    targets = [
        dataclasses.replace(target, n_active=value, n_total=value / sparsity)
        if what == "n_active"
        else dataclasses.replace(target, tokens=value)
        for value in x
    ]
    n_active = np.array([t.n_active for t in targets])
    n_total = np.array([t.n_total for t in targets])
    tokens = np.array([t.tokens for t in targets])
    draws = predict.target_draws(posterior, targets).log_lr
    bands = {
        q: np.exp(_smooth(np.log(x), np.quantile(draws, p, axis=0))) for q, p in QUANTILES.items()
    }
    points = _points(posterior, target, slices, key)
    first, last = (format_quantity(end) for end in (low, high)) if ranges else ("", "")
    where = f"all at {first}" if first == last else f"{first} to {last}"
    beyond = f" The hatched ground is beyond the runs ({where})." if ranges else ""
    carried = (
        " Each dot is the optimum of one slice, carried along the fitted law to the target's other "
        "regressors; its bar is the slice's own 90 % interval."
        if len(points["x"])
        else ""
    )
    if what == "n_active":
        held = "tokens, batch and sparsity" if sparsity < 1 else "tokens and batch"
    else:
        held = "parameters and batch"
    return {
        "caption": f"Against {words}, with the target's {held}.{carried}{beyond}",
        "svg": figures.scale(
            f"scale-{what}",
            x=x,
            bands=bands,
            points=points,
            data_range=(low, high),
            laws=[(law.label, law(n_active, n_total, tokens)) for law in PUBLISHED_LAWS],
            target={
                "x": at_target,
                "lr": row["lr"],
                **{q: row[f"lr_{q}"] for q in QUANTILES},
            },
            xlabel=words,
            text=format_quantity,
            description=f"Optimal LR against {words}. At the target, {format_quantity(at_target)}, "
            f"it lies between {format_lr(row['lr_q05'])} and {format_lr(row['lr_q95'])} with 90 % "
            f"probability; the median goes from {format_lr(bands['q50'][0])} at "
            f"{format_quantity(x[0])} to {format_lr(bands['q50'][-1])} at "
            f"{format_quantity(x[-1])}.",
        ),
    }


def _smooth(log_x: FloatArray, values: FloatArray) -> FloatArray:
    """A quintic through quantiles that carry the noise of finitely many draws."""
    scaled = (log_x - log_x.mean()) / np.ptp(log_x)
    return np.asarray(np.polyval(np.polyfit(scaled, values, 5), scaled), dtype=np.float64)


def _points(
    posterior: Posterior, target: Target, slices: Sequence[Slice], key: str
) -> dict[str, FloatArray]:
    """Optima of the bracketed slices, moved to the target's other regressors by the fitted law."""
    design = posterior.design
    shown = [one for one in slices if one.bracketed and one.star]
    if design is not None:
        annealed = design.annealed[design.cell_of_slice]
        shown = [one for one in shown if annealed[one.number]]
        if target.family in design.families:
            own = design.families.index(target.family)
            shown = [one for one in shown if design.family_of_slice[one.number] == own]
    if design is None or not shown:
        return {name: np.array([]) for name in ("x", "q05", "q50", "q95")}
    numbers = np.array([one.number for one in shown])
    here = {name: values[numbers] for name, values in design.slice_features().items()}
    there = {
        "log_n_active": np.full(len(numbers), math.log(target.n_active)),
        "log_sparsity": np.full(len(numbers), math.log(target.n_active / target.n_total)),
        "log_tokens": np.full(len(numbers), math.log(target.tokens)),
        "log_batch": np.full(len(numbers), math.log(target.batch_tokens)),
        key: here[key],
    }
    shift = np.empty(len(numbers))
    for family in np.unique(design.family_of_slice[numbers]):
        of = design.family_of_slice[numbers] == family
        moved = law_draws(posterior, int(family), {k: v[of] for k, v in there.items()})
        stood = law_draws(posterior, int(family), {k: v[of] for k, v in here.items()})
        shift[of] = np.median(moved - stood, axis=0)
    carried = {
        q: np.array([one.star[q] for one in shown]) * np.exp(shift) for q in ("q05", "q50", "q95")
    }
    return {"x": np.exp(here[key]), **carried}


def published_rows(target: Target, lr: float) -> list[dict[str, str]]:
    """What the published laws say at the target."""
    rows = []
    for law in PUBLISHED_LAWS:
        value = float(law(target.n_active, target.n_total, target.tokens))
        rows.append(
            {
                "label": law.label,
                "lr": format_lr(value),
                "times": f"× {value / lr:.2g}",
                "formula": law.formula,
                "source": law.source,
            }
        )
    return rows


def exponent_cards(posterior: Posterior, target: Target) -> list[dict[str, str]]:
    """Each exponent before and after the data: of the target's family, else of the population."""
    family = None
    if posterior.design is not None and target.family in posterior.design.families:
        family = posterior.design.families.index(target.family)
    elif posterior.design is not None and len(posterior.design.families) == 1:
        family = 0
    cards = []
    for name in EXPONENTS:
        draws = _exponent_draws(posterior, name, family)
        if draws is None or (name == "lr_sparsity" and _all_dense(posterior, target)):
            continue
        before, after = draws
        title, subtitle = _TITLES[name]
        references = PUBLISHED_EXPONENTS.get(name, ())
        q05, q50, q95 = np.quantile(after, [0.05, 0.5, 0.95])
        now = f"{signed(q50)}, 90 % between {signed(q05)} and {signed(q95)}"
        fitted = posterior.design is not None
        told = f"{'Prior' if not fitted else 'Estimate' if before is None else 'Posterior'} {now}."
        if before is not None and fitted:
            told += " " + _learned(before, after)
        if references:
            listed = ", ".join(f"{label} {signed(value)}" for label, value, _ in references)
            told += f" Published: {listed}."
        cards.append(
            {
                "title": title,
                "subtitle": subtitle,
                "caption": told,
                "svg": figures.exponent(
                    f"exponent-{name}",
                    prior=before,
                    posterior=after if fitted else None,
                    references=[value for _, value, _ in references],
                    xlabel=subtitle,
                    description=f"{PARAMETERS[name]}: {told}",
                ),
            }
        )
    return cards


def exponent_sources(cards: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Where the published values of the shown exponents come from."""
    shown = {card["title"] for card in cards}
    return [
        {"quantity": _TITLES[name][0], "label": label, "value": signed(value), "source": source}
        for name, references in PUBLISHED_EXPONENTS.items()
        for label, value, source in references
        if _TITLES[name][0] in shown
    ]


def _exponent_draws(
    posterior: Posterior, name: str, family: int | None
) -> tuple[FloatArray | None, FloatArray] | None:
    """Prior and posterior draws of one exponent, or None where the method has no such thing."""
    if "coefficient" in posterior.draws:
        for i, regressor in enumerate(REGRESSORS):
            if _TWO_STAGE[regressor] == name:
                values = posterior.flat("coefficient")[:, i]
                return (None, values) if np.std(values) > 0 else None
        return None
    rng = np.random.default_rng(20_260_105)
    if name in SLOPES and family is not None:
        before = prior_draws(posterior.prior, posterior.info["centre"])[name]
        return before, quantity_draws(posterior, name, family)
    before = posterior.prior[name].draw(rng, 8000)
    if name in PER_FAMILY and posterior.draws[name].ndim == 3:
        return (before, posterior.flat(name)[:, family]) if family is not None else None
    return before, posterior.flat(name)


def _learned(before: FloatArray, after: FloatArray) -> str:
    """How much the runs said about a parameter: what prior and posterior share, and the widths."""
    shared, left = overlap(before, after), float(np.std(after) / np.std(before))
    if shared >= UNTOUCHED:
        return f"The runs did not touch it (prior and posterior share {100 * shared:.0f} %)."
    text = f"Prior and posterior share {100 * shared:.0f} %"
    return f"{text}; the runs narrowed it by {100 * (1 - left):.0f} %." if left < 1 else f"{text}."


def _all_dense(posterior: Posterior, target: Target) -> bool:
    design: Design | None = posterior.design
    return target.n_active == target.n_total and (
        design is None or not bool((design.log_sparsity < -1e-9).any())
    )
