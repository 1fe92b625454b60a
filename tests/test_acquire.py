"""Choosing runs: informative before useless, within the budget, never twice, and when to stop."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from bayeslr import acquire
from bayeslr.acquire import Plan, Proposal, _Beliefs, choose, plan, propose
from bayeslr.errors import SpecError
from bayeslr.posterior import Posterior
from bayeslr.predict import prior_posterior
from bayeslr.runner_protocol import find_runner, spec_row
from bayeslr.runs import make_table
from bayeslr.space import Candidate, candidates
from bayeslr.specs import RunSpec, Target, parse_recipe
from tests.fakes import toy_recipe
from tests.model_fixtures import (
    BATCHES,
    SIZES,
    SPARSITY,
    TOKENS,
    never_diverging,
    target,
    true_log_lr,
)


def candidate(run_id: str, n: float = 5e8, d: float = 1.6e10, b: float = 524_288.0,
              u: float = 0.0, flops: float = 1e15, **more: Any) -> Candidate:  # fmt: skip
    """A run at ``u`` in ln LR over the true optimum of its slice."""
    spec = RunSpec(
        run_id=run_id, family="made-up", runner="table", lr=math.exp(true_log_lr(n, d, b) + u),
        tokens=int(d), batch_tokens=int(b), n_active=int(n), n_total=int(SPARSITY * n),
        seq_len=1024, **more,
    )  # fmt: skip
    return Candidate(spec=spec, flops=flops)


def known(run_id: str, u: float = 0.0, **more: Any) -> Candidate:
    """A run in a slice that was measured."""
    return candidate(run_id, n=SIZES[0], d=TOKENS[0], b=BATCHES[0], u=u, **more)


# A thousand times the compute of the largest made-up run and more: many proxies pay there.
GOAL = [target(n_active=6e9, n_total=4.8e10, tokens=1.2e12, batch_tokens=4_194_304.0)]


def ids(proposals: list[Proposal] | tuple[Proposal, ...]) -> list[str]:
    return [p.spec.run_id for p in proposals]


def pool() -> list[Candidate]:
    return [
        candidate(f"n{n:g}-u{u}", n=n, u=u, flops=6 * n * 1.6e10)
        for n in (5e7, 2e8, 5e8) for u in (-1.4, -0.7, 0.0, 0.7, 1.4)
    ]  # fmt: skip


def test_runs_that_bracket_a_new_optimum_are_worth_more_than_a_known_slice_again(
    posterior: Posterior,
) -> None:
    """Both branches of a run at a new size, on either side of the optimum expected there."""
    runs = [known("again"), known("again, side", u=-0.7), candidate("new, above", u=1.2)]
    found = choose(posterior, runs, GOAL, num_runs=1, budget_flops=1e20, seed=1)
    assert ids(found.proposals) == ["new, above"]


def test_a_second_run_of_a_slice_goes_to_the_side_and_not_to_the_same_lr(
    posterior: Posterior,
) -> None:
    """Two losses of one slice tell its LR* if their LRs differ, and nothing if they do not."""
    runs = [candidate("again", u=0.0), candidate("side", u=-1.4)]
    calm = never_diverging(posterior)  # what may diverge tells less by one loss
    beliefs = _Beliefs(calm, [candidate("first"), *runs], GOAL, np.ones(1), seed=1)
    before = beliefs.regret()
    beliefs.observe(0)
    _, again, side = beliefs.falls()[:, 0]
    # The share of the regret that each explains; 400 draws leave 3 % of it to chance.
    assert side > 0.1 * before
    assert again < 0.03 * before
    beliefs.observe(2)
    assert beliefs.regret() < 0.97 * before


def test_what_others_are_making_is_expected_and_not_bought(posterior: Posterior) -> None:
    """With one LR of a slice under way another tells its LR*, and the same one nothing."""
    calm = never_diverging(posterior)
    again, side = candidate("again", u=0.0), candidate("side", u=-1.4)

    def found(runs: list[Candidate], under_way: list[Candidate]) -> Plan:
        return choose(
            calm, runs, GOAL, num_runs=9, budget_flops=1e21, seed=1, only_paying=False,
            under_way=[run.spec for run in under_way],
        )  # fmt: skip

    beside = found([again, side], [candidate("first", u=0.0)])
    first, *rest = beside.proposals
    assert first.spec.run_id == "side"
    assert first.saves_nats > 0.1 * beside.regret_now
    # 400 draws leave 3 % of the regret to chance.
    assert sum(p.saves_nats for p in rest) < 0.03 * beside.regret_now
    paired, alone = (
        sum(p.saves_nats for p in found([again], runs).proposals)
        for runs in ([candidate("first", u=-1.4)], [])
    )
    assert paired > 1.5 * alone


def test_decay_branches_of_one_run_share_their_noise(posterior: Posterior) -> None:
    """Nine tenths of its variance: what is a branch's own is a tenth, the rest moves both alike."""
    calm = never_diverging(posterior)  # divergence is chance of a branch's own
    draws = calm.draws.assign(noise_run=calm.draws["noise_run"] * 0 + 3.0)
    sharing = dataclasses.replace(calm, draws=draws)
    (n, *_), (short, long), (b, *_) = SIZES, TOKENS, BATCHES
    lower = true_log_lr(n, short, b) - true_log_lr(n, long, b)
    branches = candidate("both", n, long, b, u=lower, decay_at=(int(short),))
    alone, both = (
        _Beliefs(sharing, [run], GOAL, np.ones(1), seed=1)
        for run in (candidate("one", n, short, b), branches)
    )
    assert both.noise_variance[0] == pytest.approx(alone.noise_variance[0] / 10, rel=1e-6)
    unshared = dataclasses.replace(calm, draws=draws.assign(noise_run=draws["noise_run"] / 1e9))
    added = both.loss - _Beliefs(unshared, [branches], GOAL, np.ones(1), seed=1).loss
    assert np.corrcoef(added.T)[0, 1] == pytest.approx(1.0, abs=1e-6)
    assert added.var(axis=0) == pytest.approx(9 * both.noise_variance, rel=0.2)


