"""Predictions: quantiles, distance, levels, the recommended LR, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import pytest

from bayeslr.errors import DataError, SpecError, UntrustworthyFit
from bayeslr.features import build_design
from bayeslr.laws import linex
from bayeslr.models.simulate import PlannedSlice, simulate
from bayeslr.pointwise import log_edge
from bayeslr.posterior import Posterior, make_posterior
from bayeslr.predict import (
    EDGE_COLUMNS,
    QUANTILE_COLUMNS,
    _Thinned,
    edge_octaves,
    p_diverge,
    predict,
    prior_posterior,
    read_targets,
    recommended_log_lr,
    regret,
    regret_draws,
    slice_target,
    target_draws,
)
from bayeslr.priors import Prior, load_prior
from bayeslr.sampling import fit
from bayeslr.specs import Target
from bayeslr.units import format_lr
from tests.model_fixtures import BATCHES, SIZES, SPARSITY, TOKENS, target

KNOWN = {
    "n_active": SIZES[1], "n_total": SPARSITY * SIZES[1], "tokens": TOKENS[1],
    "batch_tokens": BATCHES[1],
}  # fmt: skip


def ladder() -> list[float]:
    return [1.0, 3.0, 10.0, 30.0, 100.0, 1000.0]


def test_quantiles_are_ordered_and_columns_complete(posterior: Posterior) -> None:
    table = predict(posterior, [target(f"t{x}", tokens=8e9 * x) for x in ladder()])
    quantiles = table[list(QUANTILE_COLUMNS)].to_numpy()
    assert (np.diff(quantiles, axis=1) > 0).all()
    assert ((table["lr"] > table["lr_q05"]) & (table["lr"] < table["lr_q95"])).all()
    assert (table["regret_mean"] > 0).all()
    assert (table["regret_q95"] >= table["regret_mean"]).all()
    assert table["p_diverge"].between(0, 1).all()
    assert (table["extra_tokens"] > 0).all()
    assert table["target_id"].tolist() == [f"t{x}" for x in ladder()]


def test_the_edge_is_where_half_of_the_runs_diverge(posterior: Posterior) -> None:
    table = predict(posterior, [target("a"), target("b", tokens=8e11)])
    assert (np.diff(table[list(EDGE_COLUMNS)].to_numpy(), axis=1) > 0).all()
    at = target_draws(posterior, [target()])
    for octaves, wanted in ((0.0, 0.5), (1.0, 2 / 3), (-1.0, 1 / 3)):
        # With a width of one an octave above the edge doubles the odds.
        one = dataclasses.replace(at, edge_width=np.ones_like(at.edge_width))
        log_lr = at.log_edge[7] + octaves * math.log(2.0)
        assert edge_octaves(one, log_lr)[7] == pytest.approx(-octaves, abs=1e-12)
        assert p_diverge(one, log_lr)[7] == pytest.approx(wanted)


def test_a_measured_slice_has_one_edge_as_a_target_and_as_runs(posterior: Posterior) -> None:
    assert posterior.design is not None
    for s in range(posterior.design.num_slices):
        at = target_draws(posterior, [slice_target(posterior, s)])
        as_runs = log_edge(posterior, np.array([s]), posterior.thinned(len(at.log_edge)))
        np.testing.assert_allclose(at.log_edge, as_runs, atol=1e-3)


def test_draws_that_are_no_numbers_are_refused(posterior: Posterior) -> None:
    broken = dataclasses.replace(posterior, draws=posterior.draws.copy(deep=True))
    broken.draws["lr_level"][0, 3] = np.nan
    with pytest.raises(UntrustworthyFit, match="draws of the optimal LR that are no numbers"):
        predict(broken, [target()])


def test_intervals_widen_with_the_distance_from_the_data(posterior: Posterior) -> None:
    table = predict(posterior, [
        target(f"t{x}", tokens=8e9 * x, n_active=1.2e8 * x, n_total=9.6e8 * x,
               batch_tokens=524_288.0 * math.sqrt(x))
        for x in ladder()
    ])  # fmt: skip
    width = np.log(table["lr_q95"] / table["lr_q05"]).to_numpy()
    # Each step widens by far more than the 3 % that 400 draws leave open.
    assert (np.diff(width) > 0).all()
    assert (np.diff(table["extrapolation"]) > 0).all()
    # Regret need not grow at every step, for valleys flatten with tokens; outside it is higher.
    regret_mean = table["regret_mean"].to_numpy()
    assert (regret_mean[1:] > 5 * regret_mean[0]).all()


def test_a_known_slice_uses_its_own_effects(posterior: Posterior) -> None:
    design = posterior.design
    assert design is not None
    at = target_draws(posterior, [target(**KNOWN), target(**{**KNOWN, "batch_tokens": 3e5})])
    x = design.slice_features()
    (s,) = np.flatnonzero(
        np.isclose(x["log_n_active"], math.log(SIZES[1]))
        & np.isclose(x["log_tokens"], math.log(TOKENS[1]))
        & np.isclose(x["log_batch"], math.log(BATCHES[1]))
    )
    kept = posterior.flat("lr_opt")[:, s]
    np.testing.assert_array_equal(np.sort(at.log_lr[:, 0]), np.sort(kept)[: len(at.log_lr)])
    np.testing.assert_array_equal(at.floor[:, 0], posterior.flat("floor")[:, s])
    # The twin: another batch is a new slice, with a new effect.
    assert at.log_lr[:, 1].std() > at.log_lr[:, 0].std()
    assert predict(posterior, [target(**KNOWN)])["extrapolation"].iloc[0] == 0


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # one draw has no R-hat
def test_each_family_is_stated_where_its_own_runs_are() -> None:
    """A new horizon of the second family, without scatter, against the law by hand."""
    card = load_prior("moe-default")
    layout = [
        PlannedSlice(family=family, n_active=n, n_total=8 * n, tokens=d, batch_tokens=b, num_lrs=4)
        for family, n, d in (("a", 3e7, 1e9), ("a", 6e7, 4e9), ("b", 4e8, 2e10), ("b", 4e8, 8e10))
        for b in (131_072.0, 1_048_576.0 if family == "b" else 262_144.0)
    ]
    drawn = simulate(card, layout, np.random.default_rng(5))
    scatter = {n: 0.0 for n in drawn.truth if n.endswith("_sd")}
    truth = {**drawn.truth, **scatter}
    draws = {name: np.asarray(value)[None, None] for name, value in truth.items()}
    design = build_design(drawn.runs)
    posterior = make_posterior(
        draws, design, drawn.runs, card, method="bayes", seed=1, statistics={}
    )
    size, tokens, batch = 4e8, 3e11, 524_288.0
    goal = Target(
        target_id="t", family="b", n_active=size, n_total=8 * size, tokens=tokens,
        batch_tokens=batch,
    )  # fmt: skip
    at = target_draws(posterior, [goal])

    own_batch = np.mean(np.log([131_072.0, 1_048_576.0]))
    own_tokens, mid = np.mean(np.log([2e10, 8e10])), posterior.info["centre"]
    far = math.log(tokens) - own_tokens
    d_n, d_d = math.log(size) - mid["log_n_active"], math.log(tokens) - mid["log_tokens"]
    best_batch = (
        truth["best_batch_level"][1] + truth["best_batch_n_active"] * d_n
        + truth["best_batch_tokens"] * d_d
    )  # fmt: skip
    bowl = linex(math.log(batch) - best_batch, truth["penalty_skew"]) - linex(
        own_batch - best_batch, truth["penalty_skew"]
    )
    shape = int(np.flatnonzero(design.family_of_shape == 1)[0])
    by_tokens = np.expm1(-truth["loss_exponent_tokens"][1] * far)
    floor = (
        truth["loss_level"][1] + truth["loss_shape"][shape] + truth["loss_tokens"][1] * by_tokens
        + truth["penalty_scale"][1] * np.exp(truth["penalty_tokens"] * d_d) * bowl
    )  # fmt: skip
    assert at.floor[0, 0] == pytest.approx(floor, rel=1e-9)
    left = truth["loss_tokens"][1] * (1 + by_tokens)
    assert at.loss_tokens[0, 0] == pytest.approx(left, rel=1e-9)


def test_a_new_slice_draws_the_floor_that_is_its_own(posterior: Posterior) -> None:
    """A new slice's loss is as uncertain as the model says: acquisition leans on it."""
    design = posterior.design
    assert design is not None
    at = target_draws(posterior, [target(**{**KNOWN, "batch_tokens": 262_144.0})])
    draws = {str(n): posterior.flat(str(n)) for n in posterior.draws.data_vars}
    c = int(
        np.flatnonzero(
            np.isclose(design.log_tokens, math.log(TOKENS[1]))
            & np.isclose(design.log_n_active[design.shape_of_cell], math.log(SIZES[1]))
        )[0]
    )
    z = math.log(262_144.0) - draws["best_batch"][:, c]
    d_d = math.log(TOKENS[1]) - posterior.info["centre"]["log_tokens"]
    skew = draws["penalty_skew"]
    bowl = (np.expm1(skew * z) - skew * z) / skew**2
    law = draws["loss_cell"][:, c] + draws["penalty_scale"][:, 0] * bowl * np.exp(
        draws["penalty_tokens"] * d_d
    )
    share = np.std((at.floor[:, 0] - law) / draws["loss_slice_sd"])
    # One standard normal a draw, at least 400: 5 standard errors, fails 1 in 1.7 million seeds.
    assert share == pytest.approx(1.0, abs=5 / math.sqrt(2 * len(law)))


