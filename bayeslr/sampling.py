"""From runs and a prior card to a posterior: a mode, its curvature, then NUTS.

NUTS begins in coordinates that the curvature at the mode has made round (scales and slopes of noise
held at their prior medians: with them free, a hierarchy has no mode).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr.coordinates import Dense
from bayeslr.curvature import curvature_at
from bayeslr.errors import SpecError
from bayeslr.features import build_design
from bayeslr.models import two_stage, valley
from bayeslr.models.compiled import CompiledModel, compiled_model
from bayeslr.nuts import sample
from bayeslr.posterior import LOOP_GATE, REPORT_GATE, Posterior, make_posterior, settled
from bayeslr.priors import OUTPUTS, Prior, as_prior
from bayeslr.runs import RunTable
from bayeslr.specs import require_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayeslr.coordinates import Tree
    from bayeslr.curvature import Curvature
    from bayeslr.features import Design
    from bayeslr.posterior import Gate

    FloatArray = NDArray[np.float64]

METHODS = ("bayes", "two-stage")

# Scales of misfit and noise: fixed while the mode is sought. With them free there is none: a
# scale that goes to zero wins without bound. The share of noise by excess is free: noise stays
# above ``noise_sd``, and where far runs scatter much, held to little it leads the search, and the
# chains after it, to valleys that are not there.
SCALES = (
    "noise_sd", "noise_run", "noise_order", "noise_dof",
    "lr_family_sd", "lr_slope_family_sd", "lr_tokens_shape_sd", "lr_shape_sd", "lr_cell_sd",
    "lr_slice_sd", "best_batch_family_sd", "best_batch_cell_sd", "curvature_family_sd",
    "curvature_slice_sd", "skew_family_sd", "edge_family_sd", "loss_shape_sd", "loss_cell_sd",
    "loss_slice_sd",
)  # fmt: skip

# So are the noise's slopes: along them it goes to zero at some run, and wins as well.
NOISE_SLOPES = ("noise_batch", "noise_tokens", "noise_side")

# Steps of the search for the mode, in the units of each effect; all others move by 0.3.
_STEP = {
    "floor_raw": 0.005, "loss_cell_raw": 0.01, "log_loss_level": 0.01, "lr_opt_raw": 0.1,
    "lr_cell_raw": 0.1, "lr_anchor": 0.1, "lr_shape_raw": 0.1, "loss_shape_raw": 0.02,
    "best_batch_raw": 0.3, "best_batch_level": 0.2, "covariate_optimum_slope": 0.002,
}  # fmt: skip

# Scales between groups mix slowly where groups are few; there draws are cheap as well.
_FEW_RUNS = 200

# L-BFGS stalls on thin tables and gets on when begun anew: so often, while it gains so many nats.
_SEARCHES, _LEAST_GAIN = 4, 1.0

# Coordinates are dense for so many parameters at most: their cost grows with the square.
_MOST_DENSE = 1000

# What bends less is taken to bend so much: its own prior bends by one.
_FLAT = 0.5

# So many draws tell the curvature where they went.
_TOLD_BY = 8

# Height and curvature of what stands where the density cannot be worked out, nats.
_WALL = 1e6


def configure_jax(num_devices: int | None = None) -> None:
    """Set float64, one JAX device a core and a compilation cache, for this process.

    Call it before JAX is used. The cache lies in the user's cache folder (XDG_CACHE_HOME).

    The command line and `fit` call it; a program that has set up JAX by itself need not, as long
    as ``jax_enable_x64`` is on.
    """
    if "jax" not in sys.modules or not _jax_started():
        devices = num_devices or _num_cores()
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_force_host_platform_device_count" not in flags:
            os.environ["XLA_FLAGS"] = (
                f"{flags} --xla_force_host_platform_device_count={devices}".strip()
            )
    import jax

    jax.config.update("jax_enable_x64", True)
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "bayeslr" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def _jax_started() -> bool:
    from jax._src import xla_bridge

    return bool(xla_bridge.backends_are_initialized())


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _data_start(compiled: CompiledModel, arrays: valley.Arrays, prior: Prior) -> FloatArray:
    """Starting point read off the data: each floor at its slice's best run, LR* near it."""
    x = compiled.start.copy()
    has_loss = arrays["run_has_loss"] > 0
    run_slice, loss = arrays["run_slice"], np.where(has_loss, arrays["run_loss"], np.inf)
    num_slices, num_cells = len(arrays["slice_cell"]), len(arrays["cell_shape"])
    floor = np.full(num_slices, np.inf)
    np.minimum.at(floor, run_slice[has_loss], loss[has_loss])
    best = np.full(num_slices, np.nan)
    at_floor = has_loss & (loss <= floor[run_slice])
    best[run_slice[at_floor]] = arrays["run_log_lr"][at_floor]
    cell_floor = np.full(num_cells, np.inf)
    np.minimum.at(cell_floor, arrays["slice_cell"], floor)
    cell_family = arrays["shape_family"][arrays["cell_shape"]]
    slice_family = cell_family[arrays["slice_cell"]]
    num_families = int(arrays["shape_family"].max()) + 1
    loss_level, lr_level = np.empty(num_families), np.empty(num_families)
    for g in range(num_families):
        of_slice = np.isfinite(best) & (slice_family == g)
        # The median over runs: a slice of one run that came to nothing must not move it.
        of_run = has_loss & of_slice[run_slice]
        level = np.median(floor[run_slice[of_run]]) if of_run.any() else 2.5
        lr = best[of_slice].mean() if of_slice.any() else np.nanmean(best)
        cell_floor = np.where((cell_family == g) & ~np.isfinite(cell_floor), level, cell_floor)
        best = np.where((slice_family == g) & ~np.isfinite(best), lr, best)
        loss_level[g], lr_level[g] = level, lr
    # Of the loss, parameters and tokens remove what the card says, but a fifth each at most.
    law = ("n_active", "tokens")
    parts = [
        np.minimum(np.exp(prior.log_loss_part(by, arrays[f"family_log_{by}"])), 0.2 * loss_level)
        for by in law
    ]
    exponents = [prior[f"loss_exponent_{name}"].location for name in law]
    x[compiled.index("log_loss_level")] = np.log(loss_level)
    x[compiled.index("loss_ratio")] = np.log(parts / (loss_level - sum(parts))).ravel()
    x[compiled.index("log_loss_slope")] = np.log(np.multiply(parts, np.c_[exponents])).ravel()
    x[compiled.index("lr_anchor")] = lr_level
    # A partly centred effect: raw = c mean + sd^(c - 1) (value - mean). A cell of one slice is what
    # stands at right angles to it, of which nothing is known: its slice has all the effect.
    level_c, lr_c = loss_level[cell_family], lr_level[cell_family]
    lr_s = lr_c[arrays["slice_cell"]]
    alone = arrays["cell_alone"] * prior["loss_cell_sd"].location
    floor_sd = np.hypot(alone[arrays["slice_cell"]], prior["loss_slice_sd"].location)
    cell_floor = np.where(alone > 0, level_c, cell_floor)
    # A slice without a finished run, padded ones too, starts at its cell: no effect of its own.
    floor = np.where(np.isfinite(floor), floor, cell_floor[arrays["slice_cell"]])

    def raw(value: FloatArray, mean: FloatArray, sd: Any, c: FloatArray) -> FloatArray:
        return np.asarray(c * mean + sd ** (c - 1.0) * (value - mean))

    shape_family = arrays["shape_family"]
    x[compiled.index("loss_shape_raw")] = arrays["shape_has_floor"] * loss_level[shape_family]
    x[compiled.index("lr_shape_raw")] = arrays["shape_has_lr"] * lr_level[shape_family]
    x[compiled.index("loss_cell_raw")] = raw(
        cell_floor, level_c, prior["loss_cell_sd"].location, arrays["cell_has_floor"]
    )
    x[compiled.index("floor_raw")] = raw(
        floor, cell_floor[arrays["slice_cell"]], floor_sd, arrays["slice_has_floor"]
    )
    x[compiled.index("curvature_slice_raw")] = arrays["slice_has_curvature"] * np.log(
        prior["curvature_intercept"].location
    )
    x[compiled.index("lr_cell_raw")] = arrays["cell_has_lr"] * lr_c
    x[compiled.index("lr_opt_raw")] = arrays["slice_has_lr"] * (0.5 * best + 0.5 * lr_s)
    return x


