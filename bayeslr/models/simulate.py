"""Run tables drawn from the valley model: its generative twin in NumPy.

`simulate` draws every parameter from a prior card, every effect from its parameters, and the runs
of a layout from those: what `valley.build` states as a density, in sampling order. LRs are chosen
slice by slice from what the slices before have shown, never from the truth, so that the posterior
of the runs is that of the model (a design that depends on the data alone can be ignored).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr import laws
from bayeslr.errors import DataError
from bayeslr.features import Design, build_design, usable_rows
from bayeslr.priors import PER_COVARIATE, PER_FAMILY, SLOPES
from bayeslr.runs import first_reasons, make_table
from bayeslr.specs import WEIGHT_DECAY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayeslr.priors import Prior
    from bayeslr.runs import RunTable
    from bayeslr.specs import Target

    FloatArray = NDArray[np.float64]

# Noise that a row's training run and its data order share with others, by run_id and tokens.
_Effects = dict[tuple[str, float], tuple[float, float]]

# Not parameters of the model, though of the card: one is known through the levels of the loss, one
# is a price that predictions charge.
_NOT_DRAWN = ("loss_irreducible", "diverged_loss", *PER_COVARIATE)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSlice:
    """Runs to make of one shape at one token count and batch.

    num_lrs LRs lie ``step`` apart in natural logs, each tried with ``repeats`` seeds. ``annealed``
    is false for losses that are read off before the LR has decayed. ``loss_se`` in nats. Slices of
    one ``trunk`` are decay branches of the same runs, shortest first: they have one shape, batch,
    num_lrs, step and repeats, and the LRs of the first. Runs take their ``weight_decay`` in turn.
    """

    family: str
    n_active: float
    n_total: float
    tokens: float
    batch_tokens: float
    num_lrs: int
    step: float = np.log(2.0)
    repeats: int = 1
    annealed: bool = True
    loss_se: float = 0.0
    trunk: str | None = None
    weight_decay: tuple[float, ...] = (WEIGHT_DECAY,)


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A drawn run table and what it was drawn from.

    ``truth`` holds the parameters and effects by the names and in the order of the posterior's
    variables; ``target_log_lr`` and ``target_floor`` (target,) are ln LR* and the loss there.
    """

    runs: RunTable
    truth: Mapping[str, FloatArray]
    target_log_lr: FloatArray
    target_floor: FloatArray


def card_log_lr(prior: Prior, n_active: float, n_total: float, tokens: float,
                batch_tokens: float) -> float:  # fmt: skip
    """Natural log of LR* by a card's own locations: a user's guess before any run."""
    reference = prior.log_reference
    d_n = np.log(n_active) - reference["log_n_active"]
    d_s = np.log(n_active / n_total) - reference["log_sparsity"]
    d_d = np.log(tokens) - reference["log_tokens"]

    def at(name: str) -> float:
        return prior[name].location

    best_batch = at("best_batch_intercept") + at("best_batch_n_active") * d_n
    z = np.log(batch_tokens) - best_batch - at("best_batch_tokens") * d_d
    knee = laws.batch_knee(z, at("lr_batch_below"), at("lr_batch_above"))
    level = at("lr_intercept") + at("lr_n_active") * d_n + at("lr_sparsity") * d_s
    return float(level + at("lr_tokens") * d_d + knee)