def test_equal_targets_and_repeated_calls_agree(posterior: Posterior) -> None:
    first = target_draws(posterior, [target("a"), target("b")]).log_lr
    again = target_draws(posterior, [target("b")]).log_lr
    np.testing.assert_array_equal(first[:, 0], first[:, 1])
    np.testing.assert_array_equal(first[:, 0], again[:, 0])


def test_a_target_is_answered_alike_whatever_else_is_asked(posterior: Posterior) -> None:
    """The last of 300: it has another place among them, and in another pass."""
    many = [target(f"t{i}", tokens=4.8e10 * 1.01**i) for i in range(300)]
    together, alone = predict(posterior, many), predict(posterior, many[-1:])
    numbers = alone.select_dtypes("number").columns
    # Sums in single precision depend on how many stand beside each other.
    assert together[numbers].iloc[-1].tolist() == pytest.approx(alone[numbers].iloc[0], rel=1e-4)
    both = target_draws(posterior, [*many[:3], many[-1]]).log_lr
    np.testing.assert_array_equal(both[:, 3], target_draws(posterior, many[-1:]).log_lr[:, 0])


def test_what_is_new_of_two_groups_is_independent(posterior: Posterior) -> None:
    new = _Thinned(posterior, 2000).normals("lr_shape_sd", [(0.0, 19.0 + i) for i in range(200)])
    error = 1 / math.sqrt(len(new))
    apart = np.corrcoef(new.T)[np.triu_indices(200, 1)]
    # 19,900 correlations within 6 standard errors: fails 1 in 25,000 seeds.
    assert np.abs(apart).max() < 6 * error
    assert new.mean(axis=0).std() == pytest.approx(error, rel=0.25)
    assert new.std() == pytest.approx(1.0, abs=0.02)


