"""Each fitted run under the posterior: what it was expected to measure, and how probable it was.

The valley model's likelihood once more, from draws: for checks of the fit, which ask it run by run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bayeslr import laws
from bayeslr.priors import PER_COVARIATE, SLOPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayeslr.features import Design
    from bayeslr.posterior import Posterior

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]
    BoolArray = NDArray[np.bool_]

# Draws times runs worked on at once: 8 MB an array.
_BLOCK = 1_000_000


@dataclass(frozen=True, kw_only=True)
class RunDraws:
    """What draws say of runs, each (draw, run) where not said otherwise.

    ``offset`` is ln(LR / LR*), with what covariates do for the LR; ``excess`` the expected loss
    above the lowest that LR and covariates allow in the slice, ``mean`` the
    expected loss, with the noise that the run shares with others, and ``scale`` the Student-t scale
    of its own, in nats; ``dof`` (draw, 1) the degrees of freedom; ``logit`` the log odds of
    divergence.
    """

    offset: FloatArray
    excess: FloatArray
    mean: FloatArray
    scale: FloatArray
    dof: FloatArray
    logit: FloatArray


def run_draws(posterior: Posterior, runs: IntArray, draws: IntArray) -> RunDraws:
    """Draws ``draws`` of the flattened posterior at the runs ``runs`` of its design."""
    design = posterior.design
    assert design is not None, "a card alone has no runs"

    def value(name: str, index: IntArray | None = None) -> FloatArray:
        kept = posterior.flat(name)[draws]
        return kept[:, None] if index is None else kept[:, index]

    s = design.slice_of_run[runs]
    c, g = design.cell_of_slice[s], design.family_of_slice[s]
    mid = posterior.info["centre"]
    log_lr, off_best, of_reference = design.log_lr[runs], 0.0, 0.0
    if design.covariates:
        by_run = {name: value(name, g) for name in PER_COVARIATE}
        d_n = design.log_n_active[design.shape_of_cell[c]] - mid["log_n_active"]
        shift, off_best, of_reference = laws.covariate_terms(
            design.covariate_of_run[runs], d_n[:, None], by_run
        )
        log_lr = log_lr + shift
    offset = log_lr - value("lr_opt", s)
    excess = off_best + laws.valley_excess(
        offset, np.exp(value("log_curvature", s)), np.exp(value("log_skew", g))
    )
    scale = laws.noise_scale(
        excess, offset, design.log_batch[s] - mid["log_batch"],
        design.log_tokens[c] - mid["log_tokens"], noise_parameters(posterior, draws, g),
        design.loss_se[runs],
    )  # fmt: skip
    mean = value("floor", s) + excess - of_reference
    if design.num_shared:
        parts = {name: value(name) for name in ("noise_run", "noise_order")}
        trunk, order = design.trunk_of_run[runs], design.order_of_run[runs]
        of_trunk, of_order, own = laws.noise_shares(trunk >= 0, order >= 0, parts)
        shared = of_trunk * value("shared_noise", trunk) + of_order * value("shared_noise", order)
        mean, scale = mean + scale * shared, scale * own
    edge = log_edge(posterior, s, draws)
    return RunDraws(
        offset=offset, excess=excess, mean=mean, scale=scale,
        dof=1.0 + value("noise_dof"), logit=(log_lr - edge) / value("edge_width"),
    )  # fmt: skip


def log_edge(posterior: Posterior, slices: IntArray, draws: IntArray) -> FloatArray:
    """Ln LR at which half of the runs of a slice diverge, (draw, slice)."""
    design = posterior.design
    assert design is not None, "a card alone has no slices"
    c, g = design.cell_of_slice[slices], design.family_of_slice[slices]

    def value(name: str) -> FloatArray:
        return posterior.flat(name)[draws]

    slopes = value("family_slope")
    below, above = (slopes[:, g, SLOPES.index(f"lr_batch_{side}")] for side in ("below", "above"))
    best_batch = value("best_batch")[:, c]
    knee = laws.batch_knee(design.log_batch[slices] - best_batch, below, above)
    at_mean = laws.batch_knee(design.family_centres()["log_batch"][g] - best_batch, below, above)
    return np.asarray(
        value("lr_cell")[:, c] + at_mean + value("edge_batch")[:, None] * (knee - at_mean)
        + np.exp(value("log_edge_offset")[:, g])
    )  # fmt: skip


def noise_parameters(
    posterior: Posterior, draws: IntArray, family: IntArray
) -> dict[str, FloatArray]:
    """What `laws.noise_scale` asks for, at each run's family (run,): (draw, run), or (draw, 1)
    where it is one for all; from a card alone it always is.
    """
    found = {name: posterior.flat(name)[draws] for name in laws.NOISE}
    return {name: v[:, family] if v.ndim == 2 else v[:, None] for name, v in found.items()}


def has_loss(design: Design) -> BoolArray:
    """Runs whose loss is in the likelihood (run,)."""
    return ~design.diverged


def has_end(design: Design) -> BoolArray:
    """Runs of which it is known whether they diverge (run,): unfinished ones may still."""
    annealed = design.annealed[design.cell_of_slice[design.slice_of_run]]
    return np.asarray(design.diverged | annealed)


def blocks(posterior: Posterior, draws: IntArray) -> Iterator[tuple[IntArray, RunDraws]]:
    """All runs in turn, some at a time, so that a large table needs no large memory."""
    design = posterior.design
    assert design is not None
    size = max(1, _BLOCK // max(1, len(draws)))
    for start in range(0, design.num_runs, size):
        runs = np.arange(start, min(start + size, design.num_runs))
        yield runs, run_draws(posterior, runs, draws)


def log_likelihood(posterior: Posterior, draws: IntArray) -> FloatArray:
    """Log likelihood of all runs together (draw,), constants included."""
    from scipy.stats import t

    design = posterior.design
    assert design is not None
    told, ended = has_loss(design), has_end(design)
    total = np.zeros(len(draws))
    for runs, at in blocks(posterior, draws):
        of = told[runs]
        loss = t.logpdf(design.loss[runs][of], at.dof, at.mean[:, of], at.scale[:, of])
        total += np.asarray(loss).sum(axis=1)
        of = ended[runs]
        logit = at.logit[:, of]
        total += (design.diverged[runs][of] * logit - laws.softplus(logit)).sum(axis=1)
    return total
