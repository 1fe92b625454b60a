"""The hierarchical valley model: loss over ln LR in every slice, tied together by laws of scale.

``build`` returns a PyMC model whose data are shared variables, so that one compilation serves every
table of the same (padded) sizes. Level by level, g a family, h a shape, c a cell, s a slice:

    ln LR*_s  = lr_cell_c + knee(z_s) + e_s,     z_s = ln batch_s - best_batch_c
    lr_cell_c ~ lr_level_g + b_g . (ln n_active, ln sparsity, ln tokens - centre)_c
                + e_h + d_h (ln tokens_c - mean over the cells of shape h) + e_c
    floor_s   ~ loss_cell_c + penalty(z_s) - penalty(zero_c) + e_s
    loss_cell_c ~ loss-token law + e_h + e_c,    zero_c = mean ln batch of family g - best_batch_c
    loss_i    ~ StudentT(floor_s + excess(u_i), noise + share of the excess),  u_i = ln LR_i - LR*_s
                part of the noise is that of the training run, for decay branches of one, and part
                that of the data order, in slices of several
    diverged_i ~ Bernoulli(logistic((ln LR_i - edge_s) / width))

Covariates z_ik = ln(value / reference), such as weight decay, act with the LR and for themselves:

    ln LR_i   is that of the run + shift_k z_ik, in all of the above
    loss_i    + curvature_k ((z_ik - best_kh)^2 - best_kh^2),
                best_kh = optimum_k + n_active_k (ln n_active_h - centre)

The floor and the edge are stated at the mean batch of their family's slices, and so is the LR level
while it is sampled: runs at one batch say nothing of the best batch, and need not hear of it. The
loss-token law is stated at its family's mean parameters and tokens for the same reason.

An effect is centred where its group has many runs and non-centred where it has few
(partial non-centring, Papaspiliopoulos, Roberts and Skold 2007).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pymc as pm
import pytensor.tensor as pt

from bayeslr import laws
from bayeslr.features import REGRESSORS
from bayeslr.priors import PER_COVARIATE, PER_FAMILY, SLOPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayeslr.features import Design
    from bayeslr.priors import Prior

    Arrays = dict[str, NDArray[Any]]

# Effects of groups, and the array of shares by which each is centred.
EFFECTS = {
    "family_slope": "family_has_slope",
    "lr_shape": "shape_has_lr",
    "lr_tokens_shape": "shape_has_slope",
    "loss_shape": "shape_has_floor",
    "best_batch": "cell_has_batch",
    "lr_cell": "cell_has_lr",
    "loss_cell": "cell_has_floor",
    "lr_opt": "slice_has_lr",
    "curvature_slice": "slice_has_curvature",
    "floor": "slice_has_floor",
}

# Effects of groups that may have one member alone, and which do: see `_nested`.
TURNED = {
    "lr_shape": "shape_alone", "loss_shape": "shape_alone",
    "lr_cell": "cell_alone", "loss_cell": "cell_alone",
}  # fmt: skip

# The loss-token law of a family: sampled as what the data tell, its level and its slopes.
_LOSS_LAW = ("loss_n_active", "loss_tokens", "loss_exponent_n_active", "loss_exponent_tokens")

# Sampled through other variables, or not at all.
_NOT_PLAIN = ("loss_irreducible", "diverged_loss", *PER_FAMILY, *PER_COVARIATE)


def model_data(design: Design, sizes: Mapping[str, int] | None = None) -> Arrays:
    """Arrays that `build` reads, padded to ``sizes`` (those of `Design.sizes`).

    Padded entries carry zero weight; their effects follow the prior and touch nothing.
    """
    mid = design.centre()
    own = design.family_centres()
    shape_of_cell = design.shape_of_cell
    family_of_cell = design.family_of_shape[shape_of_cell]
    cells = {
        "d_tokens": design.log_tokens - mid["log_tokens"],
        "own_tokens": design.log_tokens - own["log_tokens"][family_of_cell],
        "unannealed": (~design.annealed).astype(float),
    }
    finished = ~design.diverged
    runs_in_slice = np.bincount(design.slice_of_run[finished], minlength=design.num_slices)
    slices_in_cell = np.bincount(design.cell_of_slice, minlength=design.num_cells)
    cells_in_shape = np.bincount(shape_of_cell, minlength=design.num_shapes)
    slices_in_shape = np.bincount(design.shape_of_slice, minlength=design.num_shapes)
    cell_alone, shape_alone = slices_in_cell == 1, cells_in_shape == 1
    annealed_run = design.annealed[design.cell_of_slice[design.slice_of_run]]
    arrays: Arrays = {
        "run_slice": design.slice_of_run,
        "run_log_lr": design.log_lr,
        "run_loss": np.where(finished, design.loss, 0.0),
        "run_loss_se": design.loss_se,
        "run_covariates": design.covariate_of_run,
        "run_has_loss": finished.astype(float),
        # An unfinished run that has not diverged so far says nothing about the edge yet.
        "run_has_end": (design.diverged | annealed_run).astype(float),
        "run_diverged": design.diverged.astype(float),
        "run_trunk": np.maximum(design.trunk_of_run, 0),
        "run_in_trunk": (design.trunk_of_run >= 0).astype(float),
        "run_order": np.maximum(design.order_of_run, 0),
        "run_in_order": (design.order_of_run >= 0).astype(float),
        # Only their number matters; one at least, for something to point at.
        "shared_effect": np.zeros(max(1, design.num_shared)),
        "slice_cell": design.cell_of_slice,
        "slice_log_batch": design.log_batch,
        "slice_has_lr": runs_in_slice / (runs_in_slice + 4.0),
        "slice_has_curvature": runs_in_slice / (runs_in_slice + 10.0),
        "slice_has_floor": runs_in_slice / (runs_in_slice + 0.5),
        "cell_shape": shape_of_cell,
        "cell_has_batch": slices_in_cell / (slices_in_cell + 3.0),
        "cell_has_lr": ~cell_alone * slices_in_cell / (slices_in_cell + 3.0),
        "cell_has_floor": ~cell_alone * slices_in_cell / (slices_in_cell + 0.5),
        **_only(cell_alone, design.cell_of_slice, "cell", "slice"),
        "shape_family": design.family_of_shape,
        "shape_d_n_active": design.log_n_active - mid["log_n_active"],
        "shape_own_n_active": design.log_n_active - own["log_n_active"][design.family_of_shape],
        "shape_d_sparsity": design.log_sparsity - mid["log_sparsity"],
        "shape_d_tokens": design.shape_log_tokens - mid["log_tokens"],
        "shape_has_lr": ~shape_alone * slices_in_shape / (slices_in_shape + 3.0),
        **_only(shape_alone, shape_of_cell, "shape", "cell"),
        "shape_has_slope": _centring(design.log_tokens, shape_of_cell, design.num_shapes),
        "shape_has_floor": ~shape_alone * cells_in_shape / (cells_in_shape + 1.0),
        "family_has_slope": _slope_centring(design),
        **{f"family_{name}": own[name] for name in ("log_n_active", "log_tokens", "log_batch")},
        "family_batch_spread": _batch_spread(design),
        "centre": np.array([mid[name] for name in REGRESSORS]),
        **{f"cell_{name}": values for name, values in cells.items()},
    }
    if sizes is not None:
        for name, values in arrays.items():
            level = name.partition("_")[0]
            if level in sizes:
                # Padded runs and slices repeat the last LR and batch: a far one would overflow.
                last = values[-1] if name in ("run_log_lr", "slice_log_batch") else 0
                extra = (max(0, sizes[level] - len(values)), *values.shape[1:])
                more = np.full(extra, last, dtype=values.dtype)
                arrays[name] = np.concatenate([values, more])
    return arrays


def _only(
    alone: NDArray[np.bool_], group: NDArray[np.int64], level: str, member: str
) -> dict[str, NDArray[Any]]:
    """Which groups have one member alone, and which member of a group is its first."""
    first = np.unique(group, return_index=True)[1]
    return {f"{level}_alone": alone.astype(float), f"{level}_{member}": first}


# Spread of ln batch below which runs tell nothing of a penalty: as at one batch.
_ALIKE = 0.1


def _batch_spread(design: Design) -> NDArray[np.float64]:
    """Standard deviation of ln batch over each family's slices, (family,); zero at one batch."""
    groups = [design.log_batch[design.family_of_slice == g] for g in range(len(design.families))]
    spread = np.array([np.std(values) for values in groups])
    return np.where(spread < _ALIKE, 0.0, spread)