def held(compiled: CompiledModel) -> dict[str, NDArray[np.int64]]:
    """Positions of what stays at its prior median while the mode is sought, by parameter."""
    sampled = {"noise_sd": "log_noise"}
    scales = {name: compiled.index(sampled.get(name, f"{name}_log__")) for name in SCALES}
    return scales | {name: compiled.index(name) for name in NOISE_SLOPES}


def find_mode(
    compiled: CompiledModel, arrays: valley.Arrays, prior: Prior, start: FloatArray | None = None
) -> tuple[FloatArray, Curvature]:
    """Mode with scales and slopes of noise `held`, x (parameter,), and the curvature there.

    What is held has a prior-sized curvature.
    Raises: UntrustworthyFit where the density about the end of the search is no number.
    """
    from scipy.optimize import minimize

    data = compiled.data(arrays)
    x = _data_start(compiled, arrays, prior) if start is None else start.copy()
    fixed = np.concatenate(list(held(compiled).values()))
    free = np.setdiff1d(np.arange(compiled.size), fixed)
    step = np.full(compiled.size, 0.3)
    for name, size in _STEP.items():
        if name in compiled.names:  # those of covariates are there with covariates alone
            step[compiled.index(name)] = size
    for effect, of_alone in valley.TURNED.items():
        at = compiled.index(f"{effect}_raw")
        step[at] = np.where(arrays[of_alone] > 0, 0.3, step[at])

    # Where a step overflows the search finds a bowl about the last point that did not.
    good = np.zeros(len(free)), 0.0

    def objective(y: FloatArray) -> tuple[float, FloatArray]:
        nonlocal good
        trial = x.copy()
        trial[free] += step[free] * y
        value, gradient = compiled.value_and_grad(trial, data)
        slope = np.asarray(gradient)[free] * step[free]
        if not (np.isfinite(value) and np.isfinite(slope).all()):
            back = y - good[0]
            return good[1] + _WALL * float(1.0 + back @ back), 2.0 * _WALL * back
        good = y.copy(), float(value)
        return float(value), slope

    y, least = np.zeros(len(free)), math.inf
    for _ in range(_SEARCHES):
        found = minimize(
            objective, y, jac=True, method="L-BFGS-B",
            options={"maxiter": 2000, "maxfun": 3000, "maxcor": 50},
        )  # fmt: skip
        gain, y, least = least - found.fun, found.x, found.fun
        if not gain > _LEAST_GAIN:
            break
    x[free] += step[free] * y
    curvature = curvature_at(compiled, arrays, x, fixed)
    for _ in range(3):
        value, gradient = compiled.value_and_grad(x, data)
        slope = np.array(gradient)
        slope[fixed] = 0.0
        tree = curvature.tree(1e-3)
        trial = x - tree.x(tree.pull(slope))
        gain = float(value) - float(compiled.value_and_grad(trial, data)[0])
        if not gain > 1e-3:
            break
        x = trial
        curvature = curvature_at(compiled, arrays, x, fixed)
    for name, at in held(compiled).items():
        curvature = curvature.with_own(at, 2.0 / prior[name].scale ** 2)
    return x, curvature


