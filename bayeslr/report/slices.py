"""The runs' part of the report: every slice, its valley, and whether its optimum was bracketed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bayeslr import laws
from bayeslr.models import two_stage
from bayeslr.report import figures
from bayeslr.report.text import interval_text
from bayeslr.specs import Target
from bayeslr.units import counted, format_lr, format_quantity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayeslr.features import Design
    from bayeslr.posterior import Posterior

    FloatArray = NDArray[np.float64]

MAX_VALLEYS = 12
QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The runs of one slice: finished ones by LR, with their losses, and diverged ones.

    ``star`` holds quantiles of LR*; empty where the method gives none for this slice. ``edge`` is
    the side on which the optimum was not bracketed. ``num_others`` runs are left out, for their
    weight decay or LR multipliers are not the reference, so they lie in another valley.
    """

    number: int
    lr: FloatArray
    loss: FloatArray
    diverged_lr: FloatArray
    star: dict[str, float]
    num_others: int = 0

    @property
    def num_lrs(self) -> int:
        """Different LRs that finished."""
        return len(np.unique(np.round(np.log(self.lr), 2)))

    @property
    def best_lr(self) -> float | None:
        """LR of the finished run with the lowest loss."""
        return float(self.lr[np.argmin(self.loss)]) if len(self.lr) else None

    @property
    def edge(self) -> str | None:
        """``low`` or ``high`` where the best run is the outermost on that side; else None.

        A diverged run above the best one closes the high side.
        """
        best = self.best_lr
        if best is None or self.num_lrs < 2:
            return None
        if best <= self.lr.min() * 1.01:
            return "low"
        closed = len(self.diverged_lr) > 0 and self.diverged_lr.max() > best
        return "high" if best >= self.lr.max() / 1.01 and not closed else None

    @property
    def bracketed(self) -> bool:
        """Whether runs on both sides of the best one bound the optimum."""
        return self.num_lrs >= 3 and self.edge is None


def read_slices(posterior: Posterior) -> list[Slice]:
    """Every slice of the fitted runs, in the order of the design."""
    design = posterior.design
    if design is None:
        return []
    stars = _stars(posterior, design)
    slices = []
    for number in range(design.num_slices):
        runs = design.slice_of_run == number
        here = runs & design.at_reference
        finished = here & ~design.diverged
        slices.append(
            Slice(
                number=number,
                lr=np.exp(design.log_lr[finished]),
                loss=design.loss[finished],
                diverged_lr=np.exp(design.log_lr[here & design.diverged]),
                star=stars[number],
                num_others=int((runs & ~here).sum()),
            )
        )
    return slices


def _stars(posterior: Posterior, design: Design) -> list[dict[str, float]]:
    if "lr_opt" in posterior.draws:
        values = np.exp(np.quantile(posterior.flat("lr_opt"), list(QUANTILES.values()), axis=0))
        return [dict(zip(QUANTILES, map(float, column), strict=True)) for column in values.T]
    vertex, _, _ = two_stage.vertices(design)
    return [dict.fromkeys(QUANTILES, math.exp(v)) if np.isfinite(v) else {} for v in vertex]


def _interval(star: Mapping[str, float]) -> str:
    """The 90 % interval of LR*; empty where it is not known, as of the bottom of a parabola."""
    known = star and star["q05"] < star["q95"]
    return interval_text(star["q05"], star["q95"]) if known else ""


def names(design: Design, number: int) -> tuple[str, str]:
    """What a slice is called: its shape, and its horizon with its batch."""
    x = {key: float(values[number]) for key, values in design.slice_features().items()}
    size = format_quantity(math.exp(x["log_n_active"]))
    if x["log_sparsity"] < -1e-9:
        size += f" of {format_quantity(math.exp(x['log_n_active'] - x['log_sparsity']))}"
    told = f"{format_quantity(math.exp(x['log_tokens']))} tokens"
    told += f", batch {format_quantity(math.exp(x['log_batch']))}"
    if not design.annealed[design.cell_of_slice[number]]:
        told += ", before the decay"
    return size, told


