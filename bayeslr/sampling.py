"""From a PyMC model to a posterior: one compilation, a mode, a preconditioner, NUTS in float64.

The model's log density is compiled to JAX once with its data as arguments, so that every table of
the same padded sizes reuses it. NUTS then runs in coordinates that the curvature at the mode has
made round (misfit scales held at their prior medians: with them free, a hierarchy has no mode).
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr.errors import SpecError
from bayeslr.features import build_design
from bayeslr.models import two_stage, valley
from bayeslr.posterior import LOOP_GATE, REPORT_GATE, Posterior, make_posterior, mixed
from bayeslr.priors import OUTPUTS, Prior, load_prior

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bayeslr.runs import RunTable

    FloatArray = NDArray[np.float64]

METHODS = ("bayes", "two-stage")

# Scales of misfit and noise: fixed while the mode is sought. With them free there is none: a
# scale that goes to zero wins without bound.
SCALES = (
    "noise_sd", "noise_share", "noise_dof",
    "lr_family_sd", "lr_slope_family_sd", "lr_tokens_shape_sd", "lr_shape_sd", "lr_cell_sd",
    "lr_slice_sd",
    "best_batch_family_sd", "best_batch_cell_sd", "curvature_family_sd", "curvature_slice_sd",
    "skew_family_sd", "edge_family_sd", "loss_shape_sd", "loss_cell_sd", "loss_slice_sd",
)  # fmt: skip

# Steps of the search for the mode, in the units of each effect; all others move by 0.3.
_STEP = {
    "floor_raw": 0.005, "loss_cell_raw": 0.01, "loss_level": 0.02, "lr_opt_raw": 0.1,
    "lr_cell_raw": 0.1, "lr_anchor": 0.1, "lr_shape_raw": 0.1, "loss_shape_raw": 0.02,
    "best_batch_raw": 0.3, "best_batch_level": 0.2,
}  # fmt: skip


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
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _jax_started() -> bool:
    from jax._src import xla_bridge

    return bool(xla_bridge.backends_are_initialized())


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class CompiledModel:
    """A model as JAX functions of one flat vector and of its data.

    names, shapes: value variables in order. ``log_density(x, data)`` is a scalar, ``outputs(x,
    data)`` the free variables and deterministics by name.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    start: FloatArray
    log_density: Callable[[Any, Sequence[Any]], Any]
    outputs: Callable[[Any, Sequence[Any]], dict[str, Any]]
    value_and_grad: Callable[[Any, Sequence[Any]], Any]
    sampler: dict[tuple[int, ...], Any]

    def draws(self, x: FloatArray, data: Sequence[Any]) -> dict[str, FloatArray]:
        """Reported variables by name, each (chain, draw, ...), at x (chain, draw, parameter)."""
        found = self.outputs(x.reshape(-1, self.size), data)
        return {
            name: np.asarray(values).reshape(x.shape[:2] + values.shape[1:])
            for name, values in found.items()
            if not name.endswith("_raw")
        }

    @property
    def size(self) -> int:
        """Number of unconstrained parameters."""
        return len(self.start)

    @property
    def order(self) -> NDArray[np.int64]:
        """Positions of the global parameters, then of the effects (variables named ``*_raw``)."""
        effects = [self.index(name) for name in self.names if name.endswith("_raw")]
        local = np.concatenate(effects)
        return np.concatenate([np.setdiff1d(np.arange(self.size), local), local])

    @property
    def num_global(self) -> int:
        """Number of parameters that are no effect of a group."""
        return sum(
            int(np.prod(shape)) for name, shape in zip(self.names, self.shapes, strict=True)
            if not name.endswith("_raw")
        )  # fmt: skip

    def index(self, name: str) -> NDArray[np.int64]:
        """Positions of a value variable in the flat vector."""
        offset = 0
        for candidate, shape in zip(self.names, self.shapes, strict=True):
            size = int(np.prod(shape))
            if candidate == name:
                return np.arange(offset, offset + size)
            offset += size
        raise KeyError(name)


