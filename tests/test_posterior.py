"""Fit folders: round trip, damage, atomic saving; the convergence gate."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bayeslr.errors import StorageError
from bayeslr.posterior import (
    FIT_FILE,
    LOOP_GATE,
    POSTERIOR_FILE,
    REPORT_GATE,
    RUNS_FILE,
    Posterior,
    load,
    make_posterior,
    settled,
)
from bayeslr.predict import prior_posterior
from bayeslr.runs import RunTable
from tests.model_fixtures import target


@pytest.fixture
def saved(posterior: Posterior, tmp_path: Path) -> Path:
    path = tmp_path / "fit"
    posterior.save(path)
    return path


def test_a_fit_folder_holds_three_files(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == [FIT_FILE, POSTERIOR_FILE, RUNS_FILE]
    info = json.loads((saved / FIT_FILE).read_text())
    assert {"method", "seed", "verdict", "data_hash", "versions", "prior"} <= set(info)
    assert info["prior"]["sha256"]


def test_round_trip(posterior: Posterior, saved: Path) -> None:
    again = load(saved)
    assert again.prior == posterior.prior
    assert again.info["verdict"] == posterior.info["verdict"]
    assert again.runs is not None
    assert posterior.runs is not None
    assert again.runs.data_hash == posterior.runs.data_hash
    assert dict(again.draws.sizes) == dict(posterior.draws.sizes)
    for name in posterior.draws.data_vars:
        assert again.draws[name].dims == posterior.draws[name].dims
        # On disk as float32: 7 figures.
        np.testing.assert_allclose(again.flat(str(name)), posterior.flat(str(name)), rtol=1e-6)
    first, second = (p.predict([target()]).iloc[0] for p in (posterior, again))
    assert second["lr"] == pytest.approx(first["lr"], rel=1e-4)
    assert second["lr_q95"] == pytest.approx(first["lr_q95"], rel=1e-4)


def test_a_prior_alone_round_trips_without_runs(tmp_path: Path) -> None:
    prior_posterior("weak", num_draws=50).save(tmp_path / "prior")
    assert not (tmp_path / "prior" / RUNS_FILE).exists()
    assert load(tmp_path / "prior").runs is None


def damage_truncated(path: Path) -> None:
    data = (path / POSTERIOR_FILE).read_bytes()
    (path / POSTERIOR_FILE).write_bytes(data[: len(data) // 2])


def damage_empty(path: Path) -> None:
    (path / POSTERIOR_FILE).write_bytes(b"")


def damage_no_draws(path: Path) -> None:
    (path / POSTERIOR_FILE).unlink()


def damage_no_runs(path: Path) -> None:
    (path / RUNS_FILE).unlink()


def damage_runs(path: Path) -> None:
    (path / RUNS_FILE).write_bytes((path / RUNS_FILE).read_bytes()[:100])


def damage_json(path: Path) -> None:
    (path / FIT_FILE).write_text((path / FIT_FILE).read_text()[:-20])


def damage_json_list(path: Path) -> None:
    (path / FIT_FILE).write_text("[]")


def damage_no_prior(path: Path) -> None:
    info = json.loads((path / FIT_FILE).read_text())
    del info["prior"]
    (path / FIT_FILE).write_text(json.dumps(info))


def damage_no_method(path: Path) -> None:
    info = json.loads((path / FIT_FILE).read_text())
    del info["method"]
    (path / FIT_FILE).write_text(json.dumps(info))


def damage_binary(path: Path) -> None:
    (path / FIT_FILE).write_bytes(b"\xff\xfe\x00{")


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncated, damage_empty, damage_no_draws, damage_no_runs, damage_runs, damage_json,
        damage_json_list, damage_no_prior, damage_no_method, damage_binary,
    ],
)  # fmt: skip
def test_a_damaged_folder_is_named_with_advice(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(StorageError, match=rf"{saved.name}.*(?s:.*)fit again"):
        load(saved)


def test_another_schema_is_refused(saved: Path) -> None:
    info = json.loads((saved / FIT_FILE).read_text())
    (saved / FIT_FILE).write_text(json.dumps({**info, "schema_version": 99}))
    with pytest.raises(StorageError, match=r"schema version 99, this release reads 6; fit again"):
        load(saved)


def test_draws_of_other_groups_than_the_runs_have_are_refused(
    saved: Path, posterior: Posterior
) -> None:
    """As a release leaves them that put the same runs into other slices."""
    dataclasses.replace(posterior, draws=posterior.draws.isel(slice=slice(1, None))).save(saved)
    with pytest.raises(StorageError, match=r"groups these runs otherwise.*slice: 7 then, 8 now"):
        load(saved)


def test_other_runs_than_the_fitted_are_noticed(saved: Path, posterior: Posterior) -> None:
    runs = posterior.runs
    assert runs is not None
    RunTable(runs.frame.iloc[:-1]).write(saved / RUNS_FILE)
    with pytest.raises(StorageError, match=r"is not the table that was fitted; fit again"):
        load(saved)


@pytest.mark.parametrize("what", ["missing", "empty folder", "file"])
def test_no_fit_folder_at_all(tmp_path: Path, what: str) -> None:
    path = tmp_path / "fit"
    if what == "empty folder":
        path.mkdir()
    elif what == "file":
        path.write_text("hello")
    with pytest.raises(StorageError, match=r"is no fit folder: fit\.json is missing; make one"):
        load(path)


@pytest.mark.parametrize("where", ["runs", "draws"])
def test_a_full_disk_leaves_what_was_there(
    posterior: Posterior, saved: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = (
        (RunTable, "write") if where == "runs" else (type(posterior.draws), "to_netcdf")
    )  # fmt: skip
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(StorageError, match=r"No space left on device; what was there .* untouched"):
        posterior.save(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_rename_that_fails_leaves_what_was_there(
    posterior: Posterior, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = Path.rename, []

    def second_fails(self: Path, to: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(StorageError, match="Input/output error"):
        posterior.save(saved)
    monkeypatch.undo()
    assert load(saved).info["seed"] == posterior.info["seed"]
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_saving_again_replaces_the_fit(posterior: Posterior, saved: Path) -> None:
    (saved / "stray.txt").write_text("of an older release")
    posterior.save(saved)
    assert sorted(p.name for p in saved.iterdir()) == [FIT_FILE, POSTERIOR_FILE, RUNS_FILE]
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_else_is_never_overwritten(
    posterior: Posterior, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "mine"
    if kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
        (path / "precious.txt").write_text("precious")
    with pytest.raises(StorageError, match=r"exists and is no fit folder; choose another name"):
        posterior.save(path)
    assert "precious" in (path if kind == "file" else path / "precious.txt").read_text()


def gated(posterior: Posterior, *, shift: float = 0.0, divergences: float = 0.0) -> Posterior:
    rng = np.random.default_rng(3)
    draws = {name: entry.draw(rng, 2000).reshape(2, 1000)
             for name, entry in posterior.prior.parameters.items()}  # fmt: skip
    draws["lr_tokens"] = draws["lr_tokens"] + np.array([[0.0], [shift]])
    return make_posterior(
        draws, posterior.design, posterior.runs, posterior.prior, method="bayes", seed=1,
        statistics={"divergences": divergences, "seconds": 1.0},
    )  # fmt: skip


def test_the_gate_passes_independent_draws_and_stops_others(posterior: Posterior) -> None:
    # 43 R-hats of independent draws above 1.02: fails 1 in 10,000 seeds; the seed is fixed.
    passed = gated(posterior)
    assert passed.trustworthy
    assert "converged" in passed.info["verdict"]
    apart = gated(posterior, shift=1.0)
    assert not apart.trustworthy
    assert "the chains disagree on lr_tokens" in apart.info["verdict"]
    assert "--draws" in apart.info["verdict"]
    wild = gated(posterior, divergences=500)
    assert not wild.trustworthy
    assert "500 of 2000 transitions diverged" in wild.info["verdict"]


@pytest.mark.parametrize(("name", "judged"), [("lr_opt", True), ("floor", False)])
def test_chains_that_disagree_on_one_slice(name: str, judged: bool) -> None:
    """A report lists each slice's LR*, so that is judged as parameters are."""
    rng = np.random.default_rng(4)
    draws = {"lr_tokens": rng.normal(size=(2, 1000)), name: rng.normal(size=(2, 1000, 3))}
    assert settled(draws, LOOP_GATE, most_draws=8000)
    draws[name][1, :, 2] += 1.0
    assert settled(draws, LOOP_GATE, most_draws=8000) is not judged


@pytest.mark.parametrize(
    ("num_draws", "correlation", "given_up"),
    [(1000, 0.99, False), (2000, 0.99, True), (2000, 0.9, False)],
)
def test_chains_that_will_not_mix_are_given_up(
    num_draws: int, correlation: float, given_up: bool
) -> None:
    """Of two chains of 8,000 draws, 80 are effective at 0.99 and 840 at 0.9; 400 are wanted."""
    draws = np.random.default_rng(2).normal(size=(2, num_draws))
    for i in range(1, num_draws):
        noise = math.sqrt(1 - correlation**2) * draws[:, i]
        draws[:, i] = correlation * draws[:, i - 1] + noise
    chains = {"lr_tokens": draws}
    assert settled(chains, REPORT_GATE, most_draws=8000) is given_up


def test_stuck_chains_are_told(posterior: Posterior) -> None:
    draws = {"lr_tokens": np.repeat(np.random.default_rng(1).normal(size=(2, 10)), 100, axis=1)}
    stuck = make_posterior(
        draws, posterior.design, posterior.runs, posterior.prior, method="bayes", seed=1,
        statistics={},
    )  # fmt: skip
    assert not stuck.trustworthy