def test_a_run_diverges_as_its_longest_horizon_does(posterior: Posterior) -> None:
    (n, *_), (short, long), (b, *_) = SIZES, TOKENS, BATCHES
    runs = [
        candidate("short", n, short, b, u=1.4 + true_log_lr(n, long, b) - true_log_lr(n, short, b)),
        candidate("long", n, long, b, u=1.4),
        candidate("both", n, long, b, u=1.4, decay_at=(int(short),)),
    ]
    beliefs = _Beliefs(posterior, runs, GOAL, np.ones(1), seed=1)
    to_short, to_long, to_both = beliefs.p_diverge
    assert to_short < 0.9 * to_long
    assert to_both == pytest.approx(to_long)


def test_the_end_of_a_run_is_worth_less_the_farther_up_it_is(posterior: Posterior) -> None:
    found = choose(posterior, pool(), GOAL, num_runs=3, budget_flops=1e21, seed=1, price_ends=True)
    ends = [proposal.finishing for proposal in found.proposals]
    for proposal, end in zip(found.proposals, ends, strict=True):
        assert end is not None
        assert end.flops == proposal.flops
        assert all(a >= b >= 0 for a, b in pairwise(end.saves_flops))
        # As it was bought, the run paid: no farther up than was expected its end does so too.
        assert end.pays(0.05, 0.0)
        # 0.3 and 0.38 of it on two sets of draws.
        assert end.saves(0.5) < 0.6 * end.saves(0.05)