def compile_model(arrays: valley.Arrays, prior: Prior, num_families: int) -> CompiledModel:
    """Compile the valley model; the arrays give shapes only."""
    import jax
    import jax.numpy as jnp
    from pytensor.graph.fg import FunctionGraph
    from pytensor.graph.replace import graph_replace
    from pytensor.link.jax.dispatch import jax_funcify

    model = valley.build(arrays, prior, num_families)
    shared = [model[name] for name in arrays]
    inputs = [variable.type.clone(shape=variable.type.shape)() for variable in shared]
    values = list(model.value_vars)
    kept = [*model.free_RVs, *model.deterministics]
    transformed = model.unobserved_value_vars
    names_out = [variable.name for variable in transformed]
    graphs = graph_replace(
        [model.logp(), *transformed], dict(zip(shared, inputs, strict=True)), strict=False
    )
    graph = FunctionGraph(inputs=[*values, *inputs], outputs=graphs, clone=True)
    from pytensor.compile.mode import get_mode

    get_mode("JAX").optimizer.rewrite(graph)
    with warnings.catch_warnings():
        # PyTensor says that JAX cannot raise for a negative scale; no scale here can be negative.
        warnings.filterwarnings("ignore", message="Skipping Check", category=UserWarning)
        function = jax_funcify(graph)
    del kept
    point = model.initial_point(random_seed=0)
    names = tuple(variable.name for variable in values)
    shapes = tuple(np.shape(point[name]) for name in names)
    ends = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])

    def unpack(x: Any) -> list[Any]:
        return [x[ends[i] : ends[i + 1]].reshape(shapes[i]) for i in range(len(shapes))]

    def log_density(x: Any, data: Sequence[Any]) -> Any:
        return jnp.asarray(function(*unpack(x), *data)[0])

    def outputs(x: Any, data: Sequence[Any]) -> dict[str, Any]:
        found = function(*unpack(x), *data)[1:]
        return {n: v for n, v in zip(names_out, found, strict=True) if not n.endswith("__")}

    return CompiledModel(
        names=names,
        shapes=shapes,
        start=np.concatenate([np.ravel(point[name]) for name in names]).astype(float),
        log_density=log_density,
        outputs=jax.jit(jax.vmap(outputs, in_axes=(0, None))),
        value_and_grad=jax.jit(jax.value_and_grad(lambda x, data: -log_density(x, data))),
        sampler={},
    )


_COMPILED: dict[tuple[Any, ...], CompiledModel] = {}


def compiled_model(arrays: valley.Arrays, prior: Prior, num_families: int) -> CompiledModel:
    """The model of these arrays' sizes under a card, compiled once."""
    key = (prior.sha256, num_families, *(values.shape for values in arrays.values()))
    if key not in _COMPILED:
        if len(_COMPILED) > 16:
            _COMPILED.clear()
        _COMPILED[key] = compile_model(arrays, prior, num_families)
    return _COMPILED[key]


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
    for g in range(num_families):
        of_cell = np.isfinite(cell_floor) & (cell_family == g)
        of_slice = np.isfinite(best) & (slice_family == g)
        level = cell_floor[of_cell].mean() if of_cell.any() else 2.5
        lr = best[of_slice].mean() if of_slice.any() else np.nanmean(best)
        cell_floor = np.where((cell_family == g) & ~np.isfinite(cell_floor), level, cell_floor)
        best = np.where((slice_family == g) & ~np.isfinite(best), lr, best)
        x[compiled.index("loss_level")[g]] = level
        x[compiled.index("lr_anchor")[g]] = lr
        for part in ("loss_n_active", "loss_tokens"):
            at = compiled.index(f"{part}_log__")[g]
            x[at] = min(x[at], np.log(0.2 * level))
    # A slice without a finished run, padded ones too, starts at its cell: no effect of its own.
    floor = np.where(np.isfinite(floor), floor, cell_floor[arrays["slice_cell"]])
    # A partly centred effect: raw = c mean + sd^(c - 1) (value - mean).
    level_c = x[compiled.index("loss_level")][cell_family]
    lr_c = x[compiled.index("lr_anchor")][cell_family]
    lr_s = lr_c[arrays["slice_cell"]]

    def raw(value: FloatArray, mean: FloatArray, sd: str, c: FloatArray) -> FloatArray:
        return c * mean + prior[sd].location ** (c - 1.0) * (value - mean)

    shape_family = arrays["shape_family"]
    level_h = x[compiled.index("loss_level")][shape_family]
    x[compiled.index("loss_shape_raw")] = arrays["shape_has_floor"] * level_h
    x[compiled.index("lr_shape_raw")] = (
        arrays["shape_has_lr"] * x[compiled.index("lr_anchor")][shape_family]
    )
    x[compiled.index("loss_cell_raw")] = raw(
        cell_floor, level_c, "loss_cell_sd", arrays["cell_has_floor"]
    )
    x[compiled.index("floor_raw")] = raw(
        floor, cell_floor[arrays["slice_cell"]], "loss_slice_sd", arrays["slice_has_floor"]
    )
    x[compiled.index("curvature_slice_raw")] = arrays["slice_has_curvature"] * np.log(
        prior["curvature_intercept"].location
    )
    x[compiled.index("lr_cell_raw")] = arrays["cell_has_lr"] * lr_c
    x[compiled.index("lr_opt_raw")] = arrays["slice_has_lr"] * (0.5 * best + 0.5 * lr_s)
    return x


