"""How long a user waits: the door, the help, predictions, the report."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from bayeslr.posterior import Posterior
from bayeslr.predict import predict, prior_posterior
from bayeslr.report import render
from bayeslr.specs import Target


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return prior_posterior("moe-default")


def targets(number: int) -> list[Target]:
    return [
        Target(
            target_id=str(i), n_active=1e9 * (1 + i / number), n_total=1e10, tokens=5e11,
            batch_tokens=4e6,
        )
        for i in range(number)
    ]  # fmt: skip


@pytest.mark.parametrize("code", ["import bayeslr", "import bayeslr.cli"])
def test_import(benchmark: Any, code: str) -> None:
    benchmark.pedantic(subprocess.run, args=([sys.executable, "-c", code],), rounds=5)


def test_bare_interpreter(benchmark: Any) -> None:
    """What of `test_import` is Python's own."""
    benchmark.pedantic(subprocess.run, args=([sys.executable, "-c", "pass"],), rounds=5)


@pytest.mark.parametrize("number", [1, 1000])
def test_predict(benchmark: Any, posterior: Posterior, number: int) -> None:
    chosen = targets(number)
    assert len(benchmark.pedantic(predict, args=(posterior, chosen), rounds=3)) == number


def test_report(benchmark: Any, posterior: Posterior) -> None:
    html = benchmark.pedantic(render, args=(posterior, targets(1)), rounds=3)
    assert html.startswith("<!doctype html>")