def test_an_unseen_family_is_predicted_at_population_level(posterior: Posterior) -> None:
    table = predict(
        posterior, [target("a"), target("b", family="unseen"), target("c", family=None)]
    )
    assert table["level"].tolist() == ["family", "population", "family"]
    width = np.log(table["lr_q95"] / table["lr_q05"])
    assert width[1] > width[0]
    assert "population level" in table["sentence"].iloc[1]
    assert "population level" not in table["sentence"].iloc[0]
    assert math.isnan(table["loss_q50"].iloc[1])
    assert math.isfinite(table["loss_q50"].iloc[0])


def test_each_unseen_family_has_effects_of_its_own(posterior: Posterior) -> None:
    card_alone = prior_posterior("moe-default", num_draws=2000)
    for fitted, sd in ((posterior, posterior.flat("lr_family_sd")),
                       (card_alone, card_alone.flat("lr_family_sd"))):  # fmt: skip
        one, other, again = target_draws(
            fitted, [target(f"t{i}", family=name) for i, name in enumerate(("a", "b", "a"))]
        ).log_lr.T
        np.testing.assert_array_equal(one, again)
        alone = target_draws(fitted, [target("t", family="b")]).log_lr[:, 0]
        np.testing.assert_array_equal(other, alone)
        # Levels alone set two families so far apart; 2,000 draws tell an sd within 10 %.
        assert (one - other).std() > 0.9 * math.sqrt(2 * (sd**2).mean())


