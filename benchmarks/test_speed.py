"""Seconds of fitting, predicting and choosing; NUTS per effective draw beside others.

.venv/bin/python -m pytest benchmarks --benchmark-only
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from bayeslr.acquire import choose
from bayeslr.calibration import effective_draws
from bayeslr.features import build_design
from bayeslr.models import valley
from bayeslr.models.simulate import PlannedSlice, simulate
from bayeslr.posterior import Posterior
from bayeslr.predict import predict
from bayeslr.priors import Prior, load_prior
from bayeslr.runs import RunTable
from bayeslr.sampling import configure_jax, fit
from bayeslr.space import Candidate
from bayeslr.specs import RunSpec, Target

# Parameters whose slowest one stands for a sampler.
JUDGED = ("lr_n_active", "lr_tokens", "lr_batch_below", "lr_level", "lr_cell_sd", "noise_sd")


def runs_of(num_sizes: int, num_tokens: int, num_batches: int, num_lrs: int) -> RunTable:
    """A ladder drawn from the default card."""
    layout = [
        PlannedSlice(family="f", n_active=n, n_total=8 * n, tokens=d, batch_tokens=b,
                     num_lrs=num_lrs)
        for n in 3e7 * 2.0 ** np.arange(num_sizes) for d in 2e9 * 2.0 ** np.arange(num_tokens)
        for b in 131_072 * 2.0 ** np.arange(num_batches)
    ]  # fmt: skip
    return simulate(load_prior("moe-default"), layout, np.random.default_rng(4)).runs


@pytest.fixture(scope="module")
def card() -> Prior:
    configure_jax()
    return load_prior("moe-default")


@pytest.fixture(scope="module")
def table() -> RunTable:
    """A hundred runs, as inside a loop."""
    return runs_of(2, 5, 2, 5)


@pytest.fixture(scope="module")
def posterior(table: RunTable, card: Prior) -> Posterior:
    return fit(table, card, fast=True)


def test_fit_100_runs_cold(benchmark: Any, table: RunTable, card: Prior) -> None:
    """With compilation, if nothing is in the compilation cache."""
    benchmark.pedantic(fit, args=(table, card), rounds=1)


def test_refit_100_runs_warm(benchmark: Any, table: RunTable, card: Prior) -> None:
    fit(table, card, fast=True)
    found = benchmark.pedantic(fit, args=(table, card), kwargs={"fast": True, "seed": 2}, rounds=3)
    benchmark.extra_info["min_ess"] = found.info["diagnostics"]["min_ess"]


@pytest.mark.slow
def test_fit_1600_runs_cold(benchmark: Any, card: Prior) -> None:
    found = benchmark.pedantic(fit, args=(runs_of(4, 8, 5, 10), card), rounds=1)
    benchmark.extra_info["verdict"] = found.info["verdict"]


def test_predict_100_000_targets(benchmark: Any, posterior: Posterior) -> None:
    rng = np.random.default_rng(1)
    targets = [
        Target(target_id=f"t{i}", family="f", n_active=n, n_total=8 * n, tokens=d,
               batch_tokens=1e6)
        for i, (n, d) in enumerate(10 ** rng.uniform((8, 10), (10, 12), (100_000, 2)))
    ]  # fmt: skip
    benchmark.pedantic(predict, args=(posterior, targets), rounds=1)


def test_choose_4_of_5_000_candidates(benchmark: Any, posterior: Posterior) -> None:
    candidates = [
        Candidate(
            spec=RunSpec(
                run_id=f"{n}-{d}-{b}-{i}", family="f", runner="table", lr=1e-4 * 2 ** (i / 2),
                tokens=int(d), batch_tokens=int(b), n_active=int(n), n_total=int(8 * n),
                seq_len=1024,
            ),
            flops=6.0 * n * d,
        )
        for n in 3e7 * 2.0 ** np.arange(10) for d in 2e9 * 2.0 ** np.arange(10)
        for b in 131_072 * 2.0 ** np.arange(5) for i in range(10)
    ]  # fmt: skip
    goal = [Target(target_id="t", family="f", n_active=1e10, n_total=8e10, tokens=1e12,
                   batch_tokens=4e6)]  # fmt: skip
    benchmark.pedantic(
        choose, args=(posterior, candidates, goal),
        kwargs={"num_runs": 4, "budget_flops": 1e22, "seed": 1}, rounds=1,
    )  # fmt: skip


def slowest(draws: dict[str, np.ndarray[Any, Any]]) -> float:
    """Fewest effective draws among the judged parameters; each (chain, draw, ...)."""
    return min(
        effective_draws(np.asarray(draws[name]).reshape(*draws[name].shape[:2], -1)[..., 0])
        for name in JUDGED
    )


@pytest.mark.parametrize("sampler", ["bayeslr", "pymc", "nutpie"])
def test_seconds_per_effective_draw(
    benchmark: Any, table: RunTable, card: Prior, sampler: str
) -> None:
    """Same model, same data, two chains; compilation included."""
    arrays = valley.model_data(build_design(table))

    def run() -> float:
        started = time.perf_counter()
        if sampler == "bayeslr":
            found = fit(table, card, num_warmup=400, num_draws=400)
            draws = {n: found.draws[n].to_numpy() for n in JUDGED}
        else:
            if sampler == "nutpie":
                pytest.importorskip("nutpie")
            import pymc as pm

            with valley.build(arrays, card, 1):
                answer = pm.sample(
                    400, tune=400, chains=2, cores=2, random_seed=1, progressbar=False,
                    nuts_sampler=sampler, compute_convergence_checks=False,
                )  # fmt: skip
            draws = {n: answer.posterior[n].to_numpy() for n in JUDGED}
        per_draw = (time.perf_counter() - started) / slowest(draws)
        assert math.isfinite(per_draw)
        return per_draw

    benchmark.extra_info["seconds_per_effective_draw"] = benchmark.pedantic(run, rounds=1)
