"""Calibration: its own statistics against known answers, one small run, and the real thing."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from bayeslr import calibration
from bayeslr.calibration import (
    Calibration,
    TableResult,
    calibrate,
    effective_draws,
    random_layout,
    rank_share,
)
from bayeslr.errors import DataError, SpecError
from bayeslr.models.simulate import PlannedSlice, simulate
from bayeslr.priors import Prior


def result_of(pit: np.ndarray[Any, Any], *, inside: bool = True) -> Calibration:
    """A calibration whose ranks are known, (table, quantity)."""
    tables = tuple(
        TableResult(
            pit={f"q{j}": float(x) for j, x in enumerate(row)}, inside=np.full((2, 2), inside),
            width=np.ones(2), num_runs=40, num_diverged=2, max_r_hat=1.0, min_ess=100.0,
            divergences=0.0, seconds=1.0,
        )
        for row in pit
    )  # fmt: skip
    return Calibration("weak", "valley", 1, tables)


def test_uniform_ranks_pass_and_others_do_not() -> None:
    rng = np.random.default_rng(3)
    uniform = rng.random((100, 20))
    # The test's own false alarm, 1 in 100; the seed is fixed.
    assert result_of(uniform).uniform
    narrow = uniform.copy()
    narrow[:, 4] = rng.beta(0.4, 0.4, size=100)  # Intervals too narrow: ranks pile up at the ends.
    shifted = uniform.copy()
    shifted[:, 7] = rng.beta(2.0, 1.0, size=100)
    wide = uniform.copy()
    wide[:, 9] = rng.beta(3.0, 3.0, size=100)
    for ranks, name in ((narrow, "q4"), (shifted, "q7"), (wide, "q9")):
        broken = result_of(ranks)
        assert not broken.uniform
        assert name in broken.verdict()
        assert "NOT uniform" in broken.verdict()


def test_false_alarms_are_as_rare_as_stated() -> None:
    rng = np.random.default_rng(5)
    p_values = np.concatenate(
        [list(result_of(rng.random((50, 40))).p_values.values()) for _ in range(5)]
    )
    share = float(np.mean(p_values < 0.05))
    # 200 p-values: 5 standard errors of 0.015 above 0.05.
    assert share < 0.05 + 5 * np.sqrt(0.05 * 0.95 / 200)
    # The twin: ranks of intervals that are half as wide as they should be.
    narrow = result_of(rng.beta(0.3, 0.3, size=(50, 40)))
    assert np.mean(np.array(list(narrow.p_values.values())) < 0.05) > 0.9


def test_effective_draws_of_known_chains() -> None:
    rng = np.random.default_rng(1)
    independent = rng.normal(size=(2, 5000))
    assert effective_draws(independent) == pytest.approx(10_000, rel=0.15)
    rho, chain = 0.9, np.empty((2, 5000))
    chain[:, 0] = rng.normal(size=2)
    for i in range(1, 5000):
        chain[:, i] = rho * chain[:, i - 1] + np.sqrt(1 - rho**2) * rng.normal(size=2)
    assert effective_draws(chain) == pytest.approx(10_000 * (1 - rho) / (1 + rho), rel=0.35)
    assert effective_draws(np.array([[0.0] * 50, [9.0] * 50])) < 5


def test_ranks_of_autocorrelated_draws_are_uniform() -> None:
    """Without thinning they pile up at the ends, which would fail a sampler that is right."""
    rng = np.random.default_rng(2)
    rho, num_tables = 0.95, 200
    thinned, raw = [], []
    for _ in range(num_tables):
        # The chain and the truth share one distribution: the rank is uniform.
        walk = np.empty((2, 300))
        walk[:, 0] = rng.normal(size=2)
        for i in range(1, 300):
            walk[:, i] = rho * walk[:, i - 1] + np.sqrt(1 - rho**2) * rng.normal(size=2)
        truth = float(rng.normal())
        thinned.append(rank_share(walk, truth, rng))
        raw.append(float((walk < truth).mean()))
    ends = [np.mean((np.array(r) < 0.02) | (np.array(r) > 0.98)) for r in (thinned, raw)]
    # 4 % expected of 200: 4 standard errors of 1.4 %.
    assert ends[0] < 0.04 + 4 * np.sqrt(0.04 * 0.96 / num_tables)
    assert ends[1] > ends[0]


@pytest.mark.parametrize("num_runs", [20, 60, 200])
def test_layouts_are_such_as_users_make(card: Prior, num_runs: int) -> None:
    rng = np.random.default_rng(4)
    for num_families in (1, 2):
        for _ in range(10):
            layout = random_layout(card, num_runs, num_families, rng)
            total = sum(s.num_lrs * s.repeats for s in layout)
            assert 3 <= total <= 208
            assert len({s.family for s in layout}) == num_families
            assert layout[0].num_lrs >= 3
            for trunk in {s.trunk for s in layout} - {None}:
                mine = [s for s in layout if s.trunk == trunk]
                assert len({(s.n_active, s.batch_tokens, s.num_lrs, s.step) for s in mine}) == 1
                assert [s.tokens for s in mine] == sorted({s.tokens for s in mine})


def test_tables_hold_what_the_card_allows_and_repeat_with_their_seed(card: Prior) -> None:
    first, again = (calibration._drawn(card, 60, 1, np.random.default_rng(8))[0] for _ in range(2))
    assert first.runs.data_hash == again.runs.data_hash
    assert len(first.runs.quarantine) == 0
    design = calibration.build_design(first.runs)
    assert first.truth["lr_opt"].shape == (design.sizes["slice"],)


@pytest.mark.parametrize(("num_runs", "told"), [(20, 17), (60, 49), (200, 90)])
def test_tables_hold_about_as_many_runs_as_is_said(card: Prior, num_runs: int, told: int) -> None:
    rng = np.random.default_rng(6)
    held = [
        sum(s.num_lrs * s.repeats for s in random_layout(card, num_runs, 1, rng))
        for _ in range(400)
    ]
    assert max(held) <= 208
    # The log of a table's runs has an sd of 0.7 at most: 4 standard errors are 0.14.
    assert abs(np.log(held).mean() - np.log(told)) < 0.14
    assert calibrate.__doc__ is not None
    assert str(told) in calibrate.__doc__


def test_every_fourth_of_many_tables_has_two_families(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def stand_in(*_: Any, num_families: int, **__: Any) -> TableResult:
        asked.append(num_families)
        return result_of(np.full((1, 1), 0.5)).tables[0]

    monkeypatch.setattr(calibration, "one_table", stand_in)
    calibrate("weak", num_tables=20)
    assert asked == [1, 1, 1, 2] * 5
    asked.clear()
    calibrate("weak", num_tables=19)
    assert asked == [1] * 19


def test_a_planned_slice_that_no_run_table_takes_is_refused(card: Prior) -> None:
    """Set aside in silence, it would shift the truth of every slice after it."""
    fine = PlannedSlice(
        family="f", n_active=3e7, n_total=3e7, tokens=2e9, batch_tokens=131_072.0, num_lrs=3
    )
    short = dataclasses.replace(fine, n_active=6e7, n_total=6e7, tokens=1e5)
    other = dataclasses.replace(fine, n_active=1.2e8, n_total=1.2e8)
    told = r"1 of 3 planned slices .*tokens must not be below batch_tokens.*\(layout, line 2\)"
    with pytest.raises(DataError, match=re.compile(told, re.DOTALL)):
        simulate(card, [fine, short, other], np.random.default_rng(1))
    assert len(simulate(card, [fine, other], np.random.default_rng(1)).runs) == 6


class Checker(HTMLParser):
    """Counts plots and refuses anything that is not on the page itself."""

    def __init__(self) -> None:
        super().__init__()
        self.plots = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.plots += tag == "svg"
        assert tag not in ("script", "link", "img")
        assert not any(name in ("src", "href") for name, _ in attrs)


def test_a_small_run_answers_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_NUM_WARMUP", 60)
    monkeypatch.setattr(calibration, "_NUM_DRAWS", 40)
    monkeypatch.setattr(calibration, "_MAX_ROUNDS", 1)
    result = calibrate("moe-default", num_tables=2, num_runs=20, seed=3)
    document = json.loads(json.dumps(result.document(), allow_nan=False))
    assert document["num_tables"] == 2
    assert set(document["coverage"]) == {"near", "far", "all"}
    assert "LR* far" in document["p_values"]
    assert len(document["p_values"]) > 55
    assert all(0 < x < 1 for name in result.names for x in result.pit(name))
    # The document has them to four figures.
    assert all(0 <= x <= 1 for ranks in document["ranks"].values() for x in ranks)
    assert "Coverage of LR*" in result.text()
    page = Checker()
    page.feed(result.html())
    assert page.plots == len(document["p_values"])


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(SpecError, match=r"model must be one of valley, two-stage, twin-shifted,"):
        calibrate("weak", model="magic")
    with pytest.raises(SpecError, match=r"num_tables must be at least 2, got 1"):
        calibrate("weak", num_tables=1)
    with pytest.raises(SpecError, match=r"num_runs must be at most 208, got 209; no larger table"):
        calibrate("weak", num_runs=209)


def test_a_twin_is_said_to_be_caught_or_not() -> None:
    ranks = np.random.default_rng(3).random((60, 5))
    missed = dataclasses.replace(result_of(ranks), model="twin-apart")
    assert missed.verdict().startswith(
        "It is NOT caught, as a wrong model should be. Ranks are uni"
    )
    ranks[:, 2] = ranks[:, 2] ** 4
    caught = dataclasses.replace(result_of(ranks), model="twin-noisy")
    assert caught.verdict().startswith("It is caught")
    assert "0.02 nats of noise" in caught.text()


def test_a_twin_is_not_told_what_rows_share(card: Prior) -> None:
    layout = [
        PlannedSlice(family="f", n_active=3e7, n_total=3e7, tokens=d, batch_tokens=131_072.0,
                     num_lrs=4, repeats=2, trunk="t")
        for d in (2e9, 4e9)
    ]  # fmt: skip
    runs = simulate(card, layout, np.random.default_rng(2)).runs
    told = calibration.build_design(runs)
    apart = calibration.build_design(
        calibration._recorded(runs, "twin-apart", np.random.default_rng(1))
    )
    assert (told.num_shared, apart.num_shared) == (8 + 4, 0)
    np.testing.assert_array_equal(np.sort(told.loss), np.sort(apart.loss))


@pytest.mark.calibration
def test_least_squares_is_judged_by_its_lr_alone() -> None:
    """Its intervals are too narrow: 60 simulated tables tell so."""
    found = calibrate("moe-default", num_tables=60, num_runs=60, seed=1, model="two-stage")
    assert found.names == ("LR* near", "LR* far")
    # A third of 120 optima in the 50 % intervals: 3.7 standard errors below half.
    assert found.coverage()["all"]["0.5"] < 0.5 - 3 * np.sqrt(0.25 / 120)
    assert not found.uniform
    assert "least squares" in found.text()


@pytest.mark.calibration
@pytest.mark.timeout(7200)
def test_the_posterior_is_calibrated_and_its_twins_are_not() -> None:
    # False alarm: 1 in 100 over all quantities (Calibration.false_alarm); the seed is fixed.
    right = calibrate("moe-default", num_tables=40, num_runs=60, seed=1)
    assert right.uniform, right.text()
    coverage = right.coverage()["all"]
    # 80 targets, two a table and so at worst 40 independent: 4 standard errors.
    assert abs(coverage["0.9"] - 0.9) < 4 * np.sqrt(0.09 / 40)
    assert abs(coverage["0.5"] - 0.5) < 4 * np.sqrt(0.25 / 40)
    # Not twin-apart: so few tables have too few rows that share noise to catch it (docs/log.md).
    for twin in ("twin-shifted", "twin-noisy"):
        wrong = calibrate("moe-default", num_tables=20, num_runs=60, seed=1, model=twin)
        assert not wrong.uniform, wrong.text()