def find_mode(
    compiled: CompiledModel, arrays: valley.Arrays, prior: Prior, start: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Mode with the misfit scales fixed, and the negative Hessian of the log density there.

    Returns: x, shape (parameter,), and Hessian, shape (parameter, parameter), in which the scales'
    rows hold a prior-sized curvature.
    """  # fmt: skip
    from scipy.optimize import minimize

    data = tuple(arrays.values())
    x = _data_start(compiled, arrays, prior) if start is None else start.copy()
    fixed = np.concatenate([compiled.index(f"{name}_log__") for name in SCALES])
    free = np.setdiff1d(np.arange(compiled.size), fixed)
    step = np.full(compiled.size, 0.3)
    for name, size in _STEP.items():
        step[compiled.index(name)] = size

    def objective(y: FloatArray) -> tuple[float, FloatArray]:
        trial = x.copy()
        trial[free] += step[free] * y
        value, gradient = compiled.value_and_grad(trial, data)
        return float(value), np.asarray(gradient)[free] * step[free]

    found = minimize(
        objective, np.zeros(len(free)), jac=True, method="L-BFGS-B",
        options={"maxiter": 2000, "maxfun": 3000, "maxcor": 50},
    )  # fmt: skip
    x[free] += step[free] * found.x
    hessian = _hessian(compiled, x, data, free)
    for _ in range(3):
        value, gradient = compiled.value_and_grad(x, data)
        block = hessian[np.ix_(free, free)]
        scales, vectors = np.linalg.eigh(block)
        slope = vectors.T @ np.asarray(gradient)[free]
        move = -vectors @ (slope / np.maximum(np.abs(scales), 1e-3))
        trial = x.copy()
        trial[free] += move
        gain = float(value) - float(compiled.value_and_grad(trial, data)[0])
        if not gain > 1e-3:
            break
        x = trial
        hessian = _hessian(compiled, x, data, free)
    for name in SCALES:
        at = compiled.index(f"{name}_log__")
        hessian[at, at] = 2.0 / prior[name].scale ** 2
    return x, hessian


def _hessian(compiled: CompiledModel, x: FloatArray, data: Sequence[Any],
             free: NDArray[np.int64]) -> FloatArray:  # fmt: skip
    """Central differences of the gradient: no second compilation."""
    hessian = np.zeros((compiled.size, compiled.size))
    for i in free:
        step = 1e-5 * max(1.0, abs(x[i]))
        ahead, behind = x.copy(), x.copy()
        ahead[i] += step
        behind[i] -= step
        difference = np.asarray(compiled.value_and_grad(ahead, data)[1]) - np.asarray(
            compiled.value_and_grad(behind, data)[1]
        )
        hessian[i, free] = difference[free] / (2 * step)
    return (hessian + hessian.T) / 2


def whitening(compiled: CompiledModel, hessian: FloatArray, least: float = 0.5) -> FloatArray:
    """Matrix L with L L' near the inverse Hessian; directions flatter than ``least`` are capped.

    L is lower triangular with the global parameters first (`CompiledModel.order`), so that the
    leading coordinates are the globals alone and the others what is left of the effects.
    """
    order = compiled.order
    scales, vectors = np.linalg.eigh(hessian[np.ix_(order, order)])
    covariance = (vectors / np.maximum(scales, least)) @ vectors.T
    root = np.empty_like(covariance)
    root[order] = np.linalg.cholesky(covariance)
    return np.asarray(root, dtype=np.float64)


def _sampler(compiled: CompiledModel, num_warmup: int, num_draws: int, num_chains: int,
             target_accept: float, progress: bool) -> Any:  # fmt: skip
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro import distributions as dist
    from numpyro.infer import MCMC, NUTS

    key = (num_warmup, num_draws, num_chains, round(target_accept * 100), int(progress))
    if key not in compiled.sampler:
        sizes = {"z_global": compiled.num_global, "z_effect": compiled.size - compiled.num_global}

        def model(mode: Any, root: Any, data: Sequence[Any]) -> None:
            z = [
                numpyro.sample(
                    name, dist.ImproperUniform(dist.constraints.real_vector, (), (size,))
                )
                for name, size in sizes.items()
            ]
            x = mode + root @ jnp.concatenate(z)
            numpyro.factor("log_density", compiled.log_density(x, data))

        parallel = num_chains <= jax.local_device_count()
        compiled.sampler[key] = MCMC(
            NUTS(model, dense_mass=False, target_accept_prob=target_accept,
                 max_tree_depth=8),
            num_warmup=num_warmup, num_samples=num_draws, num_chains=num_chains,
            chain_method="parallel" if parallel else "vectorized",
            progress_bar=progress, jit_model_args=True,
        )  # fmt: skip
    return compiled.sampler[key]


def sample(compiled: CompiledModel, arrays: valley.Arrays, mode: FloatArray, root: FloatArray, *,
           seed: int, num_warmup: int, num_draws: int, num_chains: int,
           enough: Callable[[dict[str, FloatArray]], bool] = lambda draws: True,
           max_rounds: int = 4, target_accept: float = 0.8, progress: bool = False,
           ) -> tuple[dict[str, FloatArray], dict[str, float]]:  # fmt: skip
    """NUTS draws, each (chain, draw, ...), and the sampler's statistics.

    After ``num_draws`` a chain, ``enough(draws)`` is asked; while it says no, the
    chains go on for as many again, up to ``max_rounds`` times ``num_draws``.
    """
    import jax
    import jax.numpy as jnp

    data = tuple(jnp.asarray(values) for values in arrays.values())
    sampler = _sampler(compiled, num_warmup, num_draws, num_chains, target_accept, progress)
    start = 0.5 * np.random.default_rng(seed).normal(size=(num_chains, compiled.size))
    if num_chains == 1:
        start = start[0]
    first = {
        "z_global": jnp.asarray(start[..., : compiled.num_global]),
        "z_effect": jnp.asarray(start[..., compiled.num_global :]),
    }
    arguments = (jnp.asarray(mode), jnp.asarray(root), data)
    fields = ("num_steps", "diverging", "accept_prob")
    sampler.post_warmup_state = None
    key = jax.random.PRNGKey(seed)
    rounds: list[FloatArray] = []
    draws: dict[str, FloatArray] = {}
    extras: list[dict[str, FloatArray]] = []
    while True:
        sampler.run(key, *arguments, init_params=None if rounds else first, extra_fields=fields)
        found_z = sampler.get_samples(group_by_chain=True)
        rounds.append(np.concatenate([np.asarray(found_z[name]) for name in first], axis=-1))
        extra = sampler.get_extra_fields(group_by_chain=True)
        extras.append({name: np.asarray(extra[name]) for name in fields})
        z = np.concatenate(rounds, axis=1)
        new = compiled.draws(mode + rounds[-1] @ root.T, data)
        draws = (
            {name: np.concatenate([draws[name], new[name]], axis=1) for name in new}
            if len(rounds) > 1 else new
        )  # fmt: skip
        divergences = float(sum(np.sum(extra["diverging"]) for extra in extras))
        if len(rounds) == max_rounds or enough(draws):
            break
        sampler.post_warmup_state = sampler.last_state
        key = sampler.post_warmup_state.rng_key
    assert z.shape[1] == len(rounds) * num_draws
    statistics = {
        "divergences": divergences,
        "mean_steps": float(np.mean([extra["num_steps"].mean() for extra in extras])),
        "mean_acceptance": float(np.mean([extra["accept_prob"].mean() for extra in extras])),
    }
    return draws, statistics


def fit(runs: RunTable, prior: str | Prior = "moe-default", *, seed: int = 1,
        method: str = "bayes", num_warmup: int = 400, num_draws: int = 1000, num_chains: int = 2,
        fast: bool = False, progress: bool = False) -> Posterior:  # fmt: skip
    """Posterior of the LR law given runs and a prior card.

    method: ``bayes`` (the hierarchical valley model) or ``two-stage`` (the classical Fitting
    paradigm). fast: a refit inside a loop: padded sizes, so that the compilation is shared between
    tables, and fewer draws. The result's ``info["verdict"]`` says whether it can be trusted.
    Raises: DataError if no run can be used, SpecError for an unknown method or card.
    """
    if method not in METHODS:
        raise SpecError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    card = load_prior(prior) if isinstance(prior, str) else prior
    design = build_design(runs)
    started = time.monotonic()
    if method == "two-stage":
        draws = two_stage.fit(design, seed=seed, num_draws=num_draws * num_chains)
        return make_posterior(
            draws, design, runs, card, method=method, seed=seed,
            statistics={"seconds": time.monotonic() - started},
        )  # fmt: skip
    configure_jax()
    sizes = padded(valley.sizes_of(design)) if fast else None
    if fast:
        num_warmup, num_draws = min(num_warmup, 200), min(num_draws, 300)
    arrays = valley.model_data(design, sizes)
    compiled = compiled_model(arrays, card, len(design.families))
    mode, hessian = find_mode(compiled, arrays, card)
    gate = LOOP_GATE if fast else REPORT_GATE

    def enough(draws: dict[str, FloatArray]) -> bool:
        return mixed(unpadded(draws, valley.sizes_of(design)), gate)

    draws, statistics = sample(
        compiled, arrays, mode, whitening(compiled, hessian), seed=seed, num_warmup=num_warmup,
        num_draws=num_draws, num_chains=num_chains, enough=enough, progress=progress,
        target_accept=0.8 if fast else 0.9,
    )  # fmt: skip
    draws = unpadded(draws, valley.sizes_of(design))
    statistics["seconds"] = time.monotonic() - started
    return make_posterior(
        draws, design, runs, card, method=method, seed=seed, statistics=statistics, gate=gate
    )


def padded(sizes: Mapping[str, int]) -> dict[str, int]:
    """Next size of a coarse grid, so that a growing table recompiles rarely. Families stay."""

    def up(size: int) -> int:
        step = 8
        while step * 8 < size:
            step *= 2
        return -(-size // step) * step

    return {level: size if level == "family" else up(size) for level, size in sizes.items()}


def unpadded(draws: Mapping[str, FloatArray], sizes: Mapping[str, int]) -> dict[str, FloatArray]:
    """Draws without the padded entries of each level."""
    kept = {}
    for name, values in draws.items():
        levels = OUTPUTS.get(name)
        kept[name] = values[:, :, : sizes[levels[0]]] if levels else values
    return kept
