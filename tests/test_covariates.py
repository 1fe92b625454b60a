"""Weight decay and LR multipliers beside the LR: told by the runs, tried by a sweep, reported."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from bayeslr import acquire, laws
from bayeslr.cli import app
from bayeslr.cli.plan import _lines
from bayeslr.covariates import covariate_table, log_ratio
from bayeslr.errors import SpecError
from bayeslr.features import Design, build_design
from bayeslr.loop.early import early_ends
from bayeslr.models import two_stage
from bayeslr.models.simulate import PlannedSlice, simulate
from bayeslr.posterior import Posterior, load
from bayeslr.predict import predict, prior_posterior
from bayeslr.priors import PER_COVARIATE, Prior, load_prior
from bayeslr.report import report
from bayeslr.report.stability import octaves_below, slice_edges
from bayeslr.runner_protocol import Trial, spec_row
from bayeslr.runs import RunTable, make_table
from bayeslr.sampling import fit
from bayeslr.space import (
    Candidate,
    candidates,
    covariates_tried,
    line_of,
    repeats,
    start_design,
    trials_in,
)
from bayeslr.specs import Recipe, parse_recipe, recipe_document
from bayeslr_runners.command import CommandRunner
from tests.fakes import toy_recipe
from tests.model_fixtures import (
    BATCHES,
    SIZES,
    SPARSITY,
    TOKENS,
    made_up_runs,
    never_diverging,
    run_record,
    target,
    true_log_lr,
)

SHIFT, OPTIMUM, CURVATURE = 0.4, 0.8, 0.008


def tried_runs() -> RunTable:
    """The made-up runs, and each middle LR at two other router multipliers and weight decays."""
    table = made_up_runs()
    rows: list[dict[str, Any]] = [
        {**row, "weight_decay": 0.1} for row in table.frame.to_dict("records")
    ]
    rng = np.random.default_rng(3)
    for n in SIZES:
        for d in TOKENS:
            for i, z in enumerate((-1.4, 1.4)):
                lr = true_log_lr(n, d, BATCHES[i])
                u = 0.3 * (2 * i - 1) + SHIFT * z
                loss = 2.0 + 0.4 * (n / 6e7) ** -0.34 + 0.4 * (d / 4e9) ** -0.32
                loss += 2 * 0.02 * (math.expm1(0.4 * u) - 0.4 * u) / 0.4**2
                loss += CURVATURE * ((z - OPTIMUM) ** 2 - OPTIMUM**2) + 1e-3 * rng.normal()
                rows.append(run_record(
                    f"m{len(rows)}", n, d, BATCHES[i], math.exp(lr + u - SHIFT * z), loss,
                    weight_decay=0.1, lr_multiplier_router=math.exp(z),
                ))  # fmt: skip
    return make_table(rows, source="made-up")


@pytest.fixture(scope="module")
def told() -> Posterior:
    return fit(tried_runs(), "moe-default", seed=1, fast=True)


def test_what_differs_within_a_slice_is_a_covariate() -> None:
    design = build_design(tried_runs())
    assert design.covariates == ("lr_multiplier_router",)  # weight decay is the same everywhere
    assert design.covariate_reference.tolist() == [[1.0]]
    assert (~design.at_reference).sum() == 8
    off = design.covariate_of_run[~design.at_reference, 0]
    np.testing.assert_allclose(np.sort(np.unique(off.round(6))), [-1.4, 1.4])


def designed(*weight_decays: float | None, batches: tuple[float, ...] = (1e5,)) -> Design:
    rows = [
        run_record(f"{i}{j}", 1e8, 2e9, b, 1e-3 * 2**i, 3.0, weight_decay=w)
        for j, b in enumerate(batches)
        for i, w in enumerate(weight_decays)
    ]
    return build_design(make_table(rows))


def test_the_reference_is_what_most_runs_have_and_none_is_a_tenth_of_the_least() -> None:
    design = designed(0.1, 0.3, 0.1, 0.0, None)
    assert design.covariate_reference.tolist() == [[0.1]]
    wanted = [0.0, math.log(3), 0.0, math.log(0.01 / 0.1), 0.0]
    np.testing.assert_allclose(design.covariate_of_run[:, 0], wanted, atol=1e-12)


def test_a_family_that_states_no_weight_decay_has_the_reference_of_the_table() -> None:
    given = {"varied": (0.1, 0.3, 0.1), "silent": (None,) * 3, "without": (0.0,) * 3}
    design = build_design(make_table([
        run_record(f"{family}{i}", 1e8, 2e9, 1e5, 1e-3 * 2**i, 3.0, weight_decay=w, family=family)
        for family, values in given.items() for i, w in enumerate(values)
    ]))  # fmt: skip
    at = dict(zip(design.families, design.covariate_reference[:, 0].tolist(), strict=True))
    assert at == {"varied": 0.1, "silent": 0.1, "without": pytest.approx(0.01)}
    silent, without = (design.families.index(name) for name in ("silent", "without"))
    assert log_ratio(design, "weight_decay", 0.3, silent) == pytest.approx(math.log(3))
    assert log_ratio(design, "weight_decay", 0.0, without) == 0.0


def test_a_covariate_that_a_family_does_not_vary_has_no_row(
    told: Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told.design is not None
    assert len(covariate_table(told, [target()])) == 1
    same = np.zeros_like(told.design.covariate_of_run)
    monkeypatch.delattr("bayeslr.covariates.target_draws")  # nothing is drawn for it
    design = dataclasses.replace(told.design, covariate_of_run=same)
    assert covariate_table(dataclasses.replace(told, design=design), [target()]).empty


def test_no_weight_decay_at_all_is_said_to_have_been_tried(told: Posterior) -> None:
    """Here the least multiplier stands for none."""
    assert told.design is not None
    least = covariate_table(told, [target()]).iloc[0]["tried_low"]
    assert least == pytest.approx(math.exp(-1.4))
    design = dataclasses.replace(told.design, covariate_least=np.array([[least]]))
    row = covariate_table(dataclasses.replace(told, design=design), [target()]).iloc[0]
    assert row["tried_low"] == 0.0
    assert "(tried: 0 to 4.06)" in row["sentence"]


def test_what_differs_between_slices_alone_is_none() -> None:
    rows = [run_record(f"{b}{i}", 1e8, 2e9, b, 1e-3 * 2**i, 3.0, weight_decay=w)
            for b, w in ((1e5, 0.1), (2e5, 0.3)) for i in range(3)]  # fmt: skip
    design = build_design(make_table(rows))
    assert design.covariates == ()
    assert design.at_reference.all()


def test_runs_at_other_weight_decays_share_no_trunk() -> None:
    rows = [run_record(f"{i}", 1e8, 2e9, 1e5, 1e-3, 3.0, schedule="wsd", seed=0, weight_decay=w)
            for i, w in enumerate((0.1, 0.1, 0.3))]  # fmt: skip
    assert build_design(make_table(rows)).trunk_of_run.tolist() == [0, 0, -1]


def test_terms_of_covariates() -> None:
    p = {"covariate_shift": np.array([0.5, 0.1]), "covariate_optimum": np.array([1.0, 0.0]),
         "covariate_n_active": np.array([0.2, 0.0]),
         "covariate_curvature": np.array([0.01, 0.02])}  # fmt: skip
    shift, off_best, of_reference = laws.covariate_terms(np.array([2.0, 1.0]), -1.0, p)
    assert shift == pytest.approx(1.1)
    assert off_best == pytest.approx(0.01 * 1.2**2 + 0.02)
    assert of_reference == pytest.approx(0.01 * 0.8**2)


def test_the_best_value_is_found_and_the_lr_is_that_of_the_reference(told: Posterior) -> None:
    assert told.trustworthy, told.info["verdict"]
    row = covariate_table(told, [target()]).to_dict("records")[0]
    assert row["best_q05"] < math.exp(OPTIMUM) < row["best_q95"]
    assert row["gain_mean"] == pytest.approx(CURVATURE * OPTIMUM**2, rel=0.5)
    assert row["lr_factor"] == pytest.approx(math.exp(-SHIFT * OPTIMUM), rel=0.2)
    assert row["reference"] == 1.0
    assert "lr_multiplier_router for big" in row["sentence"]
    at = target(n_active=SIZES[0], n_total=SPARSITY * SIZES[0], tokens=TOKENS[0],
                batch_tokens=BATCHES[0])  # fmt: skip
    known = predict(told, [at]).iloc[0]
    true = math.exp(true_log_lr(SIZES[0], TOKENS[0], BATCHES[0]))
    assert known["lr_q05"] / 1.1 < true < known["lr_q95"] * 1.1


def test_a_stop_is_judged_at_the_covariates_of_the_run(told: Posterior) -> None:
    """At four times the multiplier the best LR of the slice is lower by 4 ** SHIFT."""
    best = math.exp(true_log_lr(SIZES[0], TOKENS[0], BATCHES[0]))
    stopped = []
    for name, lr, options in (
        ("plain", best, {}), ("plain-low", best / 4**SHIFT, {}),
        ("router", best, {"lr_multipliers": {"router": 4.0}}),
        ("router-low", best / 4**SHIFT, {"lr_multipliers": {"router": 4.0}}),
    ):  # fmt: skip
        run = dataclasses.replace(offered(0.0).spec, run_id=name, lr=lr, options=options)
        seen = {**spec_row(run), "tokens": run.tokens / 2, "loss": 3.0, "status": "pruned"}
        stopped.append(Trial(number=0, spec=run, state="pruned", flops=1.0, records=[seen]))
    known = told.draws.assign(covariate_shift=told.draws["covariate_shift"] * 0 + SHIFT)
    sure = dataclasses.replace(told, draws=known)
    assert early_ends(stopped, sure).wrongful == ("plain", "router-low")


def test_the_report_says_how_far_below_the_edge_a_run_off_the_reference_was(
    told: Posterior,
) -> None:
    edges = slice_edges(told)
    assert edges is not None
    assert told.design is not None
    octaves = octaves_below(told, edges)
    plain = (edges[:, told.design.slice_of_run] - told.design.log_lr) / math.log(2.0)
    at = told.design.at_reference
    np.testing.assert_array_equal(octaves[:, at], plain[:, at])
    # A higher multiplier stands for a higher LR: the edge is nearer by SHIFT z.
    nearer = (plain - octaves)[1, ~at] * math.log(2.0)
    wanted = SHIFT * told.design.covariate_of_run[~at, 0]
    np.testing.assert_allclose(nearer, wanted, atol=0.2)


def test_no_weight_decay_at_all_can_be_a_candidate(posterior: Posterior) -> None:
    pool = [
        dataclasses.replace(c, spec=dataclasses.replace(c.spec, run_id=f"{c.spec.run_id}{w}",
                                                        weight_decay=w))
        for c in (offered(-0.7), offered(0.7)) for w in (0.1, 0.03, 0.0)
    ]  # fmt: skip
    plan = acquire.choose(posterior, pool, [target()], num_runs=6, budget_flops=1e18, seed=1,
                          only_paying=False)  # fmt: skip
    assert {p.spec.weight_decay for p in plan.proposals} >= {0.0}
    none = log_ratio(designed(0.1, 0.1, 0.3), "weight_decay", 0.0, 0)
    assert none == pytest.approx(math.log(0.1))


def test_a_family_that_was_not_seen_has_no_row(told: Posterior) -> None:
    assert covariate_table(told, [target(family="other")]).empty


def test_a_fit_without_covariates_says_nothing(posterior: Posterior) -> None:
    assert covariate_table(posterior, [target()]).empty
    assert not set(PER_COVARIATE) & set(posterior.draws.data_vars)


def test_the_fit_folder_the_command_and_the_report_tell_it(told: Posterior, tmp_path: Path) -> None:
    told.save(tmp_path / "fit")
    again = load(tmp_path / "fit")
    first, second = (p.covariates([target()]) for p in (told, again))
    np.testing.assert_allclose(first["gain_mean"], second["gain_mean"], rtol=1e-3)
    flags = ["--n-active", "600M", "--n-total", "4.8B", "--tokens", "48B", "--batch-tokens", "1M"]
    shown = CliRunner().invoke(app, ["predict", str(tmp_path / "fit"), *flags])
    assert shown.exit_code in (0, 4)
    assert "lr_multiplier_router for target" in shown.output
    alone = CliRunner().invoke(
        app, ["predict", str(tmp_path / "fit"), *flags, "--covariates", "--json"]
    )
    assert '"covariate": "lr_multiplier_router"' in alone.output
    page = report(told, tmp_path / "report.html", targets=[target()]).read_text(encoding="utf-8")
    assert "Beside the LR" in page
    assert "off the reference (beside the LR) not shown" in page


def test_least_squares_looks_at_the_reference_alone() -> None:
    both, alone = build_design(tried_runs()), build_design(made_up_runs())
    for mixed, plain in zip(two_stage.vertices(both), two_stage.vertices(alone), strict=True):
        np.testing.assert_allclose(mixed, plain)


def opened(**changes: Any) -> tuple[Recipe, CommandRunner]:
    changes = {"space__weight_decay": [0.1, 0.3],
               "space__lr_multipliers": {"router": [0.25, 4.0]}, **changes}  # fmt: skip
    recipe = parse_recipe(toy_recipe(**changes))
    return recipe, CommandRunner(recipe.options)


def test_a_space_tries_one_covariate_at_a_time() -> None:
    recipe, runner = opened()
    assert covariates_tried(recipe) == [
        {}, {"weight_decay": 0.3}, {"lr_multiplier_router": 0.25}, {"lr_multiplier_router": 4.0},
    ]  # fmt: skip
    pool = candidates(recipe, runner)
    assert len({p.spec.run_id for p in pool}) == len(pool) == 4 * 2 * 2 * 13
    specs = {p.spec.run_id: p.spec for p in pool}
    assert len({line_of(spec) for spec in specs.values()}) == 4 * 2 * 13
    router = next(s for s in specs.values() if "router4" in s.run_id)
    assert router.options["lr_multipliers"] == {"router": 4.0}
    assert spec_row(router)["lr_multiplier_router"] == 4.0
    assert all(p.spec.covariates == {"weight_decay": 0.1} for p in start_design(recipe, runner))
    assert parse_recipe(recipe_document(recipe)) == recipe


def test_what_a_table_measured_beside_the_lr_is_no_candidate_again() -> None:
    recipe, runner = opened()
    spec = next(p.spec for p in candidates(recipe, runner)
                if "router4" in p.spec.run_id and p.spec.tokens == 400_000)  # fmt: skip
    rows = [{**spec_row(spec), "tokens": t, "loss": 3.0, "status": "ok"} for t in spec.decay_at]
    strange = {**rows[-1], "run_id": "x", "lr_multiplier_router": 2.0}
    trials = trials_in(make_table([*rows, strange], source="made"), recipe, runner)
    assert [line_of(t.spec) for t in trials] == [line_of(spec)]
    left = {line_of(p.spec) for p in candidates(recipe, runner, trials)}
    assert line_of(spec) not in left
    (again,) = repeats(recipe, runner, trials)
    assert (again.spec.covariates, again.spec.seed) == (spec.covariates, spec.seed + 1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"space__lr_multipliers": {"gate": [2.0]}}, "gate"),
        ({"space__lr_multipliers": {"router": [0.0]}}, "lr_multiplier_router"),
        ({"space__weight_decay": [0.1, -1]}, "weight_decay"),
        ({"space__lr_multipliers": [2.0]}, "table of lists"),
        ({"options__lr_multipliers": {"router": 0.0}}, r"\[options\]: lr_multipliers must be"),
    ],
)
def test_what_cannot_be_tried_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        opened(**changes)


def offered(u: float, **multipliers: float) -> Candidate:
    """A run of a measured slice, at ``u`` over its optimum."""
    recipe = parse_recipe(toy_recipe())
    spec = candidates(recipe, CommandRunner(recipe.options))[0].spec
    return Candidate(flops=1e15, spec=dataclasses.replace(
        spec, run_id=f"{u}{multipliers}", family="made-up", tokens=int(TOKENS[0]), decay_at=(),
        batch_tokens=int(BATCHES[0]), n_active=int(SIZES[0]), n_total=int(SPARSITY * SIZES[0]),
        lr=math.exp(true_log_lr(SIZES[0], TOKENS[0], BATCHES[0]) + u),
        options={"lr_multipliers": multipliers} if multipliers else {},
    ))  # fmt: skip


def test_what_is_not_known_of_a_multiplier_is_worth_a_run(posterior: Posterior) -> None:
    goals = [target()]
    known = [offered(0.0), offered(0.7)]
    calm = never_diverging(posterior)
    plain = acquire._Beliefs(calm, known, goals, np.ones(1), seed=1)
    tried = acquire._Beliefs(calm, [*known, offered(0.0, router=4.0)], goals, np.ones(1), seed=1)
    assert plain.goal.shape[1] == 1
    assert tried.goal.shape[1] == 2
    # More is to be known of the target, and the run at the other multiplier tells it.
    assert tried.regret() > plain.regret()
    falls = tried.falls()[:, 0]
    assert falls[2] > 2 * max(falls[0], falls[1])
    before = tried.regret()
    tried.observe(2)
    assert tried.regret() < before - 0.5 * falls[2]
    assert tried.changed(2) == {"lr_multiplier_router": 4.0}


def test_a_card_alone_can_choose_among_multipliers() -> None:
    pool = [offered(u, **more) for u in (-0.7, 0.0, 0.7) for more in ({}, {"router": 4.0})]
    plan = acquire.choose(
        prior_posterior("moe-default"), pool, [target()], num_runs=6, budget_flops=1e18, seed=1,
        only_paying=False,
    )  # fmt: skip
    told = [i for i, p in enumerate(plan.proposals, start=1) if "router 4" in p.reason]
    assert told
    printed = [line.split() for line in _lines(plan, []) if "  with " in line]
    assert printed == [[f"{i}", "with", "lr_multiplier_router", "4"] for i in told]
    assert plan.regret_after < plan.regret_now


def test_simulated_runs_carry_weight_decays_and_the_truth_of_them(card: Prior) -> None:
    layout = [
        PlannedSlice(family="f", n_active=n, n_total=n, tokens=2e9, batch_tokens=2e5, num_lrs=6,
                     weight_decay=(0.1, 0.1, 0.3))
        for n in (5e7, 2e8)
    ]  # fmt: skip
    drawn = simulate(card, layout, np.random.default_rng(5))
    assert build_design(drawn.runs).covariates == ("weight_decay",)
    assert all(drawn.truth[name].shape == (1, 1) for name in PER_COVARIATE)
    usual = [PlannedSlice(family="f", n_active=5e7, n_total=5e7, tokens=2e9, batch_tokens=2e5,
                          num_lrs=6)]  # fmt: skip
    assert "covariate_shift" not in simulate(card, usual, np.random.default_rng(5)).truth


def test_the_card_names_all_that_covariates_need() -> None:
    assert set(PER_COVARIATE) <= set(load_prior("weak").parameters)