def test_another_parameter_convention_is_refused(posterior: Posterior) -> None:
    with pytest.raises(DataError, match=r"counts total parameters, the fitted runs non_embedding"):
        predict(posterior, [target(param_convention="total")])


def test_no_target_is_refused(posterior: Posterior) -> None:
    with pytest.raises(DataError, match="no target to predict"):
        predict(posterior, [])


@pytest.mark.parametrize("growth", [1.0, 30.0])
def test_the_recommended_lr_has_the_least_expected_regret(
    posterior: Posterior, growth: float
) -> None:
    planned = [target(tokens=8e9 * growth, n_active=1.2e8 * growth, n_total=9.6e8 * growth)]
    at = target_draws(posterior, planned)
    best = recommended_log_lr(at)
    grid = np.linspace(*np.quantile(at.log_lr[:, 0], [0.001, 0.999]), 1500)
    cost = np.array([regret_draws(at, np.array([x])).mean() for x in grid])
    chosen = float(regret_draws(at, best).mean())
    assert chosen <= cost.min() * (1 + 1e-3) + 1e-7
    # The twin: the median of LR* costs more, because the high side is steeper.
    assert float(regret_draws(at, np.median(at.log_lr, axis=0)).mean()) >= chosen


def test_regret_is_zero_at_the_optimum_and_grows_away(posterior: Posterior) -> None:
    at = target_draws(posterior, [target()])
    safe = dataclasses.replace(at, log_edge=np.full_like(at.log_edge, np.inf))
    at_optimum = regret_draws(dataclasses.replace(safe, log_lr=np.zeros_like(at.log_lr)),
                              np.zeros(1))  # fmt: skip
    np.testing.assert_allclose(at_optimum, 0, atol=1e-12)
    row = predict(posterior, [target()]).iloc[0]
    mean = [regret(posterior, [target()], row["lr"] * f).mean() for f in (0.25, 0.5, 1, 2, 4)]
    assert min(mean) == mean[2]
    assert mean[0] > mean[1]
    assert mean[4] > mean[3]


def test_diverging_is_never_cheaper_than_a_run_that_ends(posterior: Posterior) -> None:
    """The second training pays for its LR as well: no far LR is a way out."""
    far = target(n_active=1e12, n_total=1e13, tokens=1e14)
    at = target_draws(posterior, [far])
    middle = float(np.median(at.log_lr))
    above = [regret_draws(at, np.array([middle + u])) for u in np.arange(0.0, 8.0, 0.25)]
    ended = [
        regret_draws(dataclasses.replace(at, log_edge=np.full_like(at.log_edge, np.inf)),
                     np.array([middle + u]))
        for u in np.arange(0.0, 8.0, 0.25)
    ]  # fmt: skip
    assert all((a >= e).all() for a, e in zip(above, ended, strict=True))
    mean = np.array([a.mean() for a in above])
    assert (np.diff(mean[8:]) > -1e-12).all()


def test_regret_takes_one_lr_or_one_a_target(posterior: Posterior) -> None:
    targets = [target("a"), target("b", tokens=1e10)]
    both = regret(posterior, targets, [1e-3, 2e-3])
    assert both.shape[1] == 2
    np.testing.assert_array_equal(both[:, 0], regret(posterior, targets, 1e-3)[:, 0])
    with pytest.raises(SpecError, match="3 LRs for 2 targets"):
        regret(posterior, targets, [1e-3, 2e-3, 4e-3])
    for wrong in (0.0, -1e-3, math.nan):
        with pytest.raises(SpecError, match=r"lr must be > 0 and finite.*not its log"):
            regret(posterior, targets, wrong)


def test_a_single_target_is_told_to_be_a_list(posterior: Posterior) -> None:
    doors = (posterior.predict, posterior.covariates, lambda one: posterior.regret(one, 1e-3))
    for door in doors:
        with pytest.raises(SpecError, match="put it in brackets"):
            door(target())
        with pytest.raises(SpecError, match=r"a target is a bayeslr\.Target, got dict"):
            door([{"n_active": 1e9}])
    with pytest.raises(DataError, match="no target"):
        posterior.regret([], 1e-3)


