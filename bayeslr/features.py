"""Run table to design: each run's slice, cell, shape and family, and their regressors.

Indices run from fine to coarse: run, slice (cell at one batch), cell (shape at one token count),
shape (parameter counts in one family), family. Regressors are natural logs, uncentred: the model
centres them where its prior card says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bayeslr.errors import DataError
from bayeslr.runs import (
    SHAPE_KEYS,
    common_horizon,
    covariate_values,
    covariates_within,
    last_word,
)
from bayeslr.specs import COVARIATES

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from bayeslr.runs import RunTable

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]
    BoolArray = NDArray[np.bool_]

REGRESSORS = ("log_n_active", "log_sparsity", "log_tokens", "log_batch")

# What separates two slices. Runs of one slice differ in LR and seed alone.
_SHAPE_KEY = list(SHAPE_KEYS)
_CELL_KEY = [*_SHAPE_KEY, "tokens", "annealed"]
_SLICE_KEY = [*_CELL_KEY, "batch_tokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """Arrays of one fit.

    Runs: ``slice_of_run`` (run,), ``log_lr`` (run,), ``loss`` (run,) in nats with NaN for diverged
    runs, ``loss_se`` (run,) in nats, zero where unknown, ``diverged`` (run,). What shares noise:
    ``trunk_of_run`` (run,) numbers the stable trunks that several rows share (decay branches),
    ``order_of_run`` (run,) goes on with the data orders (seeds) of slices that have several; -1
    where a row has none.
    Slices: ``cell_of_slice``, ``log_batch`` (slice,), tokens. Cells: ``shape_of_cell``,
    ``log_tokens``, ``annealed`` (cell,), false for losses read off before the LR had decayed.
    Shapes: ``family_of_shape``, ``log_n_active``, ``log_sparsity`` (shape,), the latter
    ln(n_active / n_total). Families: names in ``families``, ``parametrizations`` (family,).
    Covariates: names in ``covariates``, hyperparameters beside the LR that differ within some
    slice; ``covariate_of_run`` (run, covariate), natural log of each over what most runs of the
    family have, ``covariate_reference`` (family, covariate); ``covariate_least`` (family,
    covariate) is the value that none at all is taken for: below some, an effect is nil.
    """

    slice_of_run: IntArray
    log_lr: FloatArray
    loss: FloatArray
    loss_se: FloatArray
    diverged: BoolArray
    trunk_of_run: IntArray
    order_of_run: IntArray
    cell_of_slice: IntArray
    log_batch: FloatArray
    shape_of_cell: IntArray
    log_tokens: FloatArray
    annealed: BoolArray
    family_of_shape: IntArray
    log_n_active: FloatArray
    log_sparsity: FloatArray
    families: tuple[str, ...]
    parametrizations: tuple[str, ...]
    covariates: tuple[str, ...]
    covariate_of_run: FloatArray
    covariate_reference: FloatArray
    covariate_least: FloatArray

    @property
    def num_runs(self) -> int:
        """Runs, diverged ones included."""
        return len(self.log_lr)

    @property
    def at_reference(self) -> BoolArray:
        """Runs (run,) whose covariates are all the reference."""
        return np.asarray((self.covariate_of_run == 0).all(axis=1))

    @property
    def num_slices(self) -> int:
        """Slices."""
        return len(self.log_batch)

    @property
    def num_cells(self) -> int:
        """Cells."""
        return len(self.log_tokens)

    @property
    def num_shapes(self) -> int:
        """Shapes."""
        return len(self.log_n_active)

    @property
    def num_shared(self) -> int:
        """Trunks of several rows, and data orders of slices that have several."""
        return 1 + max(int(self.trunk_of_run.max()), int(self.order_of_run.max()))

    @property
    def shape_of_slice(self) -> IntArray:
        """Shape of each slice (slice,)."""
        return self.shape_of_cell[self.cell_of_slice]

    @property
    def family_of_slice(self) -> IntArray:
        """Family of each slice (slice,)."""
        return self.family_of_shape[self.shape_of_slice]

    @property
    def shape_log_tokens(self) -> FloatArray:
        """Mean ln tokens over the cells of each shape (shape,)."""
        total = np.bincount(self.shape_of_cell, self.log_tokens, minlength=self.num_shapes)
        return total / np.bincount(self.shape_of_cell, minlength=self.num_shapes)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of runs, slices, cells, shapes, families, and of what shares noise."""
        return {
            "shared": self.num_shared,
            "run": self.num_runs,
            "slice": self.num_slices,
            "cell": self.num_cells,
            "shape": self.num_shapes,
            "family": len(self.families),
        }

    def slice_features(self) -> dict[str, FloatArray]:
        """The four regressors at slice level, each (slice,)."""
        shape = self.shape_of_slice
        return {
            "log_n_active": self.log_n_active[shape],
            "log_sparsity": self.log_sparsity[shape],
            "log_tokens": self.log_tokens[self.cell_of_slice],
            "log_batch": self.log_batch,
        }

    def centre(self) -> dict[str, float]:
        """Where the model centres the regressors: their means over slices."""
        return {name: float(np.mean(values)) for name, values in self.slice_features().items()}

    def family_centres(self, slices: IntArray | None = None) -> dict[str, FloatArray]:
        """Means of the regressors over each family's slices, each (family,).

        slices: those that count. A family without any has the mean of all.
        """
        kept = np.arange(self.num_slices) if slices is None else slices
        family, num_families = self.family_of_slice[kept], len(self.families)
        count = np.bincount(family, minlength=num_families)
        found = {}
        for name, values in self.slice_features().items():
            total = np.bincount(family, values[kept], minlength=num_families)
            found[name] = np.where(count > 0, total / np.maximum(count, 1), values[kept].mean())
        return found


