"""Would this fit have predicted its own biggest cells? Leave the largest scale out and look."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr.posterior import Posterior
from bayeslr.predict import QUANTILE_COLUMNS, predict
from bayeslr.runs import RunTable
from bayeslr.sampling import fit
from bayeslr.specs import Target

if TYPE_CHECKING:
    import pandas as pd

# Fewer runs than these say too little about a law to be tested by it.
_MIN_RUNS, _MIN_CELLS = 12, 3

# A slice's own optimum counts as known when its posterior sd is below this, in ln LR.
_KNOWN_SD = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Holdout:
    """How the rest of the runs predicted the cells of the largest compute.

    ``slices`` were scored, those whose optimum their own runs place to 0.25 in ln LR; ``error`` is
    the root mean square of log2(predicted median / own optimum); ``cover_50``, ``cover_90`` the
    shares inside the intervals; ``reach`` the compute of the cells left out over the largest kept.
    """

    slices: int
    runs_left_out: int
    reach: float
    error_octaves: float
    cover_50: float
    cover_90: float
    sentence: str

    def document(self) -> dict[str, Any]:
        """JSON-safe form, as it stands in fit.json."""
        return dataclasses.asdict(self)


def leave_largest_out(posterior: Posterior, *, seed: int = 1) -> Holdout | None:
    """Refit without the largest cells and predict them; None where too little would be left.

    Left out is the cell of the largest compute, 6 N_active D, with all cells within a factor of 1.5
    of it. Slices are scored whose optimum the full fit places to 0.25 in ln LR.
    """
    runs, design = posterior.runs, posterior.design
    if runs is None or design is None or posterior.info["method"] != "bayes":
        return None
    frame = runs.frame
    horizon = frame["planned_tokens"].where(frame["status"] == "diverged").fillna(frame["tokens"])
    compute = 6.0 * frame["n_active"].to_numpy(dtype=float) * horizon.to_numpy(dtype=float)
    large = compute > compute.max() / 1.5
    if not _enough(frame, large):
        return None
    rest = RunTable(
        frame=frame[~large].reset_index(drop=True), quarantine=runs.quarantine.iloc[:0],
        warnings=(), source=f"{runs.source} without its largest cells",
    )  # fmt: skip
    kept = fit(rest, posterior.prior, seed=seed, fast=True)
    own = posterior.flat("lr_opt")
    targets, truth = [], []
    features = design.slice_features()
    log_flops = math.log(6.0) + features["log_n_active"] + features["log_tokens"]
    for s in np.flatnonzero(log_flops > math.log(compute.max() / 1.5)):
        if own[:, s].std() > _KNOWN_SD or not design.annealed[design.cell_of_slice[s]]:
            continue
        n_active = math.exp(features["log_n_active"][s])
        targets.append(Target(
            target_id=f"slice {s}", n_active=n_active,
            n_total=n_active / math.exp(features["log_sparsity"][s]) * (1 + 1e-12),
            tokens=math.exp(features["log_tokens"][s]),
            batch_tokens=math.exp(features["log_batch"][s]),
            family=design.families[int(design.family_of_slice[s])],
            param_convention=str(posterior.info["param_convention"] or "non_embedding"),
        ))  # fmt: skip
        truth.append(float(np.median(own[:, s])))
    if not targets:
        return None
    table = predict(kept, targets)
    q05, q25, q50, q75, q95 = (np.log(table[name].to_numpy()) for name in QUANTILE_COLUMNS)
    optimum = np.array(truth)
    reach = float(compute.max() / compute[~large].max())
    error = float(np.sqrt(np.mean(((q50 - optimum) / math.log(2.0)) ** 2)))
    cover_50 = float(np.mean((q25 <= optimum) & (optimum <= q75)))
    cover_90 = float(np.mean((q05 <= optimum) & (optimum <= q95)))
    inside = round(cover_90 * len(targets))
    return Holdout(
        slices=len(targets),
        runs_left_out=int(large.sum()),
        reach=reach,
        error_octaves=error,
        cover_50=cover_50,
        cover_90=cover_90,
        sentence=(
            f"Without its largest cells ({reach:.1f} times the compute of the rest) this fit would "
            f"have held {inside} of {len(targets)} of their optima in its 90 % intervals, with an "
            f"error of {error:.2f} octaves."
        ),
    )


def _enough(frame: pd.DataFrame, large: Any) -> bool:
    rest = frame[~large]
    usable = rest[rest["status"].isin(["ok", "diverged"])]
    cells = usable.groupby(["family", "n_active", "n_total", "tokens"]).ngroups
    if len(usable) < _MIN_RUNS or cells < _MIN_CELLS or not (usable["status"] == "ok").any():
        return False
    return set(rest["family"]) == set(frame["family"])


def with_holdout(posterior: Posterior, *, seed: int = 1) -> Posterior:
    """The same posterior with the check's result, or its absence, in ``info["holdout"]``."""
    found = leave_largest_out(posterior, seed=seed)
    info: Mapping[str, Any] = {
        **posterior.info, "holdout": None if found is None else found.document()
    }  # fmt: skip
    return dataclasses.replace(posterior, info=info)