def simulate(prior: Prior, layout: Sequence[PlannedSlice], rng: np.random.Generator, *,
             targets: Sequence[Target] = ()) -> Simulation:  # fmt: skip
    """Draw parameters from a card, and the runs of a layout from them.

    targets: where the true optimum is wanted beside; each is of a family of the layout. Their
    shapes, cells and slices are drawn with those of the layout, and shared where they are the same.
    Raises: DataError if every run diverged, none passes the run table's checks, or a planned slice
    or target breaks a rule of the run table by itself.
    """
    planned = [*layout, *(_slice_of(target, layout) for target in targets)]
    design, where = _skeleton(planned)
    fitted = np.unique(where[: len(layout)])
    truth = _draw(prior, design, fitted, rng)
    if any(set(s.weight_decay) != {WEIGHT_DECAY} for s in layout):
        shape = len(design.families), 1
        truth |= {
            name: prior[name].draw(rng, shape[0]).reshape(shape) for name in PER_COVARIATE
        }  # fmt: skip
    records, effects = _runs(prior, layout, where, truth, rng)
    runs = make_table(records, source="simulation")
    simulated = build_design(runs)
    at_target = where[len(layout) :]
    return Simulation(
        runs=runs,
        truth=_told(_of_fitted(truth, design, fitted), simulated)
        | _shared_noise(runs, simulated, effects),
        target_log_lr=truth["lr_opt"][at_target],
        target_floor=truth["floor"][at_target],
    )


def _slice_of(target: Target, layout: Sequence[PlannedSlice]) -> PlannedSlice:
    return PlannedSlice(
        family=target.family or layout[0].family, n_active=target.n_active,
        n_total=target.n_total, tokens=target.tokens, batch_tokens=target.batch_tokens, num_lrs=0,
    )  # fmt: skip


def _skeleton(planned: Sequence[PlannedSlice]) -> tuple[Design, NDArray[np.int64]]:
    """Design with one run a planned slice, and the slice of each."""
    rows = [_record(s, f"{i}", lr=1e-3, loss=3.0) for i, s in enumerate(planned)]
    table = make_table(rows, source="layout")
    design = build_design(table)
    if design.num_runs < len(planned):
        raise DataError(
            f"{len(planned) - design.num_runs} of {len(planned)} planned slices and targets break "
            f"a rule of the run table; mend them:\n{first_reasons(table.quarantine)}"
        )
    return design, design.slice_of_run


def _told(truth: dict[str, FloatArray], design: Design) -> dict[str, FloatArray]:
    """The truth without covariates where no slice of the runs tells of them.

    Raises: DataError where most runs of a family have another value than the usual.
    """
    if not design.covariates:
        return {name: values for name, values in truth.items() if name not in PER_COVARIATE}
    if (design.covariate_reference != WEIGHT_DECAY).any():
        raise DataError("most runs of a family have another weight decay than the usual")
    return truth


def _record(planned: PlannedSlice, run_id: str, *, lr: float, loss: float | None,
            seed: int | None = None, nth: int = 0) -> dict[str, Any]:  # fmt: skip
    finished = "ok" if planned.annealed else "partial"
    return {
        "run_id": run_id, "family": planned.family, "lr": lr, "n_active": planned.n_active,
        "n_total": planned.n_total, "param_convention": "non_embedding",
        "tokens": planned.tokens, "batch_tokens": planned.batch_tokens, "loss": loss,
        "loss_se": planned.loss_se or None, "status": "diverged" if loss is None else finished,
        "seed": seed, "weight_decay": planned.weight_decay[nth % len(planned.weight_decay)],
    }  # fmt: skip