def test_a_target_rounded_as_people_do_is_the_measured_slice(posterior: Posterior) -> None:
    rounded = {name: value * 1.001 for name, value in KNOWN.items()}
    exact, near = predict(posterior, [target("a", **KNOWN), target("b", **rounded)]).to_dict(
        "records"
    )
    assert (near["lr"], near["lr_q05"]) == pytest.approx((exact["lr"], exact["lr_q05"]), rel=1e-3)
    assert "inside the range of the runs" in near["sentence"]


def test_a_target_below_the_data_says_so(posterior: Posterior) -> None:
    table = predict(posterior, [
        target("below", n_active=3e6, n_total=2.4e7, tokens=1e8, batch_tokens=131_072.0),
        target("above"),
    ])  # fmt: skip
    assert "below them in size and tokens" in table["sentence"].iloc[0]
    assert "below them" not in table["sentence"].iloc[1]
    assert (table["extrapolation"] > 0).all()


def test_runs_without_a_range_are_no_unit_of_distance(posterior: Posterior) -> None:
    """The made-up runs have one sparsity: twice as sparse is one factor of two away."""
    table = predict(posterior, [target(**{**KNOWN, "n_total": 16 * SIZES[1]}), target("far")])
    assert table["extrapolation"].iloc[0] == pytest.approx(1.0)
    said = "1.0 times the runs' own range (a factor of two where it is narrower) beyond them"
    assert said in table["sentence"].iloc[0]
    assert "narrower" not in table["sentence"].iloc[1]


def test_a_target_is_below_the_runs_of_its_own_family(card: Prior) -> None:
    layout = [
        PlannedSlice(family=family, n_active=n, n_total=8 * n, tokens=tokens, batch_tokens=2**17,
                     num_lrs=5)
        for family, sizes in (("small", (3e7, 6e7)), ("large", (3e8, 6e8)))
        for n in sizes for tokens in (4e9, 8e9)
    ]  # fmt: skip
    runs = simulate(card, layout, np.random.default_rng(1)).runs
    found = predict(fit(runs, card, method="two-stage"), [
        target(family, family=family, n_active=1e8, n_total=8e8, tokens=5e9, batch_tokens=2.0**17)
        for family in ("small", "large")
    ])  # fmt: skip
    assert list(found["extrapolation"] > 0) == [True, True]
    assert ["below them in size" in text for text in found["sentence"]] == [False, True]


def test_the_sentence_can_be_quoted(posterior: Posterior) -> None:
    row = predict(posterior, [target()]).iloc[0]
    for part in ("600M active of 4.8B", "48B tokens", format_lr(row["lr"]), "90 % probability",
                 "nats", "more tokens", "divergence"):  # fmt: skip
        assert part in row["sentence"]


def test_the_prior_alone_says_that_no_run_was_used() -> None:
    row = predict(prior_posterior("moe-default", num_draws=500), [target()]).iloc[0]
    assert math.isinf(row["extrapolation"])
    assert "no run of yours" in row["sentence"]


def test_two_thousand_targets_are_predicted_at_once(posterior: Posterior) -> None:
    rng = np.random.default_rng(1)
    many = [target(f"t{i}", tokens=10 ** rng.uniform(9, 12), n_active=10 ** rng.uniform(7, 9.6))
            for i in range(2000)]  # fmt: skip
    started = time.process_time()
    table = predict(posterior, many)
    seconds = time.process_time() - started
    assert len(table) == 2000
    assert table["target_id"].tolist() == [t.target_id for t in many]
    # 2 s of one core here; a loop over targets and draws would take minutes.
    assert seconds < 20
    alone = predict(posterior, many[:1]).iloc[0]
    assert table["lr_q50"].iloc[0] == pytest.approx(alone["lr_q50"], rel=0.05)


def test_effects_of_the_prior_are_those_of_the_card(card: object) -> None:
    """Population draws at the reference have the card's total sd of ln LR*."""
    posterior = prior_posterior("moe-default", num_draws=4000)
    prior = posterior.prior
    planned = target(
        family=None, batch_tokens=math.exp(prior["best_batch_intercept"].location),
        **prior.reference,
    )  # fmt: skip
    log_lr = target_draws(posterior, [planned], max_draws=4000).log_lr[:, 0]
    draws = {str(n): posterior.flat(str(n)) for n in posterior.draws.data_vars}
    parts = [
        np.mean(draws[f"lr_{level}_sd"] ** 2) for level in ("family", "shape", "cell", "slice")
    ]
    least = math.sqrt(prior["lr_intercept"].scale ** 2 + sum(parts))
    assert least * 0.95 < log_lr.std() < least * 1.35


