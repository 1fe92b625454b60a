"""Leave the largest cells out: what is left out, what is scored, what is said."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bayeslr.features import build_design, usable_rows
from bayeslr.holdout import _enough, _limits, _num_cells, leave_largest_out
from bayeslr.posterior import Posterior
from bayeslr.predict import prior_posterior
from bayeslr.priors import Prior
from bayeslr.runs import RunTable, make_table
from bayeslr.verdicts import NO_HOLDOUT, verdict_lines, warnings_of, with_verdicts
from tests.model_fixtures import made_up_runs, run_record


def test_the_largest_cells_of_each_family_are_left_out(table: RunTable) -> None:
    frame = pd.concat([table.frame, table.frame.assign(family="other")], ignore_index=True)
    frame.loc[frame["family"] == "other", "n_active"] *= 10
    limits = _limits(frame)
    assert limits["made-up"] == pytest.approx(6 * 1.2e8 * 8e9 / 1.5)
    assert limits["other"] == pytest.approx(6 * 1.2e9 * 8e9 / 1.5)
    one_cell = frame[(frame["n_active"] == 1.2e9) & (frame["tokens"] == 8e9)]
    both = pd.concat([table.frame, one_cell], ignore_index=True)
    assert math.isinf(_limits(both)["other"])
    assert _limits(both)["made-up"] == limits["made-up"]


def test_too_few_runs_cannot_be_held_out(
    table: RunTable, posterior: Posterior, card: Prior
) -> None:
    frame = table.frame
    largest = (frame["n_active"] == 1.2e8) & (frame["tokens"] == 8e9)
    assert _enough(frame, largest.to_numpy())
    assert not _enough(frame, np.zeros(len(frame), dtype=bool))
    few = frame.groupby(["n_active", "tokens"]).head(3)
    assert not _enough(few, largest.loc[few.index].to_numpy())
    assert leave_largest_out(prior_posterior(card, num_draws=50)) is None


def test_a_family_that_loses_nothing_needs_no_finished_run(table: RunTable) -> None:
    lone = table.frame[table.frame["status"] == "diverged"].head(1).assign(family="lone")
    frame = pd.concat([table.frame, lone], ignore_index=True)
    large = (frame["n_active"] == 1.2e8) & (frame["tokens"] == 8e9) & (frame["family"] != "lone")
    assert _enough(frame, large.to_numpy())
    # One that loses all that it had finished cannot be predicted.
    lone = table.frame[table.frame["n_active"] == 1.2e8].assign(family="lone")
    frame = pd.concat([table.frame, lone], ignore_index=True)
    assert not _enough(frame, (frame["n_active"] == 1.2e8).to_numpy())


def far_above(table: RunTable, **how: Any) -> RunTable:
    """The table with one more run, a hundred times the largest."""
    record = run_record("far", 1.2e9, 8e10, 524_288.0, 3e-4, None) | how
    return make_table([*table.frame.to_dict("records"), record])


ABOVE = (
    {"status": "failed"}, {"status": "lost", "tokens": None}, {"status": "pruned"},
    {"status": "partial", "loss": 2.5},
)  # fmt: skip


@pytest.mark.parametrize("how", ABOVE, ids=[str(how["status"]) for how in ABOVE])
def test_a_run_that_shows_no_optimum_sets_no_limit(table: RunTable, how: dict[str, Any]) -> None:
    runs = far_above(table, **how)
    assert len(runs) == len(table) + 1
    used = usable_rows(runs.frame)
    assert len(used) == build_design(runs).num_runs
    assert _limits(used) == _limits(table.frame)


def test_a_run_counts_at_the_tokens_that_it_was_meant_to_reach() -> None:
    """Six that diverged, each elsewhere, are of the two cells that the others are of."""
    rows = [
        run_record(f"r{n:g}-{i}", n, 8e9, 131_072.0, 1e-3 * 2**i, 3.0)
        for n in (3e7, 1.2e8) for i in range(5)
    ] + [
        run_record(f"d{n:g}-{i}", n, 1e9 * i, 131_072.0, 1e-1, None, planned_tokens=8e9)
        for n in (3e7, 1.2e8) for i in (1, 2, 3)
    ]  # fmt: skip
    frame = make_table(rows).frame
    assert math.isinf(_limits(frame)["made-up"])
    assert not _enough(frame, (frame["run_id"] == "r3e+07-0").to_numpy())


def test_what_is_used_is_what_a_fit_uses() -> None:
    """Checkpoints of a run that ended, of one that failed, and of one that goes on."""
    rows = [
        run_record(f"{name}", 3e7, d, 131_072.0, 1e-3, loss, status=status)
        for name, d, loss, status in (
            ("ended", 2e9, 3.2, "partial"), ("ended", 4e9, 3.0, "ok"),
            ("broke", 2e9, 3.2, "partial"), ("broke", 3e9, None, "failed"),
            ("goes on", 2e9, 3.2, "partial"), ("goes on", 3e9, 3.1, "partial"),
            ("pruned", 2e9, None, "pruned"), ("hot", 2e9, None, "diverged"),
        )
    ]  # fmt: skip
    runs = make_table(rows)
    assert len(runs) == len(rows)
    assert len(usable_rows(runs.frame)) == build_design(runs).num_runs


def vaguer(posterior: Posterior, *, trustworthy: bool = True) -> Posterior:
    """The fit with all optima an octave (sd) apart from what they are, all by the same amount.

    trustworthy: whether it converged, whatever the few draws at hand say.
    """
    draws = posterior.draws.copy(deep=True)
    sizes = draws.sizes["chain"], draws.sizes["draw"], 1
    draws["lr_opt"] += math.log(2.0) * np.random.default_rng(5).normal(size=sizes)
    info = {**posterior.info, "trustworthy": trustworthy}
    return dataclasses.replace(posterior, draws=draws, info=info)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, posterior: Posterior) -> list[RunTable]:
    """The tables that a refit was asked for; the fit at hand, vaguer by an octave, stands in."""
    asked: list[RunTable] = []
    refit = vaguer(posterior)

    def stand_in(runs: RunTable, *_: Any, **__: Any) -> Posterior:
        asked.append(runs)
        return refit

    monkeypatch.setattr(importlib.import_module("bayeslr.sampling"), "fit", stand_in)
    return asked


def test_the_check_refits_without_them_and_says_it_plainly(
    posterior: Posterior, kept: list[RunTable]
) -> None:
    found = leave_largest_out(posterior)
    assert found is not None
    (rest,) = kept
    assert not ((rest.frame["n_active"] == 1.2e8) & (rest.frame["tokens"] == 8e9)).any()
    assert found.runs_left_out == 10
    assert len(rest) == 30
    assert found.reach == pytest.approx(4.0)
    assert found.slices == 2
    # The stand-in has seen the slices: it predicts their optima nearly without an error.
    assert found.error_octaves == pytest.approx(0.0, abs=0.2)
    assert found.verdict == "held"
    assert "2 of 2 lie inside the 90 % intervals." in found.sentence
    assert "4.0 times the compute of the rest" in found.sentence


@pytest.mark.parametrize("how", ABOVE, ids=[str(how["status"]) for how in ABOVE])
def test_a_run_that_shows_no_optimum_changes_nothing(
    table: RunTable, posterior: Posterior, kept: list[RunTable], how: dict[str, Any]
) -> None:
    found = leave_largest_out(dataclasses.replace(posterior, runs=far_above(table, **how)))
    assert found is not None
    assert (found.slices, found.reach) == (2, pytest.approx(4.0))
    (rest,) = kept
    assert len(rest) == 30


def test_a_refit_that_did_not_converge_is_told_of(
    posterior: Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for trustworthy in (True, False):
        refit = vaguer(posterior, trustworthy=trustworthy)
        sampling = importlib.import_module("bayeslr.sampling")
        monkeypatch.setattr(sampling, "fit", lambda *_, refit=refit, **__: refit)
        found[trustworthy] = leave_largest_out(posterior)
    right, doubted = found[True], found[False]
    assert right is not None
    assert doubted is not None
    assert "converge" not in right.sentence
    assert "intervals (the fit without them did not converge)." in doubted.sentence
    assert dataclasses.replace(doubted, sentence=right.sentence) == right


def test_checkpoints_of_what_is_left_out_stay_out(
    table: RunTable, posterior: Posterior, kept: list[RunTable]
) -> None:
    end = table.frame[(table.frame["n_active"] == 1.2e8) & (table.frame["tokens"] == 8e9)].iloc[0]
    early = {**end.to_dict(), "tokens": 2e9, "status": "partial", "loss": 3.5, "flops": None}
    runs = make_table([*table.frame.to_dict("records"), early])
    assert len(runs) == len(table) + 1
    assert leave_largest_out(dataclasses.replace(posterior, runs=runs)) is not None
    (rest,) = kept
    assert end["run_id"] not in set(rest.frame["run_id"])


def shifted(posterior: Posterior, slices: Sequence[int], octaves: float) -> Posterior:
    """The fit with the optima of some slices elsewhere."""
    draws = posterior.draws.copy(deep=True)
    draws["lr_opt"][:, :, slices] += octaves * math.log(2.0)
    return dataclasses.replace(posterior, draws=draws)


LARGEST = [6, 7]  # Slices of the made-up table's largest cell.


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    ("octaves", "verdict"), [(0.0, "held"), (1.5, "partly"), (3.0, "missed"), (-3.0, "missed")]
)
def test_an_error_is_judged_by_what_the_fit_expected(
    posterior: Posterior, octaves: float, verdict: str
) -> None:
    """The stand-in expects errors of an octave (one sd), the same in both slices."""
    found = leave_largest_out(shifted(posterior, LARGEST, octaves))
    assert found is not None
    assert found.slices == 2
    assert found.error_octaves == pytest.approx(abs(octaves), abs=0.2)
    assert found.verdict == verdict
    assert ("take them as too narrow" in found.sentence) == (verdict == "missed")


@pytest.mark.usefixtures("kept")
def test_one_slice_alone_can_miss(posterior: Posterior) -> None:
    draws = posterior.draws.copy(deep=True)
    unknown = draws["lr_opt"][:, :, LARGEST[0]]
    unknown += np.random.default_rng(6).normal(size=unknown.shape)
    alone = shifted(dataclasses.replace(posterior, draws=draws), LARGEST[1:], 3.0)
    found = leave_largest_out(alone)
    assert found is not None
    assert (found.slices, found.verdict) == (1, "missed")


def test_an_optimum_that_the_law_alone_places_is_not_scored(
    posterior: Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in knows the optima as well as the fit with their runs: these told nothing."""
    sampling = importlib.import_module("bayeslr.sampling")
    monkeypatch.setattr(sampling, "fit", lambda *_, **__: posterior)
    assert leave_largest_out(posterior) is None


