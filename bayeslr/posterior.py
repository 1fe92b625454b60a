"""Posterior draws with named dimensions, their diagnostics, and the fit folder on disk.

The only file that knows ArviZ, and the only one that knows the fit folder's schema.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import platform
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from bayeslr.errors import BayeslrError, DataError, SpecError, StorageError
from bayeslr.features import REGRESSORS, Design, build_design
from bayeslr.priors import OUTPUTS, SLOPES, Distribution, Prior
from bayeslr.runs import RunTable, identifiability, read_runs
from bayeslr.specs import as_path
from bayeslr.units import counted, parse_quantity

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from bayeslr.specs import Recipe, Target

SCHEMA_VERSION = 6
POSTERIOR_FILE, FIT_FILE, RUNS_FILE = "posterior.nc", "fit.json", "runs.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """The convergence gate: beyond these bounds a fit is not reported as trustworthy."""

    max_r_hat: float
    min_effective_draws: float
    max_divergent_share: float


# Vehtari et al. 2021 (arXiv 1903.08008, section 4): R-hat at most 1.01, 400 effective draws. A loop
# asks which run is worth more, and is soon asked again.
REPORT_GATE = Gate(max_r_hat=1.01, min_effective_draws=400.0, max_divergent_share=0.02)
LOOP_GATE = Gate(max_r_hat=1.05, min_effective_draws=60.0, max_divergent_share=0.05)


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """Draws of a fit, and all that is needed to predict from them.

    draws: Dataset with dimensions chain, draw and, by variable, family, slope, shape, cell, slice,
    shared (training runs of several rows and data orders), covariate, in the design's order.
    design, runs: what was fitted; None for a prior card alone. info: method, seed, centre,
    diagnostics, verdict, versions, hashes; JSON-safe.
    """

    draws: xr.Dataset
    prior: Prior
    info: Mapping[str, Any]
    design: Design | None = None
    runs: RunTable | None = None

    def predict(self, targets: Iterable[Target]) -> pd.DataFrame:
        """Predictions table: recommended LR, quantiles of LR*, regret. See `bayeslr.predict`."""
        table: pd.DataFrame = _higher("predict").predict(self, targets)
        return table

    def regret(self, targets: Iterable[Target], lr: float | Sequence[float]) -> NDArray[np.float64]:
        """Draws of the regret of training each target at ``lr``, nats, (draw, target)."""
        draws: NDArray[np.float64] = _higher("predict").regret(self, targets, lr)
        return draws

    def covariates(self, targets: Iterable[Target]) -> pd.DataFrame:
        """Best weight decay and LR multipliers. See `bayeslr.covariates.covariate_table`."""
        table: pd.DataFrame = _higher("covariates").covariate_table(self, targets)
        return table

    def plan(self, space: Recipe | str | Path, budget: str | float,
             num_runs: int | None = None) -> Any:  # fmt: skip
        """The next runs worth paying for within ``budget`` FLOPs. See `bayeslr.acquire.plan`.

        space: a recipe, its path, or the name of a shipped one. budget: a number, or as ``1e18``.
        """
        recipe = _higher("loop").open_recipe(space)
        flops = parse_quantity(budget, name="budget")
        return _higher("acquire").plan(self, recipe, budget_flops=flops, num_runs=num_runs)

    def save(self, path: str | Path) -> None:
        """Write the fit folder: to a temporary name, then renamed."""
        save(self, path)

    @staticmethod
    def load(path: str | Path) -> Posterior:
        """Read a fit folder. Raises: StorageError if it is missing or damaged."""
        return load(path)

    @property
    def trustworthy(self) -> bool:
        """Whether the convergence gate was passed."""
        return bool(self.info.get("trustworthy", True))

    def thinned(self, num_draws: int) -> NDArray[np.int64]:
        """Indices of ``num_draws`` draws, or of all if there are fewer, evenly over all chains."""
        total = self.draws.sizes["chain"] * self.draws.sizes["draw"]
        return np.unique(np.linspace(0, total - 1, min(total, num_draws)).astype(np.int64))

    def flat(self, name: str) -> NDArray[np.float64]:
        """Draws of one variable with chains joined, shape (draw, ...)."""
        values = self.draws[name].to_numpy()
        return np.asarray(values.reshape((-1, *values.shape[2:])), dtype=np.float64)


def _higher(layer: str) -> Any:
    """Module of a higher layer, for the methods of `Posterior`: loaded on first use."""
    return importlib.import_module(f"bayeslr.{layer}")


def make_posterior(
    draws: Mapping[str, NDArray[np.float64]], design: Design | None, runs: RunTable | None,
    prior: Prior, *, method: str, seed: int, statistics: Mapping[str, float],
    gate: Gate = REPORT_GATE,
) -> Posterior:  # fmt: skip
    """Posterior from arrays (chain, draw, ...), with diagnostics and verdict worked out."""
    families = design.families if design is not None else ()
    dataset = _as_dataset(draws)
    coords: dict[str, Any] = {}
    if "slope" in dataset.dims:
        coords["slope"] = list(SLOPES)
    if "family" in dataset.dims:
        coords["family"] = list(families)
    if "covariate" in dataset.dims and design is not None:
        coords["covariate"] = list(design.covariates)
    if "regressor" in dataset.dims:
        coords["regressor"] = list(REGRESSORS)
    dataset = dataset.assign_coords(coords)
    diagnostics: dict[str, Any] = dict(statistics)
    sampled = method == "bayes"
    if sampled:
        diagnostics |= diagnose(dataset)
    trustworthy, verdict = _verdict(diagnostics, gate) if sampled else (True, _NOT_SAMPLED[method])
    centre = design.centre() if design is not None else dict(prior.log_reference)
    info = {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "seed": seed,
        "families": list(families),
        "parametrizations": list(design.parametrizations) if design is not None else [],
        "param_convention": convention_of(runs),
        "centre": centre,
        "num_runs": design.num_runs if design is not None else 0,
        "num_diverged": int(design.diverged.sum()) if design is not None else 0,
        "num_slices": design.num_slices if design is not None else 0,
        "diagnostics": diagnostics,
        "trustworthy": trustworthy,
        "verdict": verdict,
        "identifiability": _notes(prior, runs, method) if runs is not None else [],
        "data_hash": runs.data_hash if runs is not None else None,
        "num_quarantined": len(runs.quarantine) if runs is not None else 0,
        "versions": _versions(),
    }
    return Posterior(draws=dataset, prior=prior, info=info, design=design, runs=runs)


def _notes(prior: Prior, runs: RunTable, method: str) -> list[str]:
    """What the runs cannot tell, and where the card is one for other runs."""
    if method == "two-stage":  # no prior, and no divergence
        return [text.replace("the prior's", "not estimated") for text in identifiability(runs)
                if "where divergence begins" not in text]  # fmt: skip
    return [*identifiability(runs), *prior.contradictions(runs.frame)]


_NOT_SAMPLED = {
    "two-stage": "Least squares: its intervals know the scatter of the optima about the law, and "
    "nothing of the law's own error. What a loss is worth in tokens is the card's.",
    "prior": "No run was used: this is the published evidence alone.",
}


def _as_dataset(draws: Mapping[str, NDArray[np.float64]]) -> xr.Dataset:
    return xr.Dataset(
        {
            name: (("chain", "draw", *_dims_of(name, values)), values)
            for name, values in draws.items()
        }
    )


# Chains are given up once this share of their draws promises this share of the effective draws that
# the gate wants: early numbers are rough.
_TRIED, _PROMISED = 0.25, 0.5


def settled(draws: Mapping[str, NDArray[np.float64]], gate: Gate, most_draws: int) -> bool:
    """Whether to draw no more: the chains agree and hold enough effective draws of every reported
    variable, or would not by ``most_draws`` of each chain, for effective draws grow as draws do.
    """
    dataset = _as_dataset(draws)
    share = dataset.sizes["draw"] / most_draws
    names = reported(dataset)
    # Parameters first: they are few, and mostly the last to mix.
    parts = [n for n in names if n not in _BY_SLICE], [n for n in names if n in _BY_SLICE]
    for found in (diagnose(dataset[part]) for part in parts if part):
        passed = found["max_r_hat"] <= gate.max_r_hat
        if not (passed and found["min_ess"] >= gate.min_effective_draws):
            promised = found["min_ess"] / share
            return bool(share >= _TRIED and promised < _PROMISED * gate.min_effective_draws)
    return True


def _dims_of(name: str, values: NDArray[np.float64]) -> tuple[str, ...]:
    if name == "coefficient":
        return ("regressor",)
    # A card alone knows no families: what a fit draws for each is drawn once.
    return OUTPUTS.get(name, ("family",)) if values.ndim > 2 else ()


def convention_of(runs: RunTable | None) -> str | None:
    """How a table counts parameters; None where it does not say."""
    if runs is None:
        return None
    found = runs.frame["param_convention"].dropna().unique()
    return str(found[0]) if len(found) else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("bayeslr", "numpy", "jax", "numpyro", "pymc", "arviz"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


# What a report tells of every slice, and a prediction takes over where one was measured.
_BY_SLICE = ("lr_opt",)


def reported(dataset: xr.Dataset) -> list[str]:
    """Variables whose convergence is judged: parameters of the card, of families and of shapes, and
    the slices' LR*.
    """
    local = {"cell", "slice", "shared"}
    return [
        str(name) for name, values in dataset.data_vars.items()
        if name in _BY_SLICE or not local & {str(dim) for dim in values.dims}
    ]  # fmt: skip


def _told(values: xr.DataArray, worst: float) -> NDArray[np.float64]:
    """A diagnostic of each entry; draws that are no numbers, or all alike, have the worst."""
    return np.nan_to_num(np.asarray(values, dtype=np.float64), nan=worst, posinf=math.inf)


def diagnose(dataset: xr.Dataset) -> dict[str, Any]:
    """R-hat and effective draws of the reported variables (Vehtari et al. 2021).

    Returns: per-variable worst values, the overall worst, and which variable it is.
    """
    az = _arviz()
    chosen = dataset[reported(dataset)].drop_vars(["family", "slope", "covariate"], errors="ignore")
    worst: dict[str, dict[str, float]] = {}
    r_hat = az.rhat(chosen)
    bulk, tail = az.ess(chosen, method="bulk"), az.ess(chosen, method="tail")
    for name in chosen.data_vars:
        worst[str(name)] = {
            "r_hat": float(np.max(_told(_dataset(r_hat)[name], math.inf))),
            "ess_bulk": float(np.min(_told(_dataset(bulk)[name], 0.0))),
            "ess_tail": float(np.min(_told(_dataset(tail)[name], 0.0))),
        }
    by_r_hat = max(worst, key=lambda name: worst[name]["r_hat"])
    by_ess = min(worst, key=lambda name: min(worst[name]["ess_bulk"], worst[name]["ess_tail"]))
    sizes = dataset.sizes
    return {
        "num_chains": int(sizes["chain"]),
        "num_draws": int(sizes["draw"]),
        "max_r_hat": worst[by_r_hat]["r_hat"],
        "max_r_hat_of": by_r_hat,
        "min_ess": min(worst[by_ess]["ess_bulk"], worst[by_ess]["ess_tail"]),
        "min_ess_of": by_ess,
        "variables": worst,
    }


def smoothed_weights(log_ratios: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Normalised importance weights (draw,) and their Pareto k (Vehtari et al. 2024).

    Above k of 0.7 the weighted draws say nothing.
    """
    az = _arviz()
    if hasattr(az, "psislw"):
        log_weights, k = az.psislw(log_ratios)
    else:  # ArviZ 1 keeps it on arrays alone.
        log_weights, k = importlib.import_module("arviz_stats.base").array_stats.psislw(log_ratios)
    weights = np.exp(np.asarray(log_weights) - np.max(log_weights))
    return weights / weights.sum(), float(k)