def targets_csv(folder: Path, text: str) -> Path:
    path = folder / "targets.csv"
    path.write_text("target_id,n_active,n_total,tokens,batch_tokens,family,seq_len\n" + text)
    return path


def test_targets_are_read(tmp_path: Path) -> None:
    path = targets_csv(tmp_path, "a,1e9,8e9,1e11,1e6,made-up,4096\nb,1e9,8e9,1e11,1e6,,\n")
    first, second = read_targets(path)
    assert (first.target_id, first.family, first.seq_len) == ("a", "made-up", 4096)
    assert (second.family, second.seq_len) == (None, None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,1e9,8e9,1e11,1e6,x,1\na,1e9,8e9,1e11,1e6,x,1\n", r"target_id 'a' stands twice"),
        ("a,big,8e9,1e11,1e6,x,1\n", r"line 2: n_active must be a number such as .* got 'big'"),
        ("a,1e9,8e8,1e11,1e6,x,1\n", r"line 2: .*n_active .* must not exceed n_total"),
        ("a,1e9,8e9,1e11,-1,x,1\n", r"line 2: batch_tokens must be finite and > 0"),
        ("a,1e9,8e9,1e6,1e7,x,1\n", r"line 2: .*batch_tokens .* must not exceed tokens"),
        ("a,1.3,12,500,4,x,\n", r"line 2: .*1.3 are too few for 500 tokens; .* 1.3B, not 1.3"),
        ("a,1.3B,12B,500,4,x,\n", r"line 2: .*500 are too few for 1.3e\+09 .* 500B, not 500"),
        ("a,1.3B,12B,500e18,4M,x,\n", r"line 2: .*tokens must not exceed 1e\+16, got 5e\+20"),
        ("a,1.3B,12B,500B,1024,x,\n", r"line 2: .*did you mean sequences\? Multiply"),
    ],
)
def test_broken_targets_are_told_with_their_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_targets(targets_csv(tmp_path, text))


def test_targets_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    first, second = read_targets(
        targets_csv(tmp_path, "7,1.3B,12B,500B,4M,1,\nb,1e9,8e9,1e11,1e6,,8\n")
    )
    assert (first.target_id, first.family, first.n_active) == ("7", "1", 1.3e9)
    assert (second.family, second.seq_len) == (None, 8)


@pytest.mark.parametrize(
    ("header", "row", "told"),
    [
        ("target_id,n_active,n_total,tokens,batch_tokens", "a,1e9,8e9,,1e6", "2: tokens is empty"),
        ("target_id,n_active,n_total,tokens,batch_tokens,n_experts", "a,1e9,8e9,1e11,1e6,8.7",
         r"2: n_experts must be a whole number, got '8\.7'"),
        ("target_id,n_active,n_total,tokens,batch_tokens,famliy", "a,1e9,8e9,1e11,1e6,f",
         "'famliy' is not known; is it 'family'"),
        ("target_id,n_active,n_total,token,batch_tokens", "a,1e9,8e9,1e11,1e6",
         "'tokens' is missing; .* rename 'token'"),
        ("target_id,n_active,n_total,tokens,batch_tokens", "a,1e9,8e9", "as many cells"),
    ],
)  # fmt: skip
def test_cells_and_headers_are_told(tmp_path: Path, header: str, row: str, told: str) -> None:
    path = tmp_path / "targets.csv"
    path.write_text(f"{header}\n{row}\n")
    with pytest.raises(DataError, match=told):
        read_targets(path)


def test_targets_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_targets(tmp_path / "none.csv")
    (tmp_path / "some.csv").write_text("target_id,n_active\na,1\n")
    with pytest.raises(DataError, match=r"column 'n_total' is missing; needed: target_id"):
        read_targets(tmp_path / "some.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_targets(tmp_path / "empty.csv")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read"):
        read_targets(tmp_path / "bad.parquet")
