"""Would this fit have predicted its own biggest cells? Leave the largest scale out and look."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr.features import usable_rows
from bayeslr.posterior import Posterior
from bayeslr.predict import QUANTILES, quantiles, slice_target, target_draws
from bayeslr.runs import RunTable, common_horizon

if TYPE_CHECKING:
    import pandas as pd

# Fewer runs than these say too little about a law to be tested by it.
_MIN_RUNS, _MIN_CELLS = 12, 3

# A slice's own optimum counts as known when its runs alone give it a smaller sd, in ln LR.
_KNOWN_SD = 0.25

# Cells within this factor of a family's largest compute are left out with it.
_LARGEST = 1.5

# Errors that a right fit exceeds so rarely: larger than they should often be; too large.
_LARGER, _TOO_LARGE = 0.2, 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Holdout:
    """How the rest of the runs predicted the cells of the largest compute.

    ``slices`` were scored, those whose optimum their own runs place to 0.25 in ln LR; ``error`` is
    the root mean square of log2(predicted median / own optimum); ``cover_50``, ``cover_90`` the
    shares inside the intervals; ``reach`` the compute of the cells left out over the largest kept
    of their family, the least of several families. ``verdict`` is ``held``, ``partly`` (an error
    that a right fit exceeds in less than one case of five) or ``missed`` (in less than one of 20).
    """

    slices: int
    runs_left_out: int
    reach: float
    error_octaves: float
    cover_50: float
    cover_90: float
    verdict: str
    sentence: str

    def document(self) -> dict[str, Any]:
        """JSON-safe form, as it stands in fit.json."""
        return dataclasses.asdict(self)


def leave_largest_out(posterior: Posterior, *, seed: int = 1) -> Holdout | None:
    """Refit without the largest cells and predict them; None where too little would be left.

    Left out are, in every family of at least three cells of ended runs, the cell of the largest
    compute, 6 N_active D, with all cells within a factor of 1.5 of it. Failed and lost runs have no
    part in it. Slices are scored whose optimum their own runs place to 0.25 in ln LR: what these
    add to the precision of the fit without them.
    """
    from bayeslr.sampling import fit  # PyMC is slow to load, and reading a check needs none.

    runs, design = posterior.runs, posterior.design
    if runs is None or design is None or posterior.info["method"] != "bayes":
        return None
    # Before the largest are left out: a run's checkpoints must not come back for its lost end.
    frame = usable_rows(runs.frame)
    limits = _limits(frame)
    compute = _compute(frame)
    large = compute > frame["family"].map(limits).to_numpy(dtype=float)
    if not _enough(frame, large):
        return None
    rest = RunTable(
        frame=frame[~large].reset_index(drop=True), quarantine=runs.quarantine.iloc[:0],
        warnings=(), source=f"{runs.source} without its largest cells",
    )  # fmt: skip
    own = posterior.flat("lr_opt")
    features = design.slice_features()
    flops = 6.0 * np.exp(features["log_n_active"] + features["log_tokens"])
    limit = np.array([limits[family] for family in design.families])[design.family_of_slice]
    left_out = np.flatnonzero(
        (flops > limit) & (own.std(axis=0) <= _KNOWN_SD) & design.annealed[design.cell_of_slice]
    )
    if not len(left_out):
        return None
    refit = fit(rest, posterior.prior, seed=seed, fast=True)
    predicted = target_draws(refit, [slice_target(posterior, s) for s in left_out.tolist()]).log_lr
    own = own[:, left_out]
    known = 1.0 / own.var(axis=0) - 1.0 / predicted.var(axis=0) >= 1.0 / _KNOWN_SD**2
    if not known.any():
        return None
    predicted, optimum = predicted[:, known], np.median(own[:, known], axis=0)
    q05, q25, q50, q75, q95 = quantiles(predicted, QUANTILES)
    inside = (q05 <= optimum) & (optimum <= q95)
    ended = _ended(frame)
    reach = min(
        float(compute[large & ended & own_rows].max() / compute[~large & own_rows].max())
        for family in set(frame.loc[large, "family"])
        for own_rows in [(frame["family"] == family).to_numpy()]
    )
    error = float(_error(optimum - q50))
    # Slices of one shape share its misfit: as the draws have it, so that three are not three tests.
    verdict = _verdict(float(np.mean(_error(predicted - q50) >= error)))
    return Holdout(
        slices=len(optimum),
        runs_left_out=int(large.sum()),
        reach=reach,
        error_octaves=error,
        cover_50=float(np.mean((q25 <= optimum) & (optimum <= q75))),
        cover_90=float(np.mean(inside)),
        verdict=verdict,
        sentence=(
            f"Fitted without its largest cells ({reach:.1f} times the compute of the rest), this "
            f"fit predicted their optima within {error:.2f} octaves (root mean square"
            f"{_SAID[verdict]}); {inside.sum()} of {len(optimum)} "
            f"{'lies' if len(optimum) == 1 else 'lie'} inside the 90 % intervals"
            f"{'' if refit.trustworthy else _DOUBTED}."
        ),
    )


def _ended(frame: pd.DataFrame) -> Any:
    """Whether each run (row,) is over: what is still going shows no optimum yet."""
    return frame["status"].isin(["ok", "diverged"]).to_numpy()


def _compute(frame: pd.DataFrame) -> Any:
    """FLOPs (row,) that each run was meant to take."""
    tokens = common_horizon(frame).to_numpy(dtype=float)
    return 6.0 * frame["n_active"].to_numpy(dtype=float) * tokens


def _num_cells(frame: pd.DataFrame) -> int:
    return frame.groupby(["family", "n_active", "n_total", common_horizon(frame)]).ngroups


def _limits(frame: pd.DataFrame) -> dict[str, float]:
    """FLOPs beyond which a family's cells are left out; infinite for one of few cells."""
    ended = frame[_ended(frame)]
    limits = dict.fromkeys(frame["family"].astype(str), math.inf)
    for family, rows in ended.groupby("family"):
        if _num_cells(rows) >= _MIN_CELLS:
            limits[str(family)] = float(_compute(rows).max()) / _LARGEST
    return limits


_SAID = {
    "held": "",
    "partly": ", further off than it should often be",
    "missed": ", further off than its intervals allow: take them as too narrow",
}


# Said of a refit that failed the convergence gate: its verdict may be the sampler's.
_DOUBTED = " (the fit without them did not converge)"


def _error(apart: Any) -> Any:
    """Root mean square over slices, the last axis, in octaves; ``apart`` in natural logs."""
    return np.sqrt(np.mean((apart / math.log(2.0)) ** 2, axis=-1))


def _verdict(tail: float) -> str:
    """The verdict on an error that a right fit exceeds with this probability."""
    return "held" if tail >= _LARGER else "partly" if tail >= _TOO_LARGE else "missed"


def _enough(frame: pd.DataFrame, large: Any) -> bool:
    """Whether a fit is left, and a finished run of every family that loses some."""
    ended = frame[~large & _ended(frame)]
    if not large.any() or len(ended) < _MIN_RUNS or _num_cells(ended) < _MIN_CELLS:
        return False
    return set(frame.loc[large, "family"]) <= set(ended.loc[ended["status"] == "ok", "family"])
