"""Which slice to add: what least squares knows of exponents, and the cheapest that helps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bayeslr.runs import identifiability, make_table
from bayeslr.runs.additions import (
    KNOWN,
    NUM_LRS,
    SCATTER,
    Addition,
    cheapest_addition,
    standard_errors,
)

DIAGONAL = [(1e8, 1e8, 2e9, 2**17), (2e8, 2e8, 4e9, 2**18), (4e8, 4e8, 8e9, 2**17)]


def cells(rows: list[tuple[float, float, float, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["n_active", "n_total", "tokens", "batch_tokens"])


def runs(rows: list[tuple[float, float, float, float]]) -> list[dict[str, Any]]:
    return [
        {"run_id": f"{i}-{lr}", "family": "f", "n_active": n, "n_total": total, "tokens": d,
         "batch_tokens": b, "lr": lr, "loss": 3 + abs(math.log(lr / 2e-3)), "status": "ok",
         "param_convention": "non_embedding"}
        for i, (n, total, d, b) in enumerate(rows) for lr in (1e-3, 2e-3, 4e-3)
    ]  # fmt: skip


def test_standard_errors_are_those_of_least_squares() -> None:
    """Against the covariance of an ordinary regression with an intercept."""
    rng = np.random.default_rng(1)
    slices = np.exp(rng.normal(size=(12, 4)) + np.array([18.0, 20.0, 22.0, 12.0]))
    x = np.log(slices)
    x = np.column_stack([np.ones(12), x[:, 0], x[:, 0] - x[:, 1], x[:, 2], x[:, 3]])
    exact = SCATTER * np.sqrt(np.diag(np.linalg.inv(x.T @ x)))[1:]
    np.testing.assert_allclose(list(standard_errors(slices).values()), exact, rtol=1e-9)


def test_what_does_not_vary_or_moves_together_is_unknown() -> None:
    errors = standard_errors(cells(DIAGONAL).to_numpy())
    assert math.isinf(errors["sparsity"])
    assert math.isinf(errors["n_active"])
    assert math.isinf(errors["tokens"])
    assert math.isfinite(errors["batch_tokens"])


def test_the_addition_helps_and_nothing_cheaper_does() -> None:
    found = cheapest_addition(cells(DIAGONAL), ["n_active", "tokens"])
    assert found is not None
    after = standard_errors(
        np.vstack([cells(DIAGONAL), [found.n_active, found.n_total, found.tokens,
                                     found.batch_tokens]])
    )  # fmt: skip
    assert max(after["n_active"], after["tokens"]) <= KNOWN
    assert found.flops == NUM_LRS * 6 * found.n_active * found.tokens
    # The cheapest cell off the diagonal is a small model on few tokens or on many.
    assert found.flops < NUM_LRS * 6 * 4e8 * 8e9
    assert found.n_active / found.tokens != pytest.approx(0.05)


@pytest.mark.parametrize("exponent", ["n_active", "sparsity", "tokens", "batch_tokens"])
def test_a_single_slice_gets_a_second_one(exponent: str) -> None:
    single = cells([(1e8, 8e8, 2e9, 2**17)])
    found = cheapest_addition(single, [exponent])
    assert found is not None
    values = {"n_active": (found.n_active, 1e8), "tokens": (found.tokens, 2e9),
              "sparsity": (found.n_active / found.n_total, 0.125),
              "batch_tokens": (found.batch_tokens, 2**17)}  # fmt: skip
    changed = {name for name, (new, old) in values.items() if not math.isclose(new, old)}
    assert changed == {exponent}
    assert found.tokens >= 500 * found.batch_tokens
    assert found.n_total >= found.n_active


def test_it_says_what_to_run_and_what_it_costs() -> None:
    text = str(Addition(n_active=5e7, n_total=4e8, tokens=2e9, batch_tokens=131_072.0))
    assert text == "3 LRs at 50M of 400M parameters, 2B tokens, batch 131.1K (1.8e18 FLOPs)"


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        (DIAGONAL, "size and token count move together (correlation 1.000)"),
        ([(n, 8e8, 2e9 * i, 2**17 * i) for i, n in ((1, 1e8), (4, 1e8), (2, 2e8))],
         "size and sparsity move together"),
        # Any two of these are free of each other, all three are not: batch = size x tokens.
        ([(a * 1e8, a * 1e8, b * 2e9, a * b * 2**16) for a in (1, 2, 4) for b in (1, 2, 4)],
         "follows from"),
        ([(1e8, 1e8, d, 2**17) for d in (2e9, 4e9)], "one model size only"),
    ],
)  # fmt: skip
def test_every_blind_spot_of_scale_comes_with_a_run(
    rows: list[tuple[float, float, float, float]], note: str
) -> None:
    notes = [one for one in identifiability(make_table(runs(rows))) if note in one]
    assert notes
    assert "; the cheapest that helps: 3 LRs at " in notes[0]
    assert "FLOPs)" in notes[0]


def test_a_full_factorial_needs_nothing() -> None:
    rows = [(n, n, d, b) for n in (1e8, 4e8) for d in (2e9, 8e9) for b in (2**16, 2**18)]
    assert not any("cheapest" in one for one in identifiability(make_table(runs(rows))))


def test_an_optimum_at_the_edge_names_the_lr_to_try() -> None:
    table = runs(DIAGONAL)
    for row in table:
        row["loss"] = 3 - math.log(row["lr"])
    (note,) = [one for one in identifiability(make_table(table)) if "highest" in one]
    assert "in 3 of 3 slices" in note
    assert "first 8.00e-3 at 400M, 8B tokens, batch 131.1K" in note
