"""Scores, verdict and report of a comparison, from made-up outcomes with a known answer."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayeslr.compare import Comparison, _judged
from bayeslr.compare.arms import BLEND, FITTING, MODULES, TRANSFER, TWO_STAGE, Arm, Choice
from bayeslr.compare.heldout import Cell
from bayeslr.compare.page import render
from bayeslr.compare.recipe import parse_compare_recipe
from bayeslr.compare.scores import Difference, Estimate, Scoreboard, seed_noise
from bayeslr.compare.verdict import verdict
from bayeslr.runner_protocol import Trial
from bayeslr.specs import RunSpec, Target
from tests.chromium import Page

TARGETS = ("wide <one>", "wider")
MULTIPLES = (0.5, 1.0, 2.0)
DIAGNOSTICS = {"grad_norm": 0.5, "effective_rank": 7.0, "other.part": 1.0}
CURVATURE = 0.03


def arm(name: str, lr: float, **more: Any) -> Arm:
    choices = tuple(
        Choice(target_id=t, lr=lr, lr_q05=lr / 3, lr_q95=lr * 3, p_diverge=0.01) for t in TARGETS
    )
    kind = "sp" if name.startswith("fitting") else "mup"
    given = {"parametrization": kind, "proxy_runs": 20, "proxy_flops": 1.2e12, **more}
    return Arm(name=name, choices=choices, **given)


def made_up_arms() -> list[Arm]:
    return [
        arm(FITTING, 4e-3),
        arm(TWO_STAGE, 9e-3),
        arm(TRANSFER, 1e-2),
        arm(MODULES, 1e-2, multipliers={"embedding": 2.0, "head": 0.5}),
        arm(BLEND, 1.4e-2, note="Weighed by nothing."),
    ]


def made_up_cells(
    rng: np.random.Generator,
    arms: list[Arm],
    *,
    gaps: dict[str, float],
    optimum: dict[str, float],
    noise: float = 0.004,
    num_seeds: int = 3,
    diverge_at: str = "",
) -> list[Cell]:
    """Cells whose mean is gap of the valley + curvature (ln LR - ln optimum)^2, paired seeds."""
    cells = []
    for target_id in TARGETS:
        shift = rng.normal(0, 0.05, size=num_seeds)
        for one in arms:
            for multiple in MULTIPLES if one.name in (FITTING, TRANSFER, MODULES) else (1.0,):
                lr = one.lr(target_id) * multiple
                u = math.log(lr / optimum[one.variant])
                losses = 2.0 + gaps[one.variant] + CURVATURE * u * u + shift
                losses = losses + rng.normal(0, noise, size=num_seeds)
                lost = diverge_at == one.name and multiple == 1
                cells.append(
                    Cell(
                        target_id=target_id, variant=one.variant, lr=lr,
                        chosen_by=(one.name,) if multiple == 1 else (), around=one.name,
                        losses=tuple(None if lost and i == 0 else float(y)
                                     for i, y in enumerate(losses)),
                        states=tuple("diverged" if lost and i == 0 else "ok"
                                     for i in range(num_seeds)),
                        diagnostics=tuple(DIAGNOSTICS for _ in range(num_seeds)),
                    )
                )  # fmt: skip
    return cells


VALLEYS = ("sp", "mup", "mup with module LRs")
LEVEL = dict.fromkeys(VALLEYS, 0.0)
BOTTOM = {"sp": 4e-3, "mup": 1e-2, "mup with module LRs": 1e-2}


def judge(seed: int, **world: Any) -> Any:
    arms = made_up_arms()
    given = {"gaps": LEVEL, "optimum": BOTTOM, **world}
    cells = made_up_cells(np.random.default_rng(seed), arms, **given)
    board = Scoreboard(cells)
    outcomes = [board.outcome(a, t) for t in TARGETS for a in arms]
    found = {
        TRANSFER: board.difference(TRANSFER, FITTING),
        MODULES: board.difference(MODULES, TRANSFER),
    }
    return verdict(arms, outcomes, found), outcomes, found


def test_noise_leaves_out_what_seeds_share() -> None:
    rng = np.random.default_rng(1)
    shifts = rng.normal(size=(200, 1)) + 5 * rng.normal(size=(1, 6))
    losses = shifts + 0.1 * rng.normal(size=(200, 6))
    # 4 standard errors of an sd from 995 degrees of freedom: fails 1 in 16,000 if correct.
    assert seed_noise(losses) == pytest.approx(0.1, abs=4 * 0.1 / math.sqrt(2 * 995))
    assert losses.std(axis=1).mean() > 3  # what leaving the shift in would give
    assert seed_noise(losses[:, :1]) is None


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """400 worlds, nominal 90 %: 4 standard errors are 6 points, missed by chance 1 in 16,000."""
    gaps = {**LEVEL, "mup": 0.02}
    inside = narrow = 0
    for seed in range(400):
        _, _, found = judge(seed, gaps=gaps)
        total = found[TRANSFER].total
        inside += total.low <= 0.02 <= total.high
        half = 0.4 * (total.high - total.low) / 2  # a deliberately narrow twin must be caught
        narrow += total.value - half <= 0.02 <= total.value + half
    assert 0.84 * 400 <= inside <= 0.96 * 400
    assert narrow < 0.84 * 400


def test_noise_at_other_lrs_does_not_touch_a_difference() -> None:
    """Near the edge of divergence runs scatter many times as much as at the bottom."""
    arms = made_up_arms()
    cells = made_up_cells(np.random.default_rng(6), arms, gaps=LEVEL, optimum=BOTTOM)
    wild = [
        c if c.chosen_by else dataclasses.replace(
            c, losses=tuple(y + 3 * s for y, s in zip(c.losses, (0.0, 1.0, 2.0), strict=True))
        )
        for c in cells
    ]  # fmt: skip
    calm, stormy = (Scoreboard(each).difference(TRANSFER, FITTING) for each in (cells, wild))
    assert calm is not None
    assert stormy is not None
    assert stormy.total == calm.total


@pytest.mark.parametrize(
    ("world", "winner", "words"),
    [
        ({"gaps": {**LEVEL, "mup": 0.05}}, FITTING, ["Fitting served better", "parametrisation"]),
        ({"gaps": {**LEVEL, "sp": 0.05}}, TRANSFER, ["Transfer served better", "parametrisation"]),
        ({"optimum": {**BOTTOM, "mup": 3.5e-3}}, FITTING, ["Fitting", "nearer to the bottom"]),
        ({"noise": 0.05}, None, ["cannot tell", "Transfer ended", "90 % interval"]),
        ({"diverge_at": TRANSFER}, FITTING, ["2 of the held-out runs", "transfer chose diverged"]),
        ({"diverge_at": FITTING}, TRANSFER, ["2 of the held-out runs", "fitting chose diverged"]),
        ({"num_seeds": 1}, None, ["cannot tell", "one seed has no interval"]),
    ],
)  # fmt: skip
def test_the_sentence_says_who_and_why(
    world: dict[str, Any], winner: str | None, words: list[str]
) -> None:
    judged, _, _ = judge(3, **world)
    assert judged.winner == winner, judged.sentence
    for word in words:
        assert word in judged.sentence


def test_the_sentence_says_what_either_spent() -> None:
    """A sweep may stop before its budget is spent."""
    judged, outcomes, found = judge(3)
    assert "(with 1.2T FLOPs of proxies each)" in judged.sentence
    arms = [
        dataclasses.replace(a, proxy_flops=3e11) if a.name == FITTING else a for a in made_up_arms()
    ]
    less = verdict(arms, outcomes, found).sentence
    assert "(with 300B FLOPs of proxies for Fitting and 1.2T for Transfer)" in less


def test_runs_that_broke_are_no_better_than_runs_that_diverged() -> None:
    _, outcomes, found = judge(3, diverge_at=FITTING)
    broken = [
        dataclasses.replace(o, states=("failed",) * 3, loss=None) if o.arm == TRANSFER else o
        for o in outcomes
    ]
    judged = verdict(made_up_arms(), broken, {**found, TRANSFER: None})
    assert judged.winner is None
    assert "cannot tell" in judged.sentence


def test_a_reason_is_given_only_where_it_shows() -> None:
    part = Estimate(value=0.02, low=-0.01, high=0.05)
    whole = Estimate(value=0.03, low=0.01, high=0.05)
    found = Difference(
        first=TRANSFER, second=FITTING, total=whole, by_regret=part, by_valley=part, targets=("a",)
    )
    unsure = verdict(made_up_arms(), [], {TRANSFER: found})
    assert unsure.winner == FITTING
    assert "whether by its LRs or by its valleys these runs do not say" in unsure.sentence
    sure = verdict(made_up_arms(), [], {TRANSFER: dataclasses.replace(found, by_regret=whole)})
    assert "because its LRs lay nearer" in sure.sentence


@pytest.mark.parametrize(
    "world",
    [
        # The worse valley's bottom is not among its LRs, so it may be no higher than the other's.
        {"gaps": {**LEVEL, "sp": 0.05}, "optimum": {**BOTTOM, "sp": 1.2e-3}},
        # The better arm's regret is not known in full, so it may be no smaller than the other's.
        {"optimum": {**BOTTOM, "sp": 2.4e-3, "mup": 2.2e-2}},
    ],
)
def test_no_reason_where_the_bottom_it_rests_on_was_not_trained(world: dict[str, Any]) -> None:
    judged, _, _ = judge(3, noise=0.001, **world)
    assert judged.winner is not None
    assert "because" not in judged.sentence, judged.sentence
    assert "the best LR for fitting may lie beyond those trained" in judged.sentence


def test_module_wise_tuning_has_its_own_clause() -> None:
    worse, _, _ = judge(3, gaps={**LEVEL, "mup with module LRs": 0.05})
    # 4 standard errors of a difference over two targets and three paired seeds: 0.0092.
    found = re.search(r"module by module made it worse by (0\.\d+) nats", worse.sentence)
    assert found is not None
    assert float(found[1]) == pytest.approx(0.05, abs=0.01)
    better, _, _ = judge(3, gaps={**LEVEL, "mup with module LRs": -0.05})
    assert re.search(r"module by module gained 0\.0[456]\d* nats against one LR", better.sentence)


@pytest.mark.parametrize("value", [Estimate(value=0.0, low=0.0, high=0.0), Estimate(value=0.0)])
def test_modules_that_changed_nothing_are_said_to(value: Estimate) -> None:
    _, outcomes, found = judge(3)
    same = dataclasses.replace(found[MODULES], total=value)
    judged = verdict(made_up_arms(), outcomes, {**found, MODULES: same})
    assert "module by module on the base shape found nothing to change" in judged.sentence


def test_regret_is_read_on_the_own_valley_and_gap_over_all() -> None:
    gaps = {"sp": 0.0, "mup": 0.1, "mup with module LRs": 0.2}
    _, outcomes, found = judge(4, gaps=gaps, noise=1e-6)
    by_arm = {o.arm: o for o in outcomes if o.target_id == TARGETS[1]}
    off = CURVATURE * math.log(9e-3 / 4e-3) ** 2
    assert by_arm[FITTING].regret.value == 0.0
    assert by_arm[TWO_STAGE].regret.value == pytest.approx(off, abs=1e-4)
    assert by_arm[TRANSFER].regret.value == 0.0
    assert by_arm[TRANSFER].gap.value == pytest.approx(0.1, abs=1e-4)
    assert by_arm[MODULES].gap.value == pytest.approx(0.2, abs=1e-4)
    assert found[TRANSFER].by_valley.value == pytest.approx(0.1, abs=1e-4)
    assert found[TRANSFER].by_regret.value == pytest.approx(0.0, abs=1e-4)
    parts = found[MODULES].by_regret.value + found[MODULES].by_valley.value
    assert parts == pytest.approx(found[MODULES].total.value)


def test_a_choice_that_lost_a_seed_has_no_loss() -> None:
    _, outcomes, found = judge(5, diverge_at=MODULES)
    lost = next(o for o in outcomes if o.arm == MODULES)
    assert (lost.loss, lost.regret, lost.gap) == (None, None, None)
    assert lost.states == ("diverged", "ok", "ok")
    assert found[MODULES] is None
    assert found[TRANSFER] is not None


# ---- the report


def recipe_document() -> dict[str, Any]:
    shape = {"n_active": 1_000_000, "n_total": 2_000_000}
    space = {
        "tokens": [200_000], "batch_tokens": [4096], "lr": {"low": 1e-3, "high": 3.2e-2},
        "shapes": [{"name": "small", "n_active": 100_000, "n_total": 200_000}],
    }  # fmt: skip
    return {
        "compare": {"name": "demo", "runner": "command", "proxy_flops": 1.2e12},
        "fitting": {"space": space},
        "transfer": {
            "parametrization": "mup", "base_shape": space["shapes"][0], "tokens": 400_000,
            "batch_tokens": 4096, "lr": space["lr"],
        },
        "targets": [
            {"target_id": t, "tokens": 1e6, "batch_tokens": 4096, "shape": shape} for t in TARGETS
        ],
        "options": {"argv": ["true"]},
    }  # fmt: skip


def comparison(seed: int = 3, **world: Any) -> Comparison:
    arms = made_up_arms()
    given = {"gaps": {**LEVEL, "mup": 0.05}, "optimum": BOTTOM, **world}
    cells = made_up_cells(np.random.default_rng(seed), arms, **given)
    spec = RunSpec(
        run_id="r", family="f", runner="command", lr=1e-2, tokens=10**6, batch_tokens=4096,
        n_active=10**6, n_total=2 * 10**6, seq_len=64,
    )  # fmt: skip
    row = {
        "run_id": "r", "family": "f", "lr": 1e-2, "n_active": 1e6, "n_total": 2e6, "tokens": 1e6,
        "param_convention": "non_embedding", "batch_tokens": 4096, "loss": 2.0, "status": "ok",
        "source": "bayeslr_runners",
    }  # fmt: skip
    trial = Trial(number=0, spec=spec, state="ok", flops=1.0, records=(row,))
    alone = [{"target_id": t, "lr": 1e-2, "lr_q05": 5e-3, "lr_q95": 2e-2} for t in TARGETS]
    details = {
        "modules": {
            "multipliers": {"embedding": 2.0, "head": 0.5},
            "tried": [
                {"multipliers": {}, "loss": 2.1, "state": "ok"},
                {"multipliers": {"embedding": 2.0, "head": 0.5}, "loss": 2.0, "state": "ok"},
                {"multipliers": {"norm": 2.0}, "loss": None, "state": "diverged"},
            ],
        },
        "posterior": {
            "weights": {"transfer": 0.8, "moe-default": 0.2},
            "scores": {"transfer": -0.1, "moe-default": -1.5},
            "sentence": "Weighed by the optimum of the largest shape, held out.",
            "alone": {"transfer": alone, "moe-default": alone},
        },
    }
    recipe = parse_compare_recipe(recipe_document())
    return _judged(recipe, Path("demo-out"), arms, cells, details, [trial])


def targets() -> list[Target]:
    return [
        Target(target_id=t, n_active=1e6, n_total=2e6, tokens=1e6, batch_tokens=4096)
        for t in TARGETS
    ]


def test_the_document_is_json_and_holds_every_figure() -> None:
    document = json.loads(json.dumps(comparison().document(), allow_nan=False))
    assert document["winner"] == "fitting"
    assert {o["arm"] for o in document["outcomes"]} == {a.name for a in made_up_arms()}
    assert document["differences"]["transfer"]["total"]["low"] > 0
    assert document["seed_noise"][TARGETS[0]] > 0
    assert len(document["cells"]) == 2 * (3 * 3 + 2)


@pytest.mark.parametrize(
    "world", [{}, {"num_seeds": 1}, {"diverge_at": TRANSFER}, {"noise": 0.3}]
)  # fmt: skip
def test_the_report_is_complete_and_self_contained(world: dict[str, Any]) -> None:
    result = comparison(**world)
    page = render(result, targets())
    assert page.count("<svg role=") == 2
    assert "wide &lt;one&gt;" in page
    assert "wide <one>" not in page
    assert "nan" not in page.lower().replace("finan", "")
    for outside in ("http://", "https://", "src="):
        assert outside not in page.replace("http://www.w3.org", "")
    for heading in (
        "At the chosen LRs", "Held-out valleys", "Stability and feature learning", "LR by module",
        "Transfer in the posterior", "What each way was given",
    ):  # fmt: skip
        assert f"<h2>{heading}" in page


@pytest.fixture(scope="module")
def open_page(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, bool], Page]:
    path = tmp_path_factory.mktemp("compare") / "report.html"
    path.write_text(render(comparison(), targets()), encoding="utf-8")

    def show(width: int, dark: bool) -> Page:
        page.open(path, width=width, dark=dark)
        return page

    return show


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, False), (1280, True)])
def test_the_report_fits_its_window(
    open_page: Callable[[int, bool], Page], width: int, dark: bool
) -> None:
    page = open_page(width, dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.complaints() == []
    assert all(url.startswith(("file:", "data:")) for url in page.requests())
    outside = page.evaluate(
        "[...document.querySelectorAll('figure svg')].filter(s => "
        "s.getBoundingClientRect().right > innerWidth).length"
    )
    assert outside == 0