def _told(
    x: FloatArray, compiled: CompiledModel, arrays: valley.Arrays, curvature: Curvature
) -> valley.Arrays:
    """Share of each effect's variance that its runs take away, by the array that centres it.

    That is p s^2 / (1 + p s^2) for an effect with sd s between groups that its runs tell with
    precision p; here from the curvature at x, with what lies above the effect held fixed and what
    lies beside and below it not.
    """
    tree = curvature.tree(1e-3)
    left = np.zeros(compiled.size)
    for branch in tree.branches:
        left[branch.at] = (branch.root**2).sum(axis=2)
    slopes = compiled.index("family_slope_raw")
    at = np.searchsorted(tree.top, slopes)
    precision = np.linalg.inv(tree.root @ tree.root.T)
    left[slopes] = np.diag(np.linalg.inv(precision[np.ix_(at, at)]))
    found = compiled.spreads(x, tuple(arrays.values()))
    shares = {}
    for effect, share in valley.EFFECTS.items():
        unit = np.asarray(found[f"{effect}_spread"]) ** arrays[share]
        own = left[compiled.index(f"{effect}_raw")].reshape(unit.shape)
        shares[share] = np.clip(1.0 - own / unit**2, 0.0, 1.0)
    return shares


def _recentred(
    x: FloatArray, compiled: CompiledModel, old: valley.Arrays, new: valley.Arrays
) -> FloatArray:
    """The same point when effects are centred by the shares in ``new`` instead of ``old``."""
    x = x.copy()
    found = compiled.spreads(x, tuple(old.values()))
    for effect, share in valley.EFFECTS.items():
        at = compiled.index(f"{effect}_raw")
        mean, sd = (np.asarray(found[f"{effect}_{what}"]) for what in ("mean", "spread"))
        before, after = old[share], new[share]
        deviation = sd ** (1.0 - before) * (x[at].reshape(mean.shape) - before * mean)
        x[at] = (after * mean + sd ** (after - 1.0) * deviation).ravel()
    return x


