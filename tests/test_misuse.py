"""What programmers get wrong at the public door ends in an error of ours; iterables are lists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayeslr
from bayeslr.errors import BayeslrError, SpecError
from bayeslr.predict import extrapolation, predict, read_targets, regret, target_draws
from bayeslr.runs import concat, make_table
from tests.model_fixtures import made_up_runs, target

MISUSES: dict[str, tuple[Callable[[Any], object], str]] = {
    "no posterior": (lambda _: predict(None, [target()]), "bayeslr.fit"),
    "a folder for a posterior": (lambda _: regret("fit", [target()], 1e-3), "Posterior.load"),
    "no targets": (lambda p: p.predict(None), "targets are a list of bayeslr.Target, got None"),
    "a number for targets": (lambda p: p.regret(3, 1e-3), "list of bayeslr.Target, got 3"),
    "targets of covariates": (lambda p: p.covariates(None), "list of bayeslr.Target"),
    "targets of a distance": (lambda p: extrapolation(p, None), "list of bayeslr.Target"),
    "a path for targets": (lambda p: p.predict("targets.csv"), "bayeslr.Target, got str"),
    "a text for an LR": (lambda p: p.regret([target()], "low"), "lr must be a number"),
    "a generator for LRs": (lambda p: p.regret([target()], iter([1e-3])), "lr must be a number"),
    "no table of targets": (lambda _: read_targets(None), "got NoneType"),
    "no rows": (lambda _: make_table(None), "a row is a mapping"),
    "numbers for rows": (lambda _: make_table([1, 2]), "a row is a mapping"),
    "frames for tables": (lambda _: concat([made_up_runs().frame]), "run tables"),
    "no card": (lambda _: bayeslr.fit(made_up_runs(), None), "prior card"),
    "no seed": (lambda _: bayeslr.fit(made_up_runs(), seed=None), "seed must be"),
    "half a seed": (lambda _: bayeslr.fit(made_up_runs(), seed=1.5), "seed must be"),
    "no fit folder": (lambda _: bayeslr.Posterior.load(None), "got NoneType"),
    "nowhere to save": (lambda p: p.save(None), "got NoneType"),
    "nowhere to write": (lambda _: made_up_runs().write(None), "got NoneType"),
    "no report": (lambda p: bayeslr.report(p, None), "got NoneType"),
    "no recipe": (lambda p: p.plan(None, 1e18), "got NoneType"),
    "no budget": (lambda p: p.plan("quickstart", None), "budget must be a number"),
    "a text for runs": (lambda p: p.plan("quickstart", 1e18, "2"), "num_runs must be"),
    "a table for a recipe": (lambda _: bayeslr.sweep({}, "out"), "got dict"),
    "nowhere to sweep": (lambda _: bayeslr.sweep("quickstart", None), "got NoneType"),
    "a path for a storage": (
        lambda _: bayeslr.sweep("quickstart", "out", storage=Path("a.db")),
        "storage is the URL",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_told_by_an_error_of_ours(name: str, posterior: bayeslr.Posterior) -> None:
    misuse, told = MISUSES[name]
    with pytest.raises(SpecError, match=told):
        misuse(posterior)


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    for read in (bayeslr.read_runs, read_targets):
        with pytest.raises(BayeslrError, match="is a folder; name the file in it"):
            read(tmp_path)


def test_whatever_can_be_gone_through_is_a_list_of_targets(posterior: bayeslr.Posterior) -> None:
    listed = [target("a"), target("b", tokens=1e10)]
    expected = posterior.predict(listed)
    assert posterior.predict(one for one in listed).equals(expected)
    np.testing.assert_array_equal(
        posterior.regret(iter(listed), 1e-3), posterior.regret(listed, 1e-3)
    )
    assert target_draws(posterior, iter(listed)).log_lr.shape[1] == 2