# A regression's scatter between groups, and the spread of exponents between families or shapes.
_SCATTER, _BETWEEN = 0.15, 0.08


def _centring(
    regressor: NDArray[np.float64], group: NDArray[np.int64], num_groups: int
) -> NDArray[np.float64]:
    """Share (group,) by which a group's exponent is centred: how well its own data tell it.

    1 / (1 + (standard error / spread between groups)^2) of a regression on the group's members.
    """
    share = np.zeros(num_groups)
    for g in range(num_groups):
        values = regressor[group == g]
        information = len(values) * float(np.var(values)) / _SCATTER**2
        share[g] = 1.0 / (1.0 + 1.0 / (_BETWEEN**2 * information + 1e-9))
    return share


def _slope_centring(design: Design) -> NDArray[np.float64]:
    """Share (family, slope) by which each exponent of a family is centred."""
    family_of_cell = design.family_of_shape[design.shape_of_cell]
    off_mean = design.log_batch - np.mean(design.log_batch)
    carriers = (
        (design.log_n_active, design.family_of_shape),
        (design.log_sparsity, design.family_of_shape),
        (design.log_tokens, family_of_cell),
        (np.minimum(off_mean, 0.0), design.family_of_slice),
        (np.maximum(off_mean, 0.0), design.family_of_slice),
    )
    return np.stack(
        [_centring(values, group, len(design.families)) for values, group in carriers], axis=1
    )


