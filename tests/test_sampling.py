"""Fitting: same seed same draws, recovery of the truth, the gate, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bayeslr import sampling
from bayeslr.coordinates import Dense
from bayeslr.errors import DataError, SpecError, UntrustworthyFit
from bayeslr.features import build_design
from bayeslr.models import valley
from bayeslr.models.compiled import compiled_model
from bayeslr.models.simulate import PlannedSlice, card_log_lr, simulate
from bayeslr.nuts import sample
from bayeslr.posterior import Posterior
from bayeslr.priors import OUTPUTS, SLOPES, Prior, load_prior
from bayeslr.runs import RunTable, make_table
from bayeslr.sampling import find_mode, fit, held, padded
from tests.model_fixtures import BATCHES, made_up_runs, run_record, true_log_lr


def test_the_same_seed_gives_the_same_draws_and_chains_differ(
    posterior: Posterior, fit_again: Callable[[int], Posterior]
) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    again = fit_again(1)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    for name in posterior.draws.data_vars:
        np.testing.assert_array_equal(
            posterior.draws[name].to_numpy(), again.draws[name].to_numpy(), err_msg=str(name)
        )
    # The twin: the other chain, of the same key, has other draws.
    first, second = posterior.draws["lr_tokens"].to_numpy()
    assert not np.array_equal(first, second)


def test_all_outputs_are_there_in_the_sizes_of_the_data(posterior: Posterior) -> None:
    design = posterior.design
    assert design is not None
    sizes = design.sizes
    assert design.num_shared == 0
    assert "shared_noise" not in posterior.draws
    assert design.covariates == ()
    for name, levels in OUTPUTS.items():
        if {"shared", "covariate"} & set(levels):
            continue
        for level, size in zip(levels, posterior.draws[name].shape[2:], strict=True):
            assert size == (len(SLOPES) if level == "slope" else sizes[level]), name
    assert all(bool(np.isfinite(v).all()) for v in posterior.draws.data_vars.values())


def test_the_optima_of_the_slices_are_recovered(posterior: Posterior) -> None:
    design = posterior.design
    assert design is not None
    x = design.slice_features()
    truth = [
        true_log_lr(*np.exp([n, d, b]))
        for n, d, b in zip(x["log_n_active"], x["log_tokens"], x["log_batch"], strict=True)
    ]
    draws = posterior.flat("lr_opt")
    z = (draws.mean(axis=0) - truth) / draws.std(axis=0)
    # Eight slices within 4 posterior sds: fails 1 in 2,000 tables if calibrated; the seed is fixed.
    assert np.abs(z).max() < 4
    assert draws.std(axis=0).max() < 0.25
    # The twin: the card's own optima, 0.3 lower, are told from the truth.
    card = posterior.prior
    by_card = [
        card_log_lr(card, *np.exp([n, n - s, d, b])) for n, s, d, b in zip(*x.values(), strict=True)
    ]
    assert np.abs((draws.mean(axis=0) - by_card) / draws.std(axis=0)).max() > 4


def test_diagnostics_are_kept(posterior: Posterior) -> None:
    diagnostics = posterior.info["diagnostics"]
    assert diagnostics["num_chains"] == 2
    assert diagnostics["max_r_hat"] < 1.2
    assert 0.4 < diagnostics["mean_acceptance"] <= 1.0
    assert diagnostics["seconds"] > 0


def test_an_unknown_method_is_refused(table: RunTable) -> None:
    with pytest.raises(SpecError, match=r"method must be one of bayes, two-stage, got 'magic'"):
        fit(table, method="magic")


def test_an_unknown_card_is_refused(table: RunTable) -> None:
    with pytest.raises(SpecError, match=r"no prior card 'nope'; the shipped cards are"):
        fit(table, "nope")


@pytest.mark.parametrize("method", ["bayes", "two-stage"])
def test_all_diverged_is_refused_before_anything_is_sampled(method: str) -> None:
    rows = [run_record(f"r{i}", 1e8, 2e9, 1e5, 10 ** (-2 + i / 4), None) for i in range(4)]
    with pytest.raises(DataError, match=r"all 4 runs diverged.*lower LR"):
        fit(make_table(rows), method=method)


def test_one_size_only_says_whose_the_exponent_is(card: Prior) -> None:
    one = fit(made_up_runs(sizes=(1e8,)), card, method="two-stage", num_draws=50)
    assert any(
        "one model size only" in note and "size exponent is not estimated" in note
        for note in one.info["identifiability"]
    )
    two = fit(made_up_runs(), card, method="two-stage", num_draws=50)
    assert not any("one model size" in note for note in two.info["identifiability"])
    assert not any("prior's" in note for note in one.info["identifiability"])


@pytest.mark.slow
def test_the_search_ends_near_a_mode_where_runs_are_few() -> None:
    """Three LRs a slice: with the noise's slopes free, or one search, it ended 800 nats away."""
    card = load_prior("no-steplaw")
    layout = [
        PlannedSlice(family="f", n_active=n, n_total=8 * n, tokens=tokens, batch_tokens=batch,
                     num_lrs=3)
        for n in (6e7, 1.2e8, 2.4e8, 4.8e8)
        for tokens, batch in ((2e9, 2**16), (8e9, 2**18), (3.2e10, 2**20))
    ]  # fmt: skip
    runs = simulate(card, layout, np.random.default_rng(4)).runs
    arrays = valley.model_data(build_design(runs), None)
    compiled = compiled_model(arrays, card, 1)
    mode, curvature = find_mode(compiled, arrays, card)
    still = np.concatenate(list(held(compiled).values()))
    np.testing.assert_array_equal(mode[still], compiled.start[still])
    value, _ = compiled.value_and_grad(mode, tuple(arrays.values()))
    assert value < 0
    assert np.linalg.eigvalsh(curvature.matrix)[0] > -10