def test_an_end_is_worth_what_a_run_of_its_excess_is(posterior: Posterior) -> None:
    """Told alone as much as any candidate at an LR of that excess or more, for whoever ends has not
    diverged; in a group at least as much as the rest of it lacks without the run, which may turn
    out to lie to either side.
    """
    calm = never_diverging(posterior)
    across = [candidate(f"at {u}", u=u) for u in np.linspace(-5.0, 5.0, 41)]
    beliefs = _Beliefs(calm, across, GOAL, np.ones(1), seed=1)
    at = acquire._EXCESSES.index(0.1)
    falls = beliefs.falls()[:, 0]
    each = [falls[beliefs.members.index((i,))] for i in range(len(across))]
    most = max(fall for fall, i in zip(each, beliefs.expected_excess, strict=True) if i >= 0.1)
    assert beliefs.ends(0, ())[at, 0] == pytest.approx(most, rel=0.1)

    pair = [candidate("above", u=2.0), candidate("below", u=-2.7)]  # 0.1 up, both
    beliefs = _Beliefs(calm, pair, GOAL, np.ones(1), seed=1)
    _, below, both = beliefs.falls()[:, 0]
    alone, together = (beliefs.ends(0, others)[at, 0] for others in ((), (1,)))
    assert together > 0.9 * (both - below) > alone


def test_whether_a_run_diverges_hangs_on_no_coin(posterior: Posterior) -> None:
    runs = [candidate("above", u=1.4), candidate("far above", u=2.0)]
    one, other = (_Beliefs(posterior, runs, GOAL, np.ones(1), seed=seed) for seed in (1, 2))
    assert np.all(one.p_diverge > 0.1)
    assert np.array_equal(one.falls(), other.falls())


def test_divergence_tells_of_the_optimum_as_far_as_the_edge_is_known(posterior: Posterior) -> None:
    offset = posterior.draws["log_edge_offset"]
    rng = np.random.default_rng(1)

    def told(sd: float) -> float:
        """By a run that may or may not diverge, of an edge that is known to ``sd``."""
        here = float(offset.median()) + offset * 0 + sd * rng.normal(size=offset.shape)
        known = dataclasses.replace(posterior, draws=posterior.draws.assign(log_edge_offset=here))
        beliefs = _Beliefs(known, [candidate("above", u=1.4)], GOAL, np.ones(1), seed=1)
        assert 0.4 < beliefs.p_diverge[0] < 0.8
        return float(beliefs.falls()[0, 0])

    assert told(0.0) > 2.0 * told(1.5)