def _arviz() -> Any:
    import warnings

    with warnings.catch_warnings():
        # ArviZ 0.23 announces its own next version on import.
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def _dataset(found: Any) -> xr.Dataset:
    """ArviZ 1 answers with a DataTree where ArviZ 0 answered with a Dataset."""
    return found if isinstance(found, xr.Dataset) else found.to_dataset()


def _verdict(diagnostics: Mapping[str, Any], gate: Gate) -> tuple[bool, str]:
    total = diagnostics["num_chains"] * diagnostics["num_draws"]
    faults = []
    if not diagnostics["max_r_hat"] <= gate.max_r_hat:
        faults.append(
            f"the chains disagree on {diagnostics['max_r_hat_of']} "
            f"(R-hat {diagnostics['max_r_hat']:.3f}, wanted at most {gate.max_r_hat})"
        )
    if not diagnostics["min_ess"] >= gate.min_effective_draws:
        faults.append(
            f"{diagnostics['min_ess_of']} has {diagnostics['min_ess']:.0f} effective draws "
            f"of {total} (wanted at least {gate.min_effective_draws:.0f})"
        )
    if diagnostics.get("divergences", 0.0) > gate.max_divergent_share * total:
        faults.append(
            f"{diagnostics['divergences']:.0f} of {total} transitions diverged: the sampler could "
            "not follow the posterior everywhere"
        )
    if faults:
        return False, (
            "Do not trust this fit: " + "; ".join(faults) + ". Give it more draws (--draws), "
            "another seed, or look for rows that contradict each other (bayeslr check)."
        )
    return True, (
        f"The sampler converged: R-hat at most {diagnostics['max_r_hat']:.3f}, at least "
        f"{diagnostics['min_ess']:.0f} effective draws for every parameter and LR*, "
        f"{counted(diagnostics.get('divergences', 0.0), 'divergent transition')}."
    )