def test_the_search_learns_how_far_off_runs_scatter() -> None:
    """By over half of their excess here, which the card holds for improbable."""
    card = load_prior("moe-default")
    entry = dataclasses.replace(card["noise_share"], location=0.6, scale=0.01)
    noisy = dataclasses.replace(card, parameters={**card.parameters, "noise_share": entry})
    layout = [
        PlannedSlice(family="f", n_active=n, n_total=8 * n, tokens=tokens, batch_tokens=2**17,
                     num_lrs=8)
        for n in (3e7, 1.2e8, 4.8e8) for tokens in (2e9, 8e9)
    ]  # fmt: skip
    made = simulate(noisy, layout, np.random.default_rng(1))
    arrays = valley.model_data(build_design(made.runs), None)
    compiled = compiled_model(arrays, card, 1)
    mode, _ = find_mode(compiled, arrays, card)
    found = compiled.draws(mode[None, None], tuple(arrays.values()))
    assert 0.3 < float(found["noise_share"][0, 0]) < 1.2
    assert np.abs(found["lr_opt"][0, 0] - made.truth["lr_opt"]).max() < 0.3


def test_the_search_comes_back_from_where_the_density_overflows() -> None:
    """A larger shape that came out far worse drives an exponent off; there it used to end."""
    card = load_prior("moe-default")
    losses = (3.739, 3.622, 3.522, 3.450, 3.417, 3.443)
    rows = [
        run_record(f"a{i}", 1e5, 4e5, 4096.0, 1e-3 * 2**i, loss) for i, loss in enumerate(losses)
    ]
    runs = make_table([*rows, run_record("b", 3e5, 1.6e6, 4096.0, 1e-3, 7.0)], source="made-up")
    design = build_design(runs)
    arrays = valley.model_data(design, padded(design.sizes))
    compiled = compiled_model(arrays, card, 1)
    mode, curvature = find_mode(compiled, arrays, card)
    assert np.linalg.eigvalsh(curvature.matrix)[0] > 0
    assert np.abs(mode[compiled.index("loss_ratio")]).max() < 5


def test_a_density_that_is_nowhere_a_number_is_refused() -> None:
    runs = made_up_runs(sizes=(3e7,), batches=BATCHES[:1])
    arrays = valley.model_data(build_design(runs))
    compiled = compiled_model(arrays, load_prior("moe-default"), 1)
    mode, as_it_is = compiled.start.copy(), Dense(np.eye(compiled.size))
    mode[compiled.index("log_loss_slope")] = 1e3
    with pytest.raises(UntrustworthyFit, match="no mode of the posterior was found"):
        find_mode(compiled, arrays, load_prior("moe-default"), mode)
    with pytest.raises(UntrustworthyFit, match="no chain can begin there"):
        sample(
            compiled, arrays, mode, as_it_is, lambda draws: pytest.fail("no draw was made"),
            seed=1, num_warmup=1, num_draws=1, num_chains=2,
        )  # fmt: skip


def test_a_table_too_large_for_dense_coordinates_has_the_same_posterior(
    posterior: Posterior, fit_again: Callable[[int], Posterior], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bayeslr.sampling._MOST_DENSE", 50)
    tree = fit_again(1)
    for name in ("lr_opt", "lr_tokens", "noise_sd"):
        one, other = (p.flat(name).reshape(-1, p.flat(name)[0].size) for p in (posterior, tree))
        assert not np.array_equal(one, other[: len(one)])
        # Either mean is of 60 effective draws at least: five standard errors of their difference.
        apart = np.abs(one.mean(axis=0) - other.mean(axis=0)) / one.std(axis=0)
        assert apart.max() < 5 * np.sqrt(2 / 60), name
        assert other.std(axis=0) == pytest.approx(one.std(axis=0), rel=0.35)


def test_one_lr_in_every_slice_is_said(posterior: Posterior) -> None:
    from bayeslr.runs import identifiability

    (note,) = [n for n in identifiability(made_up_runs(offsets=(0.0,))) if "one LR only" in n]
    assert "at least 3 LRs" in note
    assert not any("one LR only" in note for note in posterior.info["identifiability"])


def test_padded_sizes_grow_by_coarse_steps() -> None:
    sizes = [padded({"run": n, "family": 3}) for n in range(1, 400)]
    assert all(p["run"] >= n for n, p in enumerate(sizes, start=1))
    assert {p["family"] for p in sizes} == {3}
    assert len({p["run"] for p in sizes}) < 30


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"num_chains": 1}, "num_chains must be a whole number, at least 2, got 1"),
        ({"num_draws": 0}, "num_draws must be a whole number, at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number, at least 0, got -1"),
    ],
)
def test_counts_that_cannot_work_are_refused(how: dict[str, int], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        fit(made_up_runs(), **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(("mixes", "fits"), [(True, [True]), (False, [True, False])])
def test_a_refit_that_does_not_mix_is_made_again_with_all_draws(
    monkeypatch: pytest.MonkeyPatch, mixes: bool, fits: list[bool]
) -> None:
    calls: list[bool] = []

    def stand_in(*_: Any, fast: bool = False, **__: Any) -> SimpleNamespace:
        calls.append(fast)
        return SimpleNamespace(trustworthy=mixes)

    monkeypatch.setattr(sampling, "fit", stand_in)
    assert sampling.refit(made_up_runs(), "moe-default", seed=1).trustworthy is mixes
    assert calls == fits


def test_a_path_is_no_run_table() -> None:
    with pytest.raises(SpecError, match=r"got str; bayeslr.read_runs"):
        fit("runs.parquet")  # type: ignore[arg-type]