def _codes(frame: pd.DataFrame, key: list[str]) -> tuple[IntArray, IntArray]:
    """Group code of each row, and the first row of each group, groups in order of their keys."""
    codes = frame.groupby(key, dropna=False, sort=True).ngroup().to_numpy().astype(np.int64)
    _, first = np.unique(codes, return_index=True)
    return codes, first.astype(np.int64)


def _numbered(keys: pd.DataFrame, counts: BoolArray, first: int) -> IntArray:
    """Number of each row's group from ``first`` on, groups in order of their keys; -1 elsewhere."""
    numbers = np.full(len(keys), -1, dtype=np.int64)
    if counts.any():
        names = list(keys.columns)
        numbers[counts] = first + keys[counts].groupby(names, sort=True).ngroup().to_numpy()
    return numbers


def _shared(frame: pd.DataFrame, slice_of_run: IntArray) -> tuple[IntArray, IntArray]:
    """``trunk_of_run`` and ``order_of_run`` of a `Design`.

    Under WSD, runs of one shape, batch, LR, seed and covariates have one trunk, whatever their
    run_id. A slice whose runs all have seeds of their own, or all the same, has no orders to tell
    apart.
    """
    stable = (frame["schedule"] == "wsd") & frame["seed"].notna()
    tried = {name: covariate_values(frame, name) for name in COVARIATES}
    line, _ = _codes(
        frame.assign(**tried), [*_SHAPE_KEY, "batch_tokens", "lr", "seed", *COVARIATES]
    )
    trunks = frame[["family"]].assign(
        stable=stable, trunk=frame["run_id"].astype(str).where(~stable, line.astype(str))
    )
    trunk_of_run = _numbered(trunks, trunks.duplicated(keep=False).to_numpy(), 0)
    orders = frame[["seed"]].assign(slice=slice_of_run)
    seeds = orders.groupby("slice")["seed"].transform("nunique").to_numpy()
    rows = orders.groupby("slice")["seed"].transform("count").to_numpy()
    several = orders["seed"].notna().to_numpy() & (seeds > 1) & (seeds < rows)
    return trunk_of_run, _numbered(orders, several, int(trunk_of_run.max()) + 1)