def _variable(name: str, prior: Prior, **kwargs: Any) -> Any:
    entry = prior[name]
    if entry.kind == "normal":
        return pm.Normal(name, entry.location, entry.scale, **kwargs)
    return pm.LogNormal(name, np.log(entry.location), entry.scale, **kwargs)


def _effect(name: str, mean: Any, sd: Any, centring: Any, size: Any) -> Any:
    """Normal(mean, sd) effect, centred by a share ``centring`` in [0, 1] an entry."""
    mean = pm.Deterministic(f"{name}_mean", mean + pt.zeros(size))
    sd = pm.Deterministic(f"{name}_spread", sd + pt.zeros(size))
    raw = pm.Normal(f"{name}_raw", centring * mean, sd**centring, shape=size)
    return mean + sd ** (1.0 - centring) * (raw - centring * mean)


def _nested(data: Mapping[str, Any], sizes: tuple[int, int, int], *levels: Any) -> list[Any]:
    """Values of shapes, of cells in them and of slices in those: Normal(group's + offset, sd).

    levels: name, offset (entry,), sd and share of centring (entry,) of each of the three.

    Runs tell a group of one member, and the member, by the sum of their effects. So the sum is what
    such a member is sampled as, and the group is what stands at right angles to it, of which the
    prior alone speaks: two standard normals turned, a Jacobian of one. They are turned back here.
    """
    means: list[Any] = []
    spreads: list[Any] = []
    values: list[Any] = []
    alone = data["shape_alone"], data["cell_alone"]
    group = data["cell_shape"], data["slice_cell"]
    only = data["shape_cell"], data["cell_slice"]
    for depth, (size, (name, offset, sd, centring)) in enumerate(zip(sizes, levels, strict=True)):
        mean, spread = offset, sd
        if depth > 0:
            above = depth - 1
            mean = mean + pt.where(alone[above], means[above], values[above])[group[above]]
            spread = pt.sqrt(sd**2 + (alone[above] * spreads[above] ** 2)[group[above]])
        means.append(mean)
        spreads.append(spread)
        values.append(_effect(name, mean, spread, centring, size))
    for depth in (1, 0):
        whole = spreads[depth + 1][only[depth]]
        of_sum = (values[depth + 1] - means[depth + 1])[only[depth]]
        rest = values[depth] - means[depth]
        turned = (spreads[depth] / whole) ** 2 * of_sum + levels[depth + 1][2] / whole * rest
        values[depth] = pt.where(alone[depth], means[depth] + turned, values[depth])
    return values


