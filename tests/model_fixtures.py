"""One fitted posterior for all tests of the statistical half: no test samples on its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bayeslr.priors import Prior, load_prior
from bayeslr.specs import Target

# Every test's conftest imports this file: what is heavy waits until a fixture asks for it.
if TYPE_CHECKING:
    from bayeslr.posterior import Posterior
    from bayeslr.runs import RunTable

SIZES = (3e7, 1.2e8)
TOKENS = (2e9, 8e9)
BATCHES = (131_072.0, 524_288.0)
SPARSITY = 8.0
NOISE = 1e-3
SHIFT = 0.3  # The made-up runs' LR* over that of the card, in natural logs.


@lru_cache
def true_log_lr(n_active: float, tokens: float, batch_tokens: float) -> float:
    """The law behind the made-up runs: the card's own, somewhat higher."""
    from bayeslr.models.simulate import card_log_lr

    card = load_prior("moe-default")
    return SHIFT + card_log_lr(card, n_active, SPARSITY * n_active, tokens, batch_tokens)


def run_record(run_id: str, n_active: float, tokens: float, batch_tokens: float, lr: float,
               loss: float | None, **more: Any) -> dict[str, Any]:  # fmt: skip
    """A row of the run table; without a loss it diverged."""
    return {
        "run_id": run_id, "family": "made-up", "lr": lr, "n_active": n_active,
        "n_total": SPARSITY * n_active, "param_convention": "non_embedding", "tokens": tokens,
        "batch_tokens": batch_tokens, "loss": loss,
        "status": "diverged" if loss is None else "ok", **more,
    }  # fmt: skip


def made_up_runs(
    sizes: tuple[float, ...] = SIZES,
    tokens: tuple[float, ...] = TOKENS,
    batches: tuple[float, ...] = BATCHES,
    offsets: tuple[float, ...] = (-1.4, -0.7, 0.0, 0.7, 2.1),
    noise: float = NOISE,
) -> RunTable:
    """Runs at ``offsets`` in ln LR about a grid point near each optimum; u above 1.9 diverges."""
    from bayeslr.runs import make_table

    rng = np.random.default_rng(7)
    rows = []
    for n in sizes:
        for d in tokens:
            for b in batches:
                optimum = true_log_lr(n, d, b)
                middle = math.log(2) / 2 * round(optimum / (math.log(2) / 2))
                for offset in offsets:
                    u = middle + offset - optimum
                    loss = 2.0 + 0.4 * (n / 6e7) ** -0.34 + 0.4 * (d / 4e9) ** -0.32
                    loss += 2 * 0.02 * (math.expm1(0.4 * u) - 0.4 * u) / 0.4**2
                    loss += noise * rng.normal()
                    rows.append(
                        run_record(
                            f"r{len(rows)}",
                            n,
                            d,
                            b,
                            math.exp(middle + offset),
                            None if u > 1.9 else loss,
                        )
                    )
    return make_table(rows, source="made-up")


def target(target_id: str = "big", **changes: Any) -> Target:
    """A run thirty times the largest of the made-up ones."""
    base: dict[str, Any] = {
        "n_active": 6e8, "n_total": SPARSITY * 6e8, "tokens": 4.8e10, "batch_tokens": 1_048_576.0,
        "family": "made-up",
    }  # fmt: skip
    return Target(target_id=target_id, **{**base, **changes})


@pytest.fixture(scope="session")
def card() -> Prior:
    """The default card."""
    return load_prior("moe-default")


@pytest.fixture(scope="session")
def table() -> RunTable:
    """Forty made-up runs: two sizes, two horizons, two batches, five LRs."""
    return made_up_runs()


@pytest.fixture(scope="session")
def fit_again(table: RunTable, card: Prior) -> Callable[[int], Posterior]:
    """Fit of the made-up runs with few draws, by seed: compiled once."""
    from bayeslr.sampling import configure_jax, fit

    configure_jax(2)

    def run(seed: int) -> Posterior:
        return fit(table, card, seed=seed, num_warmup=150, num_draws=200, fast=True)

    return run


@pytest.fixture(scope="session")
def posterior(fit_again: Callable[[int], Posterior]) -> Posterior:
    """The fitted posterior that tests share."""
    return fit_again(1)


def never_diverging(posterior: Posterior) -> Posterior:
    """The same with the edge far above every LR."""
    far = posterior.draws["log_edge_offset"] + 9.0
    return dataclasses.replace(posterior, draws=posterior.draws.assign(log_edge_offset=far))