def coordinates_of(compiled: CompiledModel, curvature: Curvature) -> Dense | Tree:
    """Coordinates in which a posterior of this curvature is round, but along flat directions."""
    return curvature.dense(_FLAT) if compiled.size <= _MOST_DENSE else curvature.tree(_FLAT)


def _preconditioned(compiled: CompiledModel, arrays: valley.Arrays, prior: Prior,
                   ) -> tuple[valley.Arrays, FloatArray, Dense | Tree]:  # fmt: skip
    """Arrays with effects centred as their runs tell them, the mode, and coordinates about it.

    An effect is sampled as itself where its runs tell it, and in units of its sd where they do not
    (Papaspiliopoulos, Roberts and Skold 2007, section 4).
    """
    mode, curvature = find_mode(compiled, arrays, prior)
    centred = {**arrays, **_told(mode, compiled, arrays, curvature)}
    start = _recentred(mode, compiled, arrays, centred)
    mode, curvature = find_mode(compiled, centred, prior, start)
    return centred, mode, coordinates_of(compiled, curvature)


def fit(runs: RunTable, prior: str | Prior = "moe-default", *, seed: int = 1,
        method: str = "bayes", num_warmup: int = 500, num_draws: int = 500, num_chains: int = 2,
        fast: bool = False, progress: bool = False) -> Posterior:  # fmt: skip
    """Posterior of the LR law given runs and a prior card.

    method: ``bayes`` (the hierarchical valley model) or ``two-stage`` (the classical Fitting
    paradigm). fast: a refit inside a loop: padded sizes, so that the compilation is shared between
    tables, and fewer draws. num_draws: a chain, at least; the chains go on to eight times as many,
    sixteen where runs are few, until the convergence gate is passed or out of reach.
    ``info["verdict"]`` of the result says which.
    Raises: DataError if no run can be used, SpecError for an unknown method or card, or a count
    that is too small, UntrustworthyFit where the sampler finds nowhere to begin.
    """
    if not isinstance(runs, RunTable):
        raise SpecError(
            f"fit takes a run table, got {type(runs).__name__}; bayeslr.read_runs(path) reads one"
        )
    if method not in METHODS:
        raise SpecError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    counts = {"seed": (seed, 0), "num_warmup": (num_warmup, 1), "num_draws": (num_draws, 1),
              "num_chains": (num_chains, 2)}  # fmt: skip
    for name, (value, least) in counts.items():
        require_whole(value, name, least)
    card = as_prior(prior)
    design = build_design(runs)
    started = time.monotonic()
    if method == "two-stage":
        draws = two_stage.fit(design, seed=seed, num_draws=num_draws * num_chains)
        return make_posterior(
            draws, design, runs, card, method=method, seed=seed,
            statistics={"seconds": time.monotonic() - started},
        )  # fmt: skip
    configure_jax()
    sizes = padded(design.sizes) if fast else None
    if fast:
        num_warmup, num_draws = min(num_warmup, 200), min(num_draws, 300)
    gate = LOOP_GATE if fast else REPORT_GATE
    show = _shown if progress else _unseen
    patience = 8 if design.num_runs > _FEW_RUNS else 16
    draws, statistics = sample_design(
        design, card, sizes=sizes, gate=gate, seed=seed, num_warmup=num_warmup,
        num_draws=num_draws, num_chains=num_chains, max_rounds=4 if fast else patience,
        target_accept=0.8 if fast else 0.9, progress=show,
    )  # fmt: skip
    show("")
    statistics["seconds"] = time.monotonic() - started
    return make_posterior(
        draws, design, runs, card, method=method, seed=seed, statistics=statistics, gate=gate
    )