def _loss_law(prior: Prior, centre: Mapping[str, Any], num_families: int,
              ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """Loss at the centre of a family's data, and the four parameters of its law, each (family,).

    centre: natural logs of n_active and tokens there, (family,) each.

    The card speaks of three parts, those that parameters, tokens and nothing remove, and of two
    exponents. Data tell their sum and the two slopes, part times exponent. Those are sampled,
    beside how the sum is shared: no ridge runs along a wall. In logs both changes of variables
    have a Jacobian of one.
    """
    log_level = pm.Flat("log_loss_level", shape=num_families)
    log_ratio = pm.Flat("loss_ratio", shape=(2, num_families))
    log_slope = pm.Flat("log_loss_slope", shape=(2, num_families))
    log_total = laws.softplus(log_ratio[0], pt) + laws.softplus(
        log_ratio[1] - laws.softplus(log_ratio[0], pt), pt
    )
    log_part = log_level - log_total + log_ratio
    log_exponent = log_slope - log_part
    logs = {
        "loss_n_active": log_part[0], "loss_tokens": log_part[1],
        "loss_exponent_n_active": log_exponent[0], "loss_exponent_tokens": log_exponent[1],
    }  # fmt: skip
    logs["loss_irreducible"] = log_level - log_total
    total, carried = 0.0, {f"loss_{by}": prior.log_loss_part(by, at) for by, at in centre.items()}
    for name, value in logs.items():
        log_median = carried.get(name, np.log(prior[name].location))
        of = pm.Normal.dist(log_median, prior[name].scale)
        total += pm.logp(of, value).sum()
    pm.Potential("loss_law_prior", total)
    return pm.Deterministic("loss_level", pt.exp(log_level)), {
        name: pm.Deterministic(name, pt.exp(logs[name])) for name in _LOSS_LAW
    }


def _told(name: str, told_as: str, of_unit: Any, prior: Prior, num_families: int) -> Any:
    """A positive parameter (family,), sampled as what the data tell.

    That is its log plus ``of_unit``, by the name ``told_as``. A shift: the Jacobian is one.
    """
    entry = prior[name]
    log_told = pm.Flat(told_as, shape=num_families, initval=np.full(
        num_families, np.log(entry.location)
    ))  # fmt: skip
    log_value = log_told - of_unit
    of = pm.Normal.dist(np.log(entry.location), entry.scale)
    pm.Potential(f"{name}_prior", pm.logp(of, log_value).sum())
    return pm.Deterministic(name, pt.exp(log_value))


def _log_steepness(zero: Any, skew: Any, spread: Any) -> Any:
    """Ln of how steep a penalty of scale one is over a family's batches, in the quadratic mean.

    zero: ln of the mean batch over the best one; spread: standard deviation of ln batch, (family,)
    each. Runs at two batches tell their floors' difference, which a steep penalty near its bottom
    and a flat one far from it make alike. Runs at one batch tell nothing: zero there.
    """
    slope, bend = laws.linex_derivatives(zero, skew, pt)
    # The inner choice keeps the gradient a number where the outer one drops the logarithm.
    squares = slope**2 + pt.where(spread > 0, spread * bend, 1.0) ** 2
    return pt.where(spread > 0, 0.5 * pt.log(squares), 0.0)


def _covariates(prior: Prior, log_curvature: Any, size: tuple[int, int]) -> dict[str, Any]:
    """The parameters of `PER_COVARIATE`, each (family, covariate).

    Runs tell how the loss bends and slopes along a covariate at a fixed LR; how much of it goes
    over the LR, only runs at several LRs. So that is what is sampled: the log of the whole bend
    (curvature + the valley's times shift^2), Fisher's z of its tie to the LR, and best value times
    curvature. How the best value moves with size few runs tell, so that is sampled as itself.
    log_curvature (family,) is the valley's; the Jacobian is told beside each prior.
    """
    entry = prior["covariate_curvature"]
    median = np.full(size, np.log(entry.location))
    log_bend = pm.Flat("covariate_bend", shape=size, initval=median)
    tie = pm.Flat("covariate_tie", shape=size, initval=np.full(size, 0.3))
    half_ratio = 0.5 * (log_bend - log_curvature[:, None])
    shift = pt.tanh(tie) * pt.exp(half_ratio)
    log_cosh = laws.softplus(2.0 * tie, pt) - tie - np.log(2.0)
    log_own = log_bend - 2.0 * log_cosh
    found = {
        "covariate_shift": pm.Deterministic("covariate_shift", shift),
        "covariate_curvature": pm.Deterministic("covariate_curvature", pt.exp(log_own)),
    }
    bend_prior = pm.logp(pm.Normal.dist(np.log(entry.location), entry.scale), log_own)
    entry = prior["covariate_shift"]
    shift_prior = pm.logp(pm.Normal.dist(entry.location, entry.scale), shift)
    pm.Potential("covariate_prior", (bend_prior + shift_prior + half_ratio).sum())
    slope = pm.Flat("covariate_optimum_slope", shape=size)
    optimum = pm.Deterministic("covariate_optimum", slope * pt.exp(-log_own))
    entry = prior["covariate_optimum"]
    of = pm.Normal.dist(entry.location, entry.scale)
    pm.Potential("covariate_optimum_prior", (pm.logp(of, optimum) - log_own).sum())
    moves = _variable("covariate_n_active", prior, shape=size)
    return {**found, "covariate_optimum": optimum, "covariate_n_active": moves}


def build(arrays: Arrays, prior: Prior, num_families: int) -> pm.Model:
    """PyMC model of the table behind ``arrays`` (from `model_data`) under a prior card.

    Every array is a shared variable of the model, named as its key. Deterministics are the entries
    of `OUTPUTS`.
    """
    num_slices, num_cells = len(arrays["slice_cell"]), len(arrays["cell_shape"])
    num_shapes = len(arrays["shape_family"])
    with pm.Model() as model:
        data = {name: pm.Data(name, values) for name, values in arrays.items()}
        run_slice, slice_cell = data["run_slice"], data["slice_cell"]
        cell_shape, shape_family = data["cell_shape"], data["shape_family"]
        cell_family = shape_family[cell_shape]
        slice_family = cell_family[slice_cell]
        p = {
            name: _variable(name, prior) for name in prior.parameters if name not in _NOT_PLAIN
        } | {
            name: _variable(name, prior, shape=num_families)
            for name in PER_FAMILY if name not in (*_LOSS_LAW, "noise_sd", "penalty_scale")
        }  # fmt: skip
        of_loss = {by: data[f"family_log_{by}"] for by in ("n_active", "tokens")}
        loss_level, loss_law = _loss_law(prior, of_loss, num_families)
        p |= loss_law
        of_trunk, of_order, own = laws.noise_shares(
            data["run_in_trunk"], data["run_in_order"], p, pt
        )
        # Of a typical row, what is its own.
        own_share = (data["run_has_loss"] * pt.log(own)).sum() / data["run_has_loss"].sum()
        p["noise_sd"] = _told("noise_sd", "log_noise", own_share, prior, num_families)

        # Population to family. Levels are stated at the centre of the data, so that they do not
        # trade off against the exponents; the card's intercept is carried there by the exponents.
        reference = prior.log_reference
        away_n, away_s, away_d = (
            data["centre"][i] - reference[k]
            for i, k in enumerate(("log_n_active", "log_sparsity", "log_tokens"))
        )
        best_batch_level = pm.Normal(
            "best_batch_level",
            p["best_batch_intercept"] + p["best_batch_n_active"] * away_n
            + p["best_batch_tokens"] * away_d,
            p["best_batch_family_sd"], shape=num_families,
        )  # fmt: skip
        log_curvature_level = pm.Normal(
            "log_curvature_level",
            pt.log(p["curvature_intercept"]) + p["curvature_n_active"] * away_n
            + p["curvature_tokens"] * away_d,
            p["curvature_family_sd"], shape=num_families,
        )  # fmt: skip
        log_skew = pm.Normal("log_skew", pt.log(p["skew"]), p["skew_family_sd"], shape=num_families)
        log_edge_offset = pm.Normal(
            "log_edge_offset", pt.log(p["edge_offset"]), p["edge_family_sd"], shape=num_families
        )
        family_slope = pm.Deterministic(
            "family_slope",
            _effect(
                "family_slope",
                pt.stack([p[name] for name in SLOPES])[None, :],
                p["lr_slope_family_sd"],
                data["family_has_slope"],
                (num_families, len(SLOPES)),
            ),
        )

        # The level is sampled as ln LR* at the mean batch; its prior speaks of the best batch.
        zero_g = data["family_log_batch"] - best_batch_level
        steepness = _log_steepness(zero_g, p["penalty_skew"], data["family_batch_spread"])
        p["penalty_scale"] = _told("penalty_scale", "log_steepness", steepness, prior, num_families)
        lr_anchor = pm.Flat("lr_anchor", shape=num_families)
        lr_level = pm.Deterministic(
            "lr_level",
            lr_anchor - laws.batch_knee(zero_g, family_slope[:, 3], family_slope[:, 4], pt),
        )
        lr_population = (
            p["lr_intercept"]
            + p["lr_n_active"] * away_n
            + p["lr_sparsity"] * away_s
            + p["lr_tokens"] * away_d
        )
        pm.Potential(
            "lr_level_prior",
            pm.logp(pm.Normal.dist(lr_population, p["lr_family_sd"]), lr_level).sum(),
        )

        # Shapes: what is peculiar to one, on top of the law in size and sparsity.
        by_shape = {name: p[name][shape_family] for name in PER_FAMILY}
        slope_h = family_slope[shape_family]
        lr_law_h = (
            lr_level[shape_family]
            + slope_h[:, 0] * data["shape_d_n_active"]
            + slope_h[:, 1] * data["shape_d_sparsity"]
            + slope_h[:, 2] * data["shape_d_tokens"]
        )
        lr_tokens_h = _effect(
            "lr_tokens_shape",
            slope_h[:, 2],
            p["lr_tokens_shape_sd"],
            data["shape_has_slope"],
            num_shapes,
        )
        pm.Deterministic("lr_tokens_shape", lr_tokens_h - slope_h[:, 2])
        loss_law_h = loss_level[shape_family] + by_shape["loss_n_active"] * pt.expm1(
            -by_shape["loss_exponent_n_active"] * data["shape_own_n_active"]
        )

        # Cells: the best batch.
        d_n, d_d = data["shape_d_n_active"][cell_shape], data["cell_d_tokens"]
        best_batch = pm.Deterministic(
            "best_batch",
            _effect(
                "best_batch",
                best_batch_level[cell_family]
                + p["best_batch_n_active"] * d_n
                + p["best_batch_tokens"] * d_d,
                p["best_batch_cell_sd"],
                data["cell_has_batch"],
                num_cells,
            ),
        )
        # The optimum, from shapes to slices.
        z = data["slice_log_batch"] - best_batch[slice_cell]
        slope_s = family_slope[slice_family]
        knee = laws.batch_knee(z, slope_s[:, 3], slope_s[:, 4], pt)
        zero = data["family_log_batch"][slice_family] - best_batch[slice_cell]
        zero_knee = laws.batch_knee(zero, slope_s[:, 3], slope_s[:, 4], pt)
        sizes = num_shapes, num_cells, num_slices
        lr_at_shape, lr_cell, lr_opt = _nested(
            data, sizes,
            ("lr_shape", lr_law_h, p["lr_shape_sd"], data["shape_has_lr"]),
            ("lr_cell", lr_tokens_h[cell_shape] * (d_d - data["shape_d_tokens"][cell_shape])
             + p["lr_unannealed"] * data["cell_unannealed"],
             p["lr_cell_sd"], data["cell_has_lr"]),
            ("lr_opt", knee, p["lr_slice_sd"], data["slice_has_lr"]),
        )  # fmt: skip
        pm.Deterministic("lr_shape", lr_at_shape - lr_law_h)
        pm.Deterministic("lr_cell", lr_cell)
        pm.Deterministic("lr_opt", lr_opt)

        # Slices: curvature, and the floor, from shapes to slices.
        log_curvature = pm.Deterministic(
            "log_curvature",
            _effect(
                "curvature_slice",
                log_curvature_level[slice_family]
                + p["curvature_n_active"] * d_n[slice_cell]
                + p["curvature_tokens"] * d_d[slice_cell]
                + p["curvature_batch"] * (data["slice_log_batch"] - data["centre"][3]),
                p["curvature_slice_sd"],
                data["slice_has_curvature"],
                num_slices,
            ),
        )
        penalty = (
            p["penalty_scale"][slice_family] * pt.exp(p["penalty_tokens"] * d_d[slice_cell])
            * (laws.linex(z, p["penalty_skew"], pt) - laws.linex(zero, p["penalty_skew"], pt))
        )  # fmt: skip
        loss_at_shape, loss_cell, floor = _nested(
            data, sizes,
            ("loss_shape", loss_law_h, p["loss_shape_sd"], data["shape_has_floor"]),
            ("loss_cell", p["loss_tokens"][cell_family]
             * pt.expm1(-p["loss_exponent_tokens"][cell_family] * data["cell_own_tokens"])
             + p["loss_unannealed"] * data["cell_unannealed"],
             p["loss_cell_sd"], data["cell_has_floor"]),
            ("floor", penalty, p["loss_slice_sd"], data["slice_has_floor"]),
        )  # fmt: skip
        pm.Deterministic("loss_shape", loss_at_shape - loss_law_h)
        pm.Deterministic("loss_cell", loss_cell)
        pm.Deterministic("floor", floor)

        # Runs.
        run_family = slice_family[run_slice]
        log_lr, off_best, of_reference = data["run_log_lr"], 0.0, 0.0
        if num_covariates := arrays["run_covariates"].shape[1]:
            covariates = _covariates(prior, log_curvature_level, (num_families, num_covariates))
            by_run = {name: value[run_family] for name, value in covariates.items()}
            shift, off_best, of_reference = laws.covariate_terms(
                data["run_covariates"], d_n[slice_cell][run_slice][:, None], by_run
            )
            log_lr = log_lr + shift
        u = log_lr - lr_opt[run_slice]
        skew = pt.exp(log_skew)[run_family]
        excess = laws.valley_excess(u, pt.exp(log_curvature)[run_slice], skew, pt) + off_best
        noise_of = {name: p[name][run_family] for name in laws.NOISE if name in PER_FAMILY}
        noise = laws.noise_scale(
            excess, u, (data["slice_log_batch"] - data["centre"][3])[run_slice],
            d_d[slice_cell][run_slice], {"noise_share": p["noise_share"], **noise_of},
            data["run_loss_se"], pt,
        )  # fmt: skip
        effect = pm.Normal("shared_noise", shape=len(arrays["shared_effect"]))
        shared = noise * (
            of_trunk * effect[data["run_trunk"]] + of_order * effect[data["run_order"]]
        )
        loss_logp = pm.logp(
            pm.StudentT.dist(
                nu=1.0 + p["noise_dof"],
                mu=floor[run_slice] + excess - of_reference + shared,
                sigma=own * noise,
            ),
            data["run_loss"],
        )
        pm.Potential("loss", (data["run_has_loss"] * loss_logp).sum())
        edge = (
            lr_cell[slice_cell]
            + zero_knee
            + p["edge_batch"] * (knee - zero_knee)
            + pt.exp(log_edge_offset)[slice_family]
        )
        logit = (log_lr - edge[run_slice]) / p["edge_width"]
        ended = data["run_diverged"] * logit - laws.softplus(logit, pt)
        pm.Potential("diverged", (data["run_has_end"] * ended).sum())
    return model