def _covariates(
    frame: pd.DataFrame, slice_of_run: IntArray, family_of_run: IntArray
) -> tuple[tuple[str, ...], FloatArray, FloatArray, FloatArray]:
    """``covariates``, ``covariate_of_run``, ``covariate_reference``, ``covariate_least`` of a
    `Design`.

    A weight decay that is not stated is the reference, none at all a tenth of the family's least.
    A family that states none has the reference of the whole table, and one without any its least.
    """
    num_families = int(family_of_run.max()) + 1
    names, logs, references, leasts = [], [], [], []
    for name, values in covariates_within(frame, slice_of_run).items():
        log, reference = np.zeros(len(frame)), np.ones(num_families)
        least = np.ones(num_families)
        for g in range(num_families):
            mine = family_of_run == g
            own = values[mine]
            positive = own[own > 0] if (own > 0).any() else values[values > 0]
            least[g] = positive.min() / 10
            own = own.where(own != 0, least[g])
            # Ascending, so that the order of rows does not matter.
            modes = (own if own.notna().any() else positive).mode()
            reference[g] = modes[(len(modes) - 1) // 2]
            log[mine] = np.log(own.fillna(reference[g]) / reference[g])
        names.append(name)
        logs.append(log)
        references.append(reference)
        leasts.append(least)
    by_run, by_family = (len(names), len(frame)), (len(names), num_families)
    return (
        tuple(names),
        np.array(logs).reshape(by_run).T,
        np.array(references).reshape(by_family).T,
        np.array(leasts).reshape(by_family).T,
    )


def usable_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of a run table that say something about the LR, as they are.

    Failed and lost runs, and unfinished ones without a loss, are left out. Of a run that has not
    ended the last checkpoint counts, of one that has ended none.
    """
    finite = np.isfinite(frame["loss"].to_numpy(dtype=float, na_value=np.nan))
    has_loss = frame["status"].isin(["ok", "partial", "pruned"]).to_numpy() & finite
    usable: pd.DataFrame = frame.loc[has_loss | (frame["status"] == "diverged").to_numpy()]
    return usable.loc[last_word(usable)]


def _require_one_parametrization(frame: pd.DataFrame) -> None:
    for family, rows in frame.groupby("family", sort=False):
        if len(names := sorted(set(rows["parametrization"]))) > 1:
            raise DataError(
                f"family {family!r} holds runs under {' and '.join(names)}, whose optimal LRs do "
                "not compare: give the runs of each parametrization a family of their own (column "
                "family; an empty parametrization counts as sp)"
            )


def build_design(table: RunTable) -> Design:
    """Design of the runs that say something about the LR: ok, partial, pruned and diverged ones.

    Raises: DataError if no finished or diverged run is left, every run diverged, or one family has
    several parametrizations.
    """
    frame = usable_rows(table.frame).copy()
    diverged = (frame["status"] == "diverged").to_numpy()
    if len(frame) == 0:
        raise DataError(
            "no run can be used: none is finished, partial or diverged; "
            "failed and lost runs say nothing about the LR"
        )
    if diverged.all():
        raise DataError(
            f"all {len(frame)} runs diverged: they bound the LR from above but show no valley; "
            "add runs at lower LR"
        )
    frame["tokens"] = common_horizon(frame)
    frame["annealed"] = ~frame["status"].isin(["partial", "pruned"]).to_numpy()
    frame["parametrization"] = frame["parametrization"].fillna("sp")
    _require_one_parametrization(frame)
    for column in ("d_model", "n_layers", "n_experts", "top_k"):
        frame[column] = frame[column].astype(object).where(frame[column].notna(), "")

    slice_of_run, first_run = _codes(frame, _SLICE_KEY)
    slices = frame.iloc[first_run].reset_index(drop=True)
    cell_of_slice, first_slice = _codes(slices, _CELL_KEY)
    cells = slices.iloc[first_slice].reset_index(drop=True)
    shape_of_cell, first_cell = _codes(cells, _SHAPE_KEY)
    shapes = cells.iloc[first_cell].reset_index(drop=True)
    family_of_shape, first_shape = _codes(shapes, ["family"])
    families = shapes.iloc[first_shape].reset_index(drop=True)

    trunk_of_run, order_of_run = _shared(frame, slice_of_run)
    family_of_run = family_of_shape[shape_of_cell[cell_of_slice[slice_of_run]]]
    covariates, covariate_of_run, covariate_reference, covariate_least = _covariates(
        frame, slice_of_run, family_of_run
    )
    log_n_active = np.log(shapes["n_active"].to_numpy(dtype=float))
    loss_se = frame["loss_se"].to_numpy(dtype=float, na_value=np.nan)
    return Design(
        slice_of_run=slice_of_run,
        log_lr=np.log(frame["lr"].to_numpy(dtype=float)),
        loss=np.where(diverged, np.nan, frame["loss"].to_numpy(dtype=float, na_value=np.nan)),
        loss_se=np.where(np.isfinite(loss_se), loss_se, 0.0),
        diverged=diverged,
        trunk_of_run=trunk_of_run,
        order_of_run=order_of_run,
        cell_of_slice=cell_of_slice,
        log_batch=np.log(slices["batch_tokens"].to_numpy(dtype=float)),
        shape_of_cell=shape_of_cell,
        log_tokens=np.log(cells["tokens"].to_numpy(dtype=float)),
        annealed=cells["annealed"].to_numpy(dtype=bool),
        family_of_shape=family_of_shape,
        log_n_active=log_n_active,
        log_sparsity=log_n_active - np.log(shapes["n_total"].to_numpy(dtype=float)),
        families=tuple(families["family"].astype(str)),
        parametrizations=tuple(families["parametrization"].astype(str)),
        covariates=covariates,
        covariate_of_run=covariate_of_run,
        covariate_reference=covariate_reference,
        covariate_least=covariate_least,
    )