def test_token_counts_of_whole_batches_make_one_cell() -> None:
    rows = [
        run_record(f"r{b:g}-{i}", 3e7, math.ceil(4e9 / b) * b, b, 1e-3 * 2**i, 3.0)
        for b in (131_072.0, 262_144.0, 524_288.0) for i in range(5)
    ]  # fmt: skip
    assert _num_cells(make_table(rows).frame) == 1


@pytest.mark.usefixtures("kept")
def test_every_verdict_is_kept_and_said(posterior: Posterior) -> None:
    checked = with_verdicts(posterior)
    info = checked.info
    assert info["holdout"]["slices"] == 2
    assert info["misfit"]["groups"][0]["name"] == "all runs"
    assert any(one["name"] == "lr_tokens" for one in info["influence"])
    lines = verdict_lines(info)
    assert lines[0] == info["holdout"]["sentence"]
    assert lines[1] == info["misfit"]["sentence"]
    assert "Not touched by the runs" in lines[2]
    assert "holdout" not in with_verdicts(posterior, holdout=False).info
    without = with_verdicts(posterior, holdout=False, why_not="No time.").info
    assert verdict_lines(without)[0] == without["no_holdout"] == "No time."
    assert verdict_lines({**info, "holdout": None})[0] == NO_HOLDOUT


def test_only_failed_checks_are_warned_of(posterior: Posterior) -> None:
    info = {**posterior.info, "trustworthy": True, "verdict": "v"}
    held = {"verdict": "held", "sentence": "h"}
    fits = {"verdict": "fits", "sentence": "m"}
    assert warnings_of({**info, "holdout": held, "misfit": fits}) == []
    assert warnings_of({**info, "holdout": None, "misfit": None}) == []
    assert warnings_of({
        **info, "trustworthy": False, "holdout": {**held, "verdict": "missed"},
        "misfit": {**fits, "verdict": "large"},
    }) == ["v", "h", "m"]  # fmt: skip


@pytest.mark.slow
def test_a_real_refit_predicts_the_largest_cells_of_made_up_runs() -> None:
    """Nine cells of a law inside the card: error under an octave (the valley's own is 0.1)."""
    from bayeslr.sampling import fit

    runs = made_up_runs(sizes=(2e7, 6e7, 1.8e8), tokens=(2e9, 6e9, 1.8e10))
    found = leave_largest_out(fit(runs, "moe-default", fast=True))
    assert found is not None
    assert found.slices >= 1
    assert found.error_octaves < 1.0