def test_an_end_that_cannot_be_told_from_chance_has_no_price(
    posterior: Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choice() -> Proposal:
        runs = [candidate("a", u=1.2)]
        found = choose(
            posterior, runs, GOAL, num_runs=1, budget_flops=1e21, seed=1, price_ends=True
        )
        return found.proposals[0]

    assert choice().finishing is not None
    monkeypatch.setattr(_Beliefs, "ends", lambda *_: np.zeros((len(acquire._EXCESSES), 1)))
    assert choice().finishing is None


def test_flops_that_are_left_over_buy_the_next_best_run_or_are_kept(posterior: Posterior) -> None:
    def rates(goal: list[Target], only_paying: bool, runs: list[Candidate]) -> set[float]:
        found = choose(
            posterior,
            runs,
            goal,
            num_runs=1,
            budget_flops=1e21,
            seed=1,
            only_paying=only_paying,
            price_ends=True,
        )
        return {p.finishing.rate for p in found.proposals if p.finishing is not None}

    (rich,) = rates(GOAL, True, pool())
    assert rich > 1
    assert rates(GOAL, False, pool()) == {rich}
    few = [candidate("a", u=1.2)]
    assert rates(GOAL, True, few) == {1.0}  # nothing else is to be had
    assert rates(GOAL, False, few) == {0.0}  # and what is not spent is worth nothing
    near = [target("near", n_active=6e8, n_total=4.8e9, tokens=2e10)]
    (poor,) = rates(near, False, pool())
    assert 0 < poor < 1


def test_a_family_that_the_target_does_not_share_tells_less(posterior: Posterior) -> None:
    pair = [candidate("a"), candidate("b", u=-1.4)]
    other = [
        Candidate(spec=dataclasses.replace(c.spec, run_id="other", family="else"), flops=c.flops)
        for c in pair
    ]
    found = []
    for both in (pair, other):
        beliefs = _Beliefs(posterior, both, GOAL, np.ones(1), seed=1)
        beliefs.observe(0)
        found.append(beliefs.falls()[1, 0])
    assert found[0] > 2 * found[1]


def test_a_target_that_learns_nothing_makes_no_run_worth_more(posterior: Posterior) -> None:
    def worth(goal: list[Target], weights: list[float]) -> float:
        found = choose(
            posterior, [candidate("a", u=1.2)], goal, num_runs=1, budget_flops=1e21, seed=1,
            weights=weights, only_paying=False,
        )  # fmt: skip
        return found.proposals[0].saves_flops

    vast = target("vast", n_active=6e12, n_total=4.8e13, tokens=1.2e15, family="unseen")
    near = target("near", tokens=1.1e12, n_active=5e9, n_total=4e10)
    # Beside another target, for draws depend on a target's place.
    beside = worth([*GOAL, near], [1.0, 1e-15])
    assert worth([*GOAL, vast], [1.0, 1e-15]) == pytest.approx(beside, rel=1e-3)
    assert worth(GOAL, [2.0]) == pytest.approx(2 * worth(GOAL, [1.0]))


def test_of_equal_runs_the_cheaper_is_taken(posterior: Posterior) -> None:
    runs = [candidate("dear", u=1.2, flops=1e16), candidate("cheap", u=1.2, flops=1e15)]
    found = choose(posterior, runs, GOAL, num_runs=1, budget_flops=1e20, seed=1)
    assert ids(found.proposals) == ["cheap"]


@pytest.mark.parametrize("budget", [1e18, 2e19, 1e20])
def test_the_budget_is_never_exceeded_and_nothing_is_proposed_twice(
    posterior: Posterior, budget: float
) -> None:
    found = choose(posterior, pool(), GOAL, num_runs=20, budget_flops=budget, seed=1)
    assert sum(p.flops for p in found.proposals) <= budget
    assert len(set(ids(found.proposals))) == len(found.proposals)


def test_regret_falls_with_every_run_and_runs_pay_for_themselves(posterior: Posterior) -> None:
    found = choose(posterior, pool(), GOAL, num_runs=4, budget_flops=1e21, seed=1)
    assert len(found.proposals) >= 1
    assert found.regret_after < found.regret_now
    for proposal in found.proposals:
        assert proposal.saves_nats > 0
        assert proposal.saves_flops >= proposal.flops
        assert 0 <= proposal.p_diverge <= 1
        assert "nats" in proposal.reason


def test_what_the_runs_save_is_what_the_regret_falls_by(posterior: Posterior) -> None:
    """Twenty runs would take a twentieth off the regret of 400 draws by chance alone."""
    many = [candidate(f"{n}-{i}", n=n, u=i / 5) for n in (1e8, 2e8, 3e8, 5e8) for i in range(-7, 8)]
    found = choose(posterior, many, GOAL, num_runs=60, budget_flops=1e22, seed=1, only_paying=False)
    assert len(found.proposals) > 15
    fall = found.regret_now - found.regret_after
    assert fall == pytest.approx(sum(p.saves_nats for p in found.proposals))


def test_the_same_seed_chooses_the_same_runs(posterior: Posterior) -> None:
    first, again = (
        ids(propose(posterior, pool(), GOAL, num_runs=3, budget_flops=1e21, seed=3))
        for _ in range(2)
    )
    assert first == again


def test_the_order_of_the_candidates_does_not_matter(posterior: Posterior) -> None:
    found = []
    for seed in range(4):
        runs = pool()
        np.random.default_rng(seed).shuffle(runs)  # type: ignore[arg-type]
        plan = choose(posterior, runs, GOAL, num_runs=6, budget_flops=1e21, seed=1)
        found.append({p.spec.run_id: pytest.approx(p.saves_nats) for p in plan.proposals})
        assert len(found[-1]) == 6
        assert {p.spec.run_id: p.saves_nats for p in plan.proposals} == found[0]


def test_what_is_known_of_a_loss_is_what_conditioning_says(posterior: Posterior) -> None:
    """Covariances of what is left, once a loss is known, by the formula for normals."""
    beliefs = _Beliefs(posterior, pool(), GOAL, np.ones(1), seed=1)
    joint = np.hstack([beliefs.goal, beliefs.loss])
    before, at = np.cov(joint.T, bias=True), beliefs.goal.shape[1] + 3
    total = before[at, at] + beliefs.noise_variance[3]
    wanted = before - np.outer(before[at], before[at]) / total
    beliefs.observe(3)
    left = np.cov(np.hstack([beliefs.goal, beliefs.loss]).T, bias=True)
    np.testing.assert_allclose(left, wanted, atol=1e-9 * before.max())


def test_of_runs_that_share_a_trunk_one_is_proposed(posterior: Posterior) -> None:
    """The longer one measures the shorter horizon on its way: both would pay that branch twice."""
    both = [
        dataclasses.replace(candidate(f"d{d:g}-u{u}", u=u, d=d), trunk=f"u{u}")
        for u in (-1.2, 1.2) for d in (8e9, 1.6e10)
    ]  # fmt: skip
    found = choose(posterior, both, GOAL, num_runs=4, budget_flops=1e20, seed=1, only_paying=False)
    assert len(found.proposals) == 2
    assert {p.spec.run_id.rpartition("-u")[2] for p in found.proposals} == {"-1.2", "1.2"}
    alone = [dataclasses.replace(c, trunk=None) for c in both]
    found = choose(posterior, alone, GOAL, num_runs=4, budget_flops=1e20, seed=1, only_paying=False)
    assert len(found.proposals) > 2


def test_reasons_for_stopping(posterior: Posterior) -> None:
    def stop(runs: list[Candidate], goal: list[Target] = GOAL, budget: float = 1e21,
             num_runs: int = 5) -> str:  # fmt: skip
        found = choose(posterior, runs, goal, num_runs=num_runs, budget_flops=budget, seed=1)
        return found.stop_reason

    assert "every run of the space has been made" in stop([])
    assert "no run fits into the 1M FLOPs that are left" in stop(pool(), budget=1e6)
    assert "1 run was asked for" in stop(pool(), num_runs=1)
    small = [target(n_active=3e7, n_total=2.4e8, tokens=2e9, batch_tokens=131_072.0)]
    near = {"n": SIZES[0], "d": TOKENS[0], "b": BATCHES[0]}
    told = stop([candidate(f"u{u}", u=u, flops=1e24, **near) for u in (-2.0, -1.4, 1.4)], small,
                budget=1e25)  # fmt: skip
    assert "would save an expected" in told or "would tell anything" in told


def test_weights_choose_between_targets(posterior: Posterior) -> None:
    goals = [target("a"), target("b", n_active=4e9, n_total=3.2e10, tokens=4e11)]
    plans = [
        choose(posterior, pool(), goals, num_runs=1, budget_flops=1e21, seed=1, weights=weights)
        for weights in ([1.0, 0.0], [0.0, 1.0])
    ]
    assert plans[0].regret_now < plans[1].regret_now


def test_runs_that_diverge_are_told(posterior: Posterior) -> None:
    found = choose(
        posterior, [candidate("hot", u=4.0)], GOAL, num_runs=1, budget_flops=1e21, seed=1
    )
    for proposal in found.proposals:
        assert proposal.p_diverge > 0.5


def test_the_prior_alone_expects_more_regret_than_a_fit(posterior: Posterior) -> None:
    alone, fitted = (
        choose(p, pool(), [target()], num_runs=3, budget_flops=1e21, seed=1)
        for p in (prior_posterior("moe-default", num_draws=600), posterior)
    )
    assert alone.regret_now > fitted.regret_now
    assert alone.stop_reason


def space_recipe() -> dict[str, Any]:
    lr = math.exp(true_log_lr(SIZES[0], TOKENS[0], BATCHES[0]))
    low = math.exp(math.log(2) / 2 * round(math.log(lr) / (math.log(2) / 2)))
    return toy_recipe(
        sweep__family="made-up",
        space__tokens=[int(TOKENS[0]), int(TOKENS[1])],
        space__batch_tokens=[int(b) for b in BATCHES],
        space__shapes=[
            {"name": f"n{n:g}", "n_active": int(n), "n_total": int(SPARSITY * n)}
            for n in (*SIZES, 3e8)
        ],
        space__lr={"low": low / 4, "high": low * 4, "per_octave": 1},
        targets=[{"target_id": "big", "tokens": "1.2T", "batch_tokens": 4_194_304,
                  "shape": {"name": "large", "n_active": 6_000_000_000,
                            "n_total": 48_000_000_000}}],
    )  # fmt: skip


def test_a_plan_proposes_what_was_not_run(posterior: Posterior) -> None:
    recipe = parse_recipe(space_recipe())
    found = plan(posterior, recipe, budget_flops=1e21, num_runs=4)
    assert len(found.proposals) >= 1
    assert posterior.runs is not None
    frame = posterior.runs.frame
    seen = {
        (n, d, b, round(x, 3))
        for n, d, b, x in zip(
            frame["n_active"], frame["tokens"], frame["batch_tokens"], np.log(frame["lr"]),
            strict=True,
        )
    }  # fmt: skip
    for proposal in found.proposals:
        spec = proposal.spec
        mine = {(spec.n_active, d, spec.batch_tokens, round(math.log(spec.lr), 3))
                for d in spec.decay_at}  # fmt: skip
        # What was run may be proposed once more, with another seed; it says so.
        assert mine <= seen if proposal.repeat else not mine & seen
    cheap = plan(posterior, recipe, budget_flops=1e17, num_runs=4)
    assert sum(p.flops for p in cheap.proposals) <= 1e17


def test_a_plan_sells_no_branch_twice() -> None:
    """Of a line (shape, batch, LR) whose short run is in the fit, the long one alone is left; of
    one that is new, one run; of one that ended early, none.
    """
    document = space_recipe()
    document["space"] |= {"shapes": document["space"]["shapes"][:1], "batch_tokens": [131_072]}
    recipe = parse_recipe(document)
    short, long = (
        [p.spec for p in candidates(recipe, find_runner(recipe)) if p.spec.tokens == tokens]
        for tokens in TOKENS
    )
    early, new, *measured = short
    rows = [
        {**spec_row(spec), "status": status, "loss": 3.0, "planned_tokens": spec.tokens}
        for spec, status in [(early, "pruned"), *((spec, "ok") for spec in measured)]
    ]
    unsure = prior_posterior("moe-default", num_draws=600)
    found = plan(dataclasses.replace(unsure, runs=make_table(rows)), recipe, budget_flops=1e23)
    fresh = [p.spec for p in found.proposals if not p.repeat]
    bought = {spec.lr: spec.decay_at for spec in fresh}
    assert len(bought) == len(fresh)
    whole = {new.lr: {new.decay_at, long[1].decay_at}}
    assert len(bought.keys() - whole.keys()) > 0
    for lr, decay_at in bought.items():
        assert decay_at in whole.get(lr, {(int(TOKENS[1]),)})
    assert early.lr not in bought


def test_a_plan_repeats_runs_with_another_seed_and_says_so(posterior: Posterior) -> None:
    """Nothing new is on offer, and the optimum is as unknown as before the runs."""
    assert posterior.runs is not None
    frame = posterior.runs.frame.assign(seed=4.0)
    cell = frame[(frame["n_active"] == SIZES[0]) & (frame["tokens"] == TOKENS[0])]
    made = cell[(cell["batch_tokens"] == BATCHES[0]) & (cell["status"] == "ok")]
    low, high = float(made["lr"].min()), float(made["lr"].max())
    document = space_recipe()
    space = document["space"]
    lr = {"low": low, "high": high, "per_octave": (len(made) - 1) / math.log2(high / low)}
    space |= {"tokens": [int(TOKENS[0])], "batch_tokens": [int(BATCHES[0])], "lr": lr,
              "shapes": space["shapes"][:1]}  # fmt: skip
    runs = dataclasses.replace(posterior.runs, frame=frame)
    unsure = dataclasses.replace(prior_posterior("moe-default", num_draws=600), runs=runs)
    found = plan(unsure, parse_recipe(document), budget_flops=1e21)
    assert len(found.proposals) >= 2
    for proposal in found.proposals:
        assert proposal.repeat
        assert proposal.spec.seed == 5
        assert "again with another seed" in proposal.reason


def test_a_recipes_weights_steer_the_plan_and_are_checked(posterior: Posterior) -> None:
    document = space_recipe()
    (far,) = document["targets"]
    near = {**far, "target_id": "near", "tokens": "2B", "batch_tokens": int(BATCHES[0]),
            "shape": {"name": "near", "n_active": int(SIZES[0]),
                      "n_total": int(SPARSITY * SIZES[0])}}  # fmt: skip
    values = []
    for weight in (1e-3, 1e3):
        document["targets"] = [{**far, "weight": weight}, near]
        found = plan(posterior, parse_recipe(document), budget_flops=1e21, num_runs=1)
        values.append(found.regret_now)
    # The far target is the uncertain one: the heavier it counts, the higher the weighted regret.
    assert values[1] > 2 * values[0]
    document["targets"] = [{**far, "weight": "much"}]
    with pytest.raises(SpecError, match="weight must be a number > 0"):
        plan(posterior, parse_recipe(document), budget_flops=1e21)


def test_a_few_absurd_draws_do_not_break_a_choice(posterior: Posterior) -> None:
    draws = posterior.draws.copy(deep=True)
    draws["penalty_skew"][0, :2] = 40.0  # batches far from the best: losses beyond all measure
    found = choose(
        dataclasses.replace(posterior, draws=draws), pool(), GOAL, num_runs=4, budget_flops=1e22,
        seed=1, only_paying=False,
    )  # fmt: skip
    sane = choose(posterior, pool(), GOAL, num_runs=4, budget_flops=1e22, seed=1, only_paying=False)
    assert found.regret_after == pytest.approx(sane.regret_after, rel=0.2)


def test_floors_beyond_all_measure_leave_the_valley_to_pairs_of_runs(
    posterior: Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a normal approximation whose penalty is steep: the runs of a slice share such a floor,
    and their differences still tell its optimum.
    """
    runs = [candidate(f"u{u}", u=u) for u in (-1.4, -0.7, -0.35, 0.0, 0.35, 0.7, 1.4)]
    real = acquire.target_draws

    def wild(*words: Any, **more: Any) -> Any:
        at = real(*words, **more)
        far = 1e9 * np.random.default_rng(3).normal(size=(len(at.floor), 1))
        return dataclasses.replace(at, floor=at.floor + far)

    calm = _Beliefs(posterior, runs, GOAL, np.ones(1), seed=1).loss
    monkeypatch.setattr(acquire, "target_draws", wild)
    beliefs = _Beliefs(posterior, runs, GOAL, np.ones(1), seed=1)
    assert beliefs.loss.std(axis=0).max() < 5.0
    np.testing.assert_allclose(np.diff(beliefs.loss, axis=1), np.diff(calm, axis=1), atol=1e-5)
    found = choose(posterior, runs, GOAL, num_runs=3, budget_flops=1e22, seed=1, only_paying=False)
    assert len(found.proposals) >= 2
    assert found.regret_after < 0.97 * found.regret_now