def refit(runs: RunTable, prior: str | Prior, *, seed: int) -> Posterior:
    """The fit that a loop steers by: `fit` with few draws and, if that fails, with all of them.

    The result's ``trustworthy`` says whether either will do. Raises: as `fit`.
    """
    posterior = fit(runs, prior, seed=seed, fast=True)
    return posterior if posterior.trustworthy else fit(runs, prior, seed=seed)


def _shown(line: str) -> None:
    """Progress, written over the last line."""
    sys.stderr.write(f"\r\033[K{line}")
    sys.stderr.flush()


def _unseen(line: str) -> None:
    """No progress."""


def sample_design(design: Design, card: Prior, *, sizes: Mapping[str, int] | None = None,
                  gate: Gate, **how: Any,
                  ) -> tuple[dict[str, FloatArray], dict[str, float]]:  # fmt: skip
    """Draws of the valley model at a design, each (chain, draw, ...), and the sampler's statistics.

    sizes: to pad to, so that tables share a compilation. gate: the chains go on until it is passed,
    or there is no hope that it will be. how: as in `bayeslr.nuts.sample`.
    """
    own = design.sizes
    arrays = valley.model_data(design, sizes)
    compiled = compiled_model(arrays, card, own["family"])
    arrays, mode, coordinates = _preconditioned(compiled, arrays, card)
    most = how["num_draws"] * how["max_rounds"]

    def renewed(draws: FloatArray) -> Tree:
        return curvature_at(compiled, arrays, draws[:: len(draws) // _TOLD_BY]).tree(_FLAT)

    def enough(draws: Mapping[str, FloatArray]) -> bool:
        return settled(unpadded(draws, own), gate, most)

    draws, statistics = sample(compiled, arrays, mode, coordinates, renewed, enough=enough, **how)
    return unpadded(draws, own), statistics


def padded(sizes: Mapping[str, int]) -> dict[str, int]:
    """Next size of a coarse grid, so that a growing table recompiles rarely. Families stay."""

    def up(size: int) -> int:
        step = 8
        while step * 8 < size:
            step *= 2
        return -(-size // step) * step

    return {level: size if level == "family" else up(size) for level, size in sizes.items()}


def unpadded(draws: Mapping[str, FloatArray], sizes: Mapping[str, int]) -> dict[str, FloatArray]:
    """Draws without the padded entries of each level, and without levels that have no entry."""
    kept = {}
    for name, values in draws.items():
        levels = OUTPUTS.get(name)
        if levels and not sizes[levels[0]]:
            continue
        kept[name] = values[:, :, : sizes[levels[0]]] if levels else values
    return kept