def require_place(path: str | Path) -> Path:
    """The path, at which a fit folder can be written. Raises: StorageError if it is taken."""
    path = Path(path)
    if (
        path.exists()
        and not (path / FIT_FILE).exists()
        and (not path.is_dir() or any(path.iterdir()))
    ):
        raise StorageError(f"{path} exists and is no fit folder; choose another name")
    return path


def save(posterior: Posterior, path: str | Path) -> None:
    """Write the fit folder at ``path``, replacing one that is there, in one rename.

    Raises: StorageError if the disk is full or the path is something else than a fit folder.
    """
    path = require_place(as_path(path))
    folder = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        folder.mkdir(parents=True)
        encoding = {str(name): {"dtype": "float32", "zlib": True, "complevel": 1}
                    for name in posterior.draws.data_vars}  # fmt: skip
        posterior.draws.assign_attrs(schema_version=SCHEMA_VERSION).to_netcdf(
            folder / POSTERIOR_FILE, engine="h5netcdf", encoding=encoding
        )
        if posterior.runs is not None:
            posterior.runs.write(folder / RUNS_FILE)
        document = {**posterior.info, "prior": _prior_document(posterior.prior)}
        (folder / FIT_FILE).write_text(
            json.dumps(_finite(document), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        old = path.with_name(f".{path.name}-old-{os.getpid()}")
        if path.exists():
            path.rename(old)
        try:
            folder.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"the fit could not be written to {path}: {error}; what was there before is untouched"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load(path: str | Path) -> Posterior:
    """Read a fit folder. Raises: StorageError if it is missing, damaged or of another schema."""
    path = as_path(path)
    if not (path / FIT_FILE).is_file():
        raise StorageError(
            f"{path} is no fit folder: {FIT_FILE} is missing; make one with bayeslr fit"
        )
    try:
        info = json.loads((path / FIT_FILE).read_text(encoding="utf-8"))
        if info["schema_version"] != SCHEMA_VERSION:
            raise StorageError(
                f"{path} has schema version {info['schema_version']}, this release reads "
                f"{SCHEMA_VERSION}; fit again from its {RUNS_FILE}"
            )
        with xr.open_dataset(path / POSTERIOR_FILE, engine="h5netcdf") as dataset:
            draws = dataset.load()
        prior = _prior_from(info.pop("prior"))
        runs = read_runs(path / RUNS_FILE) if (path / RUNS_FILE).is_file() else None
        if info["method"] != "prior" and runs is None:
            raise StorageError(
                f"{path} is damaged: {RUNS_FILE} is missing; fit again from the runs"
            )
        if runs is not None and runs.data_hash != info["data_hash"]:
            raise StorageError(f"{path}: {RUNS_FILE} is not the table that was fitted; fit again")
        design = build_design(runs) if runs is not None else None
        if design is not None and info["method"] == "bayes":
            _require_same_groups(path, draws, design)
    except StorageError:
        raise
    except (BayeslrError, OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} is damaged ({type(error).__name__}: {error}); fit again from the runs"
        ) from error
    return Posterior(draws=draws, prior=prior, info=info, design=design, runs=runs)


def _require_same_groups(path: Path, draws: xr.Dataset, design: Design) -> None:
    """Refuse draws whose groups are not those of the runs' design: they would be read off askew.

    Raises: StorageError.
    """
    for group, number in design.sizes.items():
        if group == "run":  # no draws a run are kept
            continue
        fitted = draws.sizes.get(group, 0)
        if fitted != number:
            raise StorageError(
                f"{path} was fitted by a release that groups these runs otherwise (dimension "
                f"{group}: {fitted} then, {number} now); fit again from its {RUNS_FILE}"
            )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value


def _prior_document(prior: Prior) -> dict[str, Any]:
    document = {
        f.name: getattr(prior, f.name) for f in dataclasses.fields(prior) if f.name != "path"
    }
    document["parameters"] = {
        name: dataclasses.asdict(entry) for name, entry in prior.parameters.items()
    }
    return document


def _prior_from(document: Mapping[str, Any]) -> Prior:
    parameters = {name: Distribution(**entry) for name, entry in document["parameters"].items()}
    return Prior(**{**document, "parameters": parameters})


def require_posterior(posterior: object) -> None:
    """Raises: SpecError for what is no posterior."""
    if not isinstance(posterior, Posterior):
        raise SpecError(
            f"a posterior is needed, got {type(posterior).__name__}; bayeslr.fit(table) makes one, "
            "bayeslr.Posterior.load(folder) reads one"
        )


def require_convention(posterior: Posterior, target: Target) -> None:
    """Refuse a target whose parameters are counted otherwise than the fitted runs'.

    Raises: DataError.
    """
    fitted = posterior.info.get("param_convention")
    if fitted is not None and target.param_convention != fitted:
        raise DataError(
            f"target {target.target_id} counts {target.param_convention} parameters, the fitted "
            f"runs {fitted}; state the target's counts as the runs do"
        )