def _draw(prior: Prior, design: Design, fitted: NDArray[np.int64],
          rng: np.random.Generator) -> dict[str, FloatArray]:  # fmt: skip
    """Parameters and effects of all levels, in the order of the model's docstring."""
    num_families = len(design.families)
    p: dict[str, FloatArray] = {
        name: entry.draw(rng, num_families) if name in PER_FAMILY else entry.draw(rng, 1)[0]
        for name, entry in prior.parameters.items()
        if name not in _NOT_DRAWN
    }

    def normal(mean: FloatArray | float, sd: str, size: int | tuple[int, ...]) -> FloatArray:
        return np.asarray(mean + p[sd] * rng.normal(size=size))

    features = {name: values[fitted] for name, values in design.slice_features().items()}
    centre = {name: float(np.mean(values)) for name, values in features.items()}
    away = {name: centre[name] - at for name, at in prior.log_reference.items()}
    own = design.family_centres(fitted)
    away_n, away_s, away_d = away["log_n_active"], away["log_sparsity"], away["log_tokens"]

    # Families.
    lr_mean = p["lr_intercept"] + p["lr_n_active"] * away_n + p["lr_sparsity"] * away_s
    lr_level = normal(lr_mean + p["lr_tokens"] * away_d, "lr_family_sd", num_families)
    batch_mean = p["best_batch_intercept"] + p["best_batch_n_active"] * away_n
    best_batch_level = normal(
        batch_mean + p["best_batch_tokens"] * away_d, "best_batch_family_sd", num_families
    )
    bend_mean = np.log(p["curvature_intercept"]) + p["curvature_n_active"] * away_n
    log_curvature_level = normal(
        bend_mean + p["curvature_tokens"] * away_d, "curvature_family_sd", num_families
    )
    log_skew = normal(np.log(p["skew"]), "skew_family_sd", num_families)
    log_edge_offset = normal(np.log(p["edge_offset"]), "edge_family_sd", num_families)
    slope = normal(
        np.array([p[name] for name in SLOPES]), "lr_slope_family_sd", (num_families, len(SLOPES))
    )
    for by in ("n_active", "tokens"):
        carried = prior.log_loss_part(by, own[f"log_{by}"])
        p[f"loss_{by}"] *= np.exp(carried) / prior[f"loss_{by}"].location
    irreducible = prior["loss_irreducible"].draw(rng, num_families)
    loss_level = irreducible + p["loss_n_active"] + p["loss_tokens"]

    # Shapes.
    g = design.family_of_shape
    d_n = design.log_n_active - centre["log_n_active"]
    d_s = design.log_sparsity - centre["log_sparsity"]
    of_shape = _shape_log_tokens(design, fitted) - centre["log_tokens"]
    lr_law = lr_level[g] + slope[g, 0] * d_n + slope[g, 1] * d_s + slope[g, 2] * of_shape
    lr_at_shape = normal(lr_law, "lr_shape_sd", design.num_shapes)
    lr_tokens = normal(slope[g, 2], "lr_tokens_shape_sd", design.num_shapes)
    lr_tokens_shape = lr_tokens - slope[g, 2]
    loss_law = loss_level[g] + p["loss_n_active"][g] * np.expm1(
        -p["loss_exponent_n_active"][g] * (design.log_n_active - own["log_n_active"][g])
    )
    loss_at_shape = normal(loss_law, "loss_shape_sd", design.num_shapes)

    # Cells.
    h = design.shape_of_cell
    g, d_n = g[h], d_n[h]
    d_d = design.log_tokens - centre["log_tokens"]
    early = (~design.annealed).astype(float)
    best_batch = normal(
        best_batch_level[g] + p["best_batch_n_active"] * d_n + p["best_batch_tokens"] * d_d,
        "best_batch_cell_sd", design.num_cells,
    )  # fmt: skip
    lr_cell = normal(
        lr_at_shape[h] + lr_tokens[h] * (d_d - of_shape[h]) + p["lr_unannealed"] * early,
        "lr_cell_sd", design.num_cells,
    )  # fmt: skip
    loss_cell = normal(
        loss_at_shape[h] + p["loss_tokens"][g] * np.expm1(
            -p["loss_exponent_tokens"][g] * (design.log_tokens - own["log_tokens"][g])
        )
        + p["loss_unannealed"] * early,
        "loss_cell_sd", design.num_cells,
    )  # fmt: skip

    # Slices.
    c = design.cell_of_slice
    g, d_n, d_d = g[c], d_n[c], d_d[c]
    z = design.log_batch - best_batch[c]
    knee = laws.batch_knee(z, slope[g, 3], slope[g, 4])
    zero = own["log_batch"][g] - best_batch[c]
    zero_knee = laws.batch_knee(zero, slope[g, 3], slope[g, 4])
    lr_opt = normal(lr_cell[c] + knee, "lr_slice_sd", design.num_slices)
    log_curvature = normal(
        log_curvature_level[g] + p["curvature_n_active"] * d_n + p["curvature_tokens"] * d_d
        + p["curvature_batch"] * (design.log_batch - centre["log_batch"]),
        "curvature_slice_sd", design.num_slices,
    )  # fmt: skip
    penalty = p["penalty_scale"][g] * np.exp(p["penalty_tokens"] * d_d)
    floor = normal(
        loss_cell[c]
        + penalty * (laws.linex(z, p["penalty_skew"]) - laws.linex(zero, p["penalty_skew"])),
        "loss_slice_sd", design.num_slices,
    )  # fmt: skip
    return p | {
        "lr_level": lr_level, "best_batch_level": best_batch_level,
        "log_curvature_level": log_curvature_level, "log_skew": log_skew,
        "log_edge_offset": log_edge_offset, "loss_level": loss_level, "family_slope": slope,
        "lr_shape": lr_at_shape - lr_law, "lr_tokens_shape": lr_tokens_shape,
        "loss_shape": loss_at_shape - loss_law,
        "best_batch": best_batch, "lr_cell": lr_cell, "loss_cell": loss_cell,
        "lr_opt": lr_opt, "log_curvature": log_curvature, "floor": floor,
        "_d_log_n_active": d_n,
        "_d_log_batch": design.log_batch - centre["log_batch"], "_d_log_tokens": d_d,
        "_edge": lr_cell[c] + zero_knee + p["edge_batch"] * (knee - zero_knee)
        + np.exp(log_edge_offset[g]),
        "_family": g.astype(float),
    }  # fmt: skip