def nearest(design: Design, slices: list[Slice], target: Target) -> list[Slice]:
    """The slices with at least two LRs that are worth a picture, nearest to the target first."""
    x = design.slice_features()
    goal = {
        "log_n_active": math.log(target.n_active),
        "log_sparsity": math.log(target.n_active / target.n_total),
        "log_tokens": math.log(target.tokens),
        "log_batch": math.log(target.batch_tokens),
    }
    steps = [(x[key] - value) / max(float(np.std(x[key])), 0.3) for key, value in goal.items()]
    away = np.sqrt(np.square(steps).sum(axis=0))
    if target.family in design.families:
        away = away + 1e3 * (design.family_of_slice != design.families.index(target.family))
    # Losses read off before the LR has decayed have another optimum than the target's.
    away = away + 10 * ~design.annealed[design.cell_of_slice]
    worth = [one for one in slices if one.num_lrs + len(one.diverged_lr) >= 2 and one.num_lrs >= 1]
    return sorted(worth, key=lambda one: float(away[one.number]))[:MAX_VALLEYS]


def valley_cards(posterior: Posterior, chosen: list[Slice]) -> list[dict[str, str]]:
    """A picture of each chosen slice."""
    design = posterior.design
    if design is None:
        return []
    several = len(design.families) > 1
    cards = []
    for one in chosen:
        title, subtitle = names(design, one.number)
        family = design.families[int(design.family_of_slice[one.number])]
        everything = np.concatenate([one.lr, one.diverged_lr, list(one.star.values())])
        lr = np.geomspace(everything.min() / 1.25, everything.max() * 1.25, 120)
        best = format_lr(one.best_lr) if one.best_lr is not None else "none"
        optimum = "no optimum found"
        if one.star:
            interval = _interval(one.star)
            at = f"{interval} with 90 % probability" if interval else format_lr(one.star["q50"])
            optimum = f"optimum {at}"
        cards.append(
            {
                "title": title,
                "warning": f"best at the {one.edge}est LR tried: not bracketed" if one.edge else "",
                "subtitle": subtitle + (f", {family}" if several else "") + _others(one),
                "svg": figures.valley(
                    f"valley{one.number}",
                    lr=lr,
                    bands=_loss_bands(posterior, one.number, lr),
                    run_lr=one.lr,
                    run_loss=one.loss,
                    diverged_lr=one.diverged_lr,
                    star=one.star,
                    description=f"Loss against LR, {title}, {subtitle}: {len(one.lr)} runs, best "
                    f"at {best}, {len(one.diverged_lr)} diverged; {optimum}.",
                ),
            }
        )
    return cards


def _others(one: Slice) -> str:
    if not one.num_others:
        return ""
    return f"; {counted(one.num_others, 'run')} off the reference (beside the LR) not shown"


def _loss_bands(posterior: Posterior, number: int, lr: FloatArray) -> dict[str, FloatArray]:
    """Quantiles of the mean loss of a slice over LR; empty where the method has no such curve."""
    design = posterior.design
    if design is None or "floor" not in posterior.draws:
        return {}
    family = int(design.family_of_slice[number])
    u = np.log(lr) - posterior.flat("lr_opt")[:, number, None]
    curvature = np.exp(posterior.flat("log_curvature")[:, number, None])
    skew = np.exp(posterior.flat("log_skew")[:, family, None])
    loss = posterior.flat("floor")[:, number, None] + laws.valley_excess(u, curvature, skew)
    values = np.quantile(loss, list(QUANTILES.values()), axis=0)
    return dict(zip(QUANTILES, values, strict=True))


def slice_rows(
    posterior: Posterior, slices: list[Slice], log_edge: FloatArray | None
) -> list[dict[str, str | int]]:
    """Rows of the table of all slices.

    log_edge: quantiles (3, slice) of ln LR of the divergence edge, if the fit has one.
    """
    design = posterior.design
    if design is None:
        return []
    x = {key: np.exp(values) for key, values in design.slice_features().items()}
    rows: list[dict[str, str | int]] = []
    for one in slices:
        s = one.number
        rows.append(
            {
                "family": design.families[int(design.family_of_slice[s])],
                "n_active": format_quantity(x["log_n_active"][s]),
                "n_total": format_quantity(x["log_n_active"][s] / x["log_sparsity"][s]),
                "tokens": format_quantity(x["log_tokens"][s]),
                "batch": format_quantity(x["log_batch"][s]),
                "runs": len(one.lr) + len(one.diverged_lr) + one.num_others,
                "diverged": len(one.diverged_lr),
                "best": format_lr(one.best_lr) if one.best_lr is not None else "none",
                "optimum": format_lr(one.star["q50"]) if one.star else "none",
                "interval_90": _interval(one.star),
                "open_side": one.edge or "",
                "edge": "not known" if log_edge is None else format_lr(np.exp(log_edge[1, s])),
                "edge_90": ""
                if log_edge is None
                else interval_text(*np.exp(log_edge[[0, 2], s]).tolist()),
            }
        )
    return rows