def _shape_log_tokens(design: Design, fitted: NDArray[np.int64]) -> FloatArray:
    """Mean ln tokens of each shape over its cells that have runs; over all where none has."""
    cells = np.unique(design.cell_of_slice[fitted])
    mean = design.shape_log_tokens
    for h in np.unique(design.shape_of_cell[cells]):
        mean[h] = design.log_tokens[cells[design.shape_of_cell[cells] == h]].mean()
    return mean


def _runs(prior: Prior, layout: Sequence[PlannedSlice], where: NDArray[np.int64],
          truth: Mapping[str, FloatArray],
          rng: np.random.Generator) -> tuple[list[dict[str, Any]], _Effects]:  # fmt: skip
    """Records of every planned run, LRs about a guess that the runs so far correct, and what noise
    its training run and its data order share, by run_id and tokens.

    A run that has diverged at one horizon has no decay branch at a later one.
    """
    records: list[dict[str, Any]] = []
    effects: _Effects = {}
    corrections: list[float] = []
    trunks: dict[str, _Trunk] = {}
    for i, planned in enumerate(layout):
        card = card_log_lr(
            prior, planned.n_active, planned.n_total, planned.tokens, planned.batch_tokens
        )
        guess = card + (float(np.mean(corrections[-3:])) if corrections else 0.0)
        offsets = planned.step * (np.arange(planned.num_lrs) - (planned.num_lrs - 1) / 2)
        log_lr = np.repeat(guess + offsets, planned.repeats)
        name, branches = f"{i}", 1
        if planned.trunk is not None:
            name, branches = planned.trunk, sum(s.trunk == planned.trunk for s in layout)
        trunk = trunks.setdefault(name, _Trunk(log_lr, rng))
        log_lr = trunk.log_lr
        orders = np.tile(rng.normal(size=planned.repeats), planned.num_lrs)
        loss, diverged = _outcomes(trunk, branches > 1, orders, planned, int(where[i]), truth, rng)
        for j in np.flatnonzero(trunk.alive):
            effects[f"{name}-{j}", planned.tokens] = float(trunk.noise[j]), float(orders[j])
            seed = int(j) % planned.repeats if planned.repeats > 1 else None
            records.append(_record(
                planned, f"{name}-{j}", lr=float(np.exp(log_lr[j])), seed=seed, nth=int(j),
                loss=None if diverged[j] else float(loss[j]),
            ))  # fmt: skip
        trunk.alive &= ~diverged
        if trunk.alive.any():
            best = log_lr[trunk.alive][np.argmin(loss[trunk.alive])]
        else:
            best = log_lr.min() - planned.step
        corrections.append(float(best) - card)
    return records, effects


def _shared_noise(runs: RunTable, design: Design, effects: _Effects) -> dict[str, FloatArray]:
    """The effects of those that share noise, in the order of their design; nothing if none does."""
    frame, shared = usable_rows(runs.frame), np.zeros(design.num_shared)
    for k, key in enumerate(zip(frame["run_id"], frame["tokens"], strict=True)):
        for number, effect in zip(
            (design.trunk_of_run[k], design.order_of_run[k]), effects[key], strict=True
        ):
            if number >= 0:
                shared[number] = effect
    return {"shared_noise": shared} if design.num_shared else {}


class _Trunk:
    """Training runs at ``log_lr`` (run,), what noise of theirs their branches share, who lives."""

    def __init__(self, log_lr: FloatArray, rng: np.random.Generator) -> None:
        self.log_lr = log_lr
        self.noise = rng.normal(size=len(log_lr))
        self.alive = np.ones(len(log_lr), dtype=bool)


def _outcomes(trunk: _Trunk, branching: bool, orders: FloatArray, planned: PlannedSlice, s: int,
              truth: Mapping[str, FloatArray],
              rng: np.random.Generator) -> tuple[FloatArray, NDArray[np.bool_]]:  # fmt: skip
    """Losses in nats and whether each run diverged, (run,), in slice ``s`` of the truth."""
    log_lr, off_best, of_reference = trunk.log_lr, 0.0, 0.0
    g = int(truth["_family"][s])
    if "covariate_shift" in truth:
        tried = np.resize(planned.weight_decay, len(log_lr))
        shift, off_best, of_reference = laws.covariate_terms(
            np.log(tried / WEIGHT_DECAY)[:, None], truth["_d_log_n_active"][s],
            {name: truth[name][g] for name in PER_COVARIATE},
        )  # fmt: skip
        log_lr = log_lr + shift
    u = log_lr - truth["lr_opt"][s]
    excess = off_best + laws.valley_excess(
        u, np.exp(truth["log_curvature"][s]), np.exp(truth["log_skew"][g])
    )
    of_family = {name: truth[name][g] if name in PER_FAMILY else truth[name] for name in laws.NOISE}
    sd = laws.noise_scale(
        excess, u, truth["_d_log_batch"][s], truth["_d_log_tokens"][s], of_family, planned.loss_se
    )
    of_trunk, of_order, own = laws.noise_shares(branching, planned.repeats > 1, truth)
    noise = own * rng.standard_t(1.0 + truth["noise_dof"], size=len(log_lr))
    noise += of_trunk * trunk.noise + of_order * orders
    lost = laws.logistic((log_lr - truth["_edge"][s]) / truth["edge_width"])
    # Unfinished runs in the model have not reached their end: none is said to have diverged.
    diverged = (rng.random(len(log_lr)) < lost) & planned.annealed
    return truth["floor"][s] + excess - of_reference + sd * noise, diverged


_LEVEL_OF = {
    "lr_shape": "shape", "lr_tokens_shape": "shape", "loss_shape": "shape",
    "best_batch": "cell", "lr_cell": "cell",
    "loss_cell": "cell", "lr_opt": "slice", "log_curvature": "slice", "floor": "slice",
}  # fmt: skip


def _of_fitted(truth: Mapping[str, FloatArray], design: Design,
               fitted: NDArray[np.int64]) -> dict[str, FloatArray]:  # fmt: skip
    """Truth of the groups that have runs, in order: groups are sorted by what they are."""
    cells = np.unique(design.cell_of_slice[fitted])
    kept = {"slice": fitted, "cell": cells, "shape": np.unique(design.shape_of_cell[cells])}
    return {
        name: values[kept[_LEVEL_OF[name]]] if name in _LEVEL_OF else values
        for name, values in truth.items()
        if not name.startswith("_")
    }
