"""Replay on a small made-up pool whose valleys are known; inference replaced where it is slow."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from bayeslr import replay as library
from bayeslr import sampling
from bayeslr.cli import app
from bayeslr.cli.replay import _lines
from bayeslr.errors import DataError, SpecError, StorageError
from bayeslr.predict import prior_posterior, read_targets, target_draws
from bayeslr.recorded import Campaign, Pool, buy_start, copied, make_pool
from bayeslr.replay import builtin
from bayeslr.replay.laplace import normal_posterior
from bayeslr.runs import make_table
from bayeslr.specs import Target

CARD = "dense-default"
LRS = 2.0 ** np.arange(-14.0, -6.0, 0.5)


def star(n: float, d: float, b: float) -> float:
    """ln LR* of the made-up law."""
    return math.log(1e-3) - 0.4 * math.log(n / 2e8) - 0.1 * math.log(d / 4e9) + 0.3 * math.log(b / 2**18)  # noqa: E501  # fmt: skip


def loss(n: float, d: float, b: float, lr: float) -> float:
    u = math.log(lr) - star(n, d, b)
    return 1.8 + 0.5 * (n / 2e8) ** -0.3 + 0.3 * (d / 4e9) ** -0.3 + 0.02 * u**2 * math.exp(0.1 * u)


def rows() -> list[dict[str, Any]]:
    return [
        {
            "run_id": f"{n:.0f}-{d:.0f}-{b}-{lr:.3g}", "family": "made-up", "lr": lr,
            "n_active": n, "n_total": n, "param_convention": "non_embedding", "tokens": d,
            "planned_tokens": d, "batch_tokens": b, "loss": loss(n, d, b, lr), "seq_len": 1024,
            "status": "diverged" if lr > 10 * math.exp(star(n, d, b)) else "ok",
        }
        for n in (1e8, 2e8, 4e8) for d in (2e9, 8e9) for b in (2**17, 2**18, 2**19) for lr in LRS
    ]  # fmt: skip


TARGETS = [
    Target(target_id=f"t{b}", family="made-up", n_active=1e9, n_total=1e9, tokens=3e10,
           batch_tokens=float(b))
    for b in (2**18, 2**19)
]  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Pool:
    return make_pool(make_table(rows()))


@pytest.fixture(scope="module")
def truth() -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"target_id": t.target_id, "lr": lr, "diverged": False,
             "loss": loss(t.n_active, t.tokens, t.batch_tokens, lr)}
            for t in TARGETS for lr in LRS
        ]
    )  # fmt: skip


@pytest.fixture
def quick_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prior card for a posterior: the loop without NUTS. Two-stage stays as it is."""
    real = sampling.fit

    def fit(runs: Any, prior: str, *, seed: int = 1, method: str = "bayes", **_: Any) -> Any:
        if method == "two-stage":
            return real(runs, prior, seed=seed, method=method)
        return prior_posterior(prior, seed=seed, num_draws=400)

    def approximate(runs: Any, prior: str, *, seed: int, **_: Any) -> Any:
        return prior_posterior(prior, seed=seed, num_draws=400)

    monkeypatch.setattr(sampling, "fit", fit)
    monkeypatch.setattr(builtin, "normal_posterior", approximate)


def campaign(pool: Pool, share: float = 0.02, seed: int = 1) -> Campaign:
    made = Campaign(pool=pool, targets=TARGETS, budget_flops=share * pool.total_flops, seed=seed,
                    prior=CARD)  # fmt: skip
    buy_start(made)
    return made


def predictions(shift: float, half_width: float) -> pd.DataFrame:
    """Optimum and interval, both shifted; half the half-width for the quartiles."""
    marks = {"lr": 0.0, "lr_q05": -1.0, "lr_q25": -0.5, "lr_q50": 0.0, "lr_q75": 0.5, "lr_q95": 1.0}
    return pd.DataFrame(
        [
            {"target_id": t.target_id}
            | {
                k: math.exp(star(t.n_active, t.tokens, t.batch_tokens) + shift + m * half_width)
                for k, m in marks.items()
            }
            for t in TARGETS
        ]
    )


def test_a_perfect_answer_scores_its_width_alone(truth: pd.DataFrame) -> None:
    found = library.score(truth, predictions(0.0, math.log(2)))
    assert found.regret_mean < 2e-4
    assert found.octave_error < 0.1
    assert found.cover_90 == found.cover_50 == 1.0
    assert found.interval_score == pytest.approx(2.0)


def test_a_miss_costs_twenty_times_its_octaves_and_regret_grows(truth: pd.DataFrame) -> None:
    found = library.score(truth, predictions(2 * math.log(2), math.log(2)))
    assert found.cover_90 == 0.0
    assert found.interval_score == pytest.approx(2.0 + 20.0, abs=1.5)
    assert found.regret_mean == pytest.approx(0.02 * (2 * math.log(2)) ** 2, rel=0.3)


def test_leaving_the_measured_range_is_charged(truth: pd.DataFrame) -> None:
    edge = predictions(math.log(LRS[-1]) - star(1e9, 3e10, 2**18), 0.1)
    far = edge.assign(lr=edge["lr"] * math.e)
    gain = library.score(truth, far).regret_mean - library.score(truth, edge).regret_mean
    assert gain > 0.02


@pytest.mark.parametrize("fault", ["missing", "twice", "negative"])
def test_answers_that_cannot_be_scored_are_refused(truth: pd.DataFrame, fault: str) -> None:
    table = predictions(0.0, 1.0)
    if fault == "missing":
        table = table.iloc[:1]
    elif fault == "twice":
        table = pd.concat([table, table.iloc[:1]])
    else:
        table.loc[0, "lr_q05"] = -1.0
    with pytest.raises(DataError, match="target"):
        library.score(truth, table)


def test_every_strategy_starts_from_the_same_cheapest_runs(pool: Pool) -> None:
    first, again, other = campaign(pool), campaign(pool), campaign(pool, seed=2)
    assert first.bought == again.bought
    assert first.bought != other.bought
    assert (pool.flops[first.bought] == pool.flops.min()).all()
    assert len({pool.specs[i].lr for i in first.bought}) >= 3


def test_a_run_is_bought_once_and_within_the_budget(pool: Pool) -> None:
    made = campaign(pool, share=0.005)
    with pytest.raises(SpecError, match="bought before"):
        made.buy(made.bought[0])
    with pytest.raises(SpecError, match="are left"):
        made.buy(int(np.argmax(pool.flops)))


@pytest.mark.parametrize("seed", range(8))
def test_a_budget_of_the_whole_pool_buys_every_run(pool: Pool, seed: int) -> None:
    """In whatever order, for whoever sums up what is left in another way."""
    cost = np.random.default_rng(seed).uniform(1.0, 2.0, size=pool.slice_of_run.max() + 1)
    odd = dataclasses.replace(pool, flops=pool.flops * cost[pool.slice_of_run])
    made = campaign(odd, share=1.0, seed=seed)
    left = made.left_flops
    for run in np.random.default_rng(seed).permutation(made.affordable()):
        assert odd.flops[run] <= left
        left -= odd.flops[run]
        made.buy(int(run))
    assert len(made.bought) == len(odd)
    assert len(made.affordable()) == 0


def test_a_budget_below_the_cheapest_run_is_refused(pool: Pool) -> None:
    with pytest.raises(SpecError, match="below the cheapest"):
        campaign(pool, share=1e-6)


def test_a_budget_that_buys_nothing_is_refused_before_anything_is_run(
    pool: Pool, truth: pd.DataFrame
) -> None:
    def never(made: Campaign) -> pd.DataFrame:
        raise AssertionError

    never.__module__ = "bayeslr"
    tasks = library.tasks_of({"never": never}, [0.02, 1e-6], [1])
    with pytest.raises(SpecError, match="below the cheapest"):
        next(library.replays(bench(pool, truth), tasks))


@pytest.mark.parametrize("name", list(library.STRATEGIES))
@pytest.mark.parametrize("share", [0.005, 0.03])
@pytest.mark.usefixtures("quick_fit")
def test_every_strategy_keeps_the_budget_and_answers(
    pool: Pool, truth: pd.DataFrame, name: str, share: float
) -> None:
    made = campaign(pool, share)
    found = library.score(truth, library.STRATEGIES[name](made))
    assert math.fsum(pool.flops[made.bought]) <= share * pool.total_flops
    assert len(set(made.bought)) == len(made.bought)
    assert 0 <= found.regret_mean < 0.5


def bench(pool: Pool, truth: pd.DataFrame) -> library.Bench:
    return library.Bench(pool=pool, targets=TARGETS, truth=truth, prior=CARD)


@pytest.mark.slow
def test_replays_of_a_seed_agree_in_this_process_and_in_others(
    pool: Pool, truth: pd.DataFrame
) -> None:
    tasks = library.tasks_of({"classical": library.classical}, [0.02], [3, 4])
    tables = [
        library.table_of(list(library.replays(bench(pool, truth), tasks, jobs=jobs)))
        for jobs in (1, 2)
    ]
    pd.testing.assert_frame_equal(*(table.drop(columns="seconds") for table in tables))


def test_a_strategy_that_breaks_is_told_and_copies_its_best_lr(
    pool: Pool, truth: pd.DataFrame
) -> None:
    def broken(made: Campaign) -> pd.DataFrame:
        raise ZeroDivisionError("no luck")

    task = library.Task(name="broken", strategy=broken, budget_share=0.02, seed=1)
    row = bench(pool, truth).run(task)
    assert row["failure"] == "ZeroDivisionError: no luck"
    assert row["regret_mean"] > 0
    (entry,) = library.summary(library.table_of([row]))
    assert entry["failures"] == 1
    assert _lines([entry])[1].endswith("failed in 1 of 1, the best LR copied instead")
    assert "failed" not in _lines([{**entry, "failures": 0}])[1]


@pytest.mark.slow
def test_the_normal_approximation_knows_the_law_of_its_runs(pool: Pool) -> None:
    made = campaign(pool)
    for number in range(int(pool.slice_of_run.max()) + 1):
        for run in pool.runs_of(number)[4:13:2]:
            if run not in made.bought:
                made.bought.append(int(run))
    posterior = normal_posterior(made.runs(), CARD, sizes={"run": 99}, seed=1)
    at = target_draws(posterior, TARGETS)
    wanted = [star(t.n_active, t.tokens, t.batch_tokens) for t in TARGETS]
    error = at.log_lr.mean(axis=0) - wanted
    # Within three of its own standard deviations at both targets: fails 1 in 200 if correct.
    assert (np.abs(error) < 3 * at.log_lr.std(axis=0)).all()
    before = prior_posterior(CARD, num_draws=600)
    assert (at.log_lr.std(axis=0) < 0.6 * target_draws(before, TARGETS).log_lr.std(axis=0)).all()


def test_the_classical_design_finds_the_law_where_it_can_pay(
    pool: Pool, truth: pd.DataFrame
) -> None:
    found = library.score(truth, library.classical(campaign(pool, share=0.5)))
    assert found.octave_error < 0.5
    assert found.regret_mean < 0.005


def test_copying_brackets_the_best_run(pool: Pool) -> None:
    made = campaign(pool)
    table = copied(made, made.bought)
    best = pool.specs[made.bought[int(np.argmin(made.losses()))]].lr
    assert table["lr"].to_numpy() == pytest.approx(best)
    assert (table["lr_q05"] <= best / 2 * 1.001).all()
    assert (table["lr_q95"] >= best * 2 / 1.001).all()


def test_our_strategy_has_the_name_that_sweeps_give_it_too() -> None:
    assert library.strategies("bayes") == library.strategies("bayeslr")


def test_an_unknown_strategy_lists_what_there_is() -> None:
    with pytest.raises(SpecError, match="there are all, bayeslr, random"):
        library.strategies("best")


def files(folder: Path, truth: pd.DataFrame) -> list[str]:
    pd.DataFrame(rows()).to_csv(folder / "runs.csv", index=False)
    names = ("target_id", "family", "n_active", "n_total", "tokens", "batch_tokens")
    pd.DataFrame([{k: getattr(t, k) for k in names} for t in TARGETS]).to_csv(
        folder / "targets.csv", index=False
    )
    truth.to_csv(folder / "truth.csv", index=False)
    return [
        "replay", str(folder / "runs.csv"), "--targets", str(folder / "targets.csv"), "--truth",
        str(folder / "truth.csv"), "--prior", CARD,
    ]  # fmt: skip


@pytest.mark.usefixtures("quick_fit")
def test_the_verb_prints_json_and_writes_curve_and_figure(
    tmp_path: Path, truth: pd.DataFrame
) -> None:
    words = files(tmp_path, truth)
    out, figure = tmp_path / "curve.csv", tmp_path / "curve.svg"
    done = CliRunner().invoke(
        app,
        [*words, "--budget", "0.01", "--budget", "0.02", "--strategy", "classical", "--seeds", "2",
         "--json", "-o", str(out), "--plot", str(figure)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    entries = json.loads(done.stdout.strip().splitlines()[-1])["strategies"]
    assert [(e["strategy"], e["budget_share"]) for e in entries] == [
        ("classical", 0.01), ("classical", 0.02),
    ]  # fmt: skip
    assert {"regret_mean", "regret_worst", "cover_90", "interval_score", "runs"} <= set(entries[0])
    assert len(pd.read_csv(out)) == 4
    assert "<svg" in figure.read_text()


def test_a_figure_shows_strategies_that_score_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    scores = {"regret_mean": 0.002, "cover_90": 1.0, "interval_score": 2.5}
    library.plot(
        pd.DataFrame(
            [
                {"strategy": name, "budget_share": share, "seed": 1, **scores}
                for name in ("one", "other") for share in (0.003, 0.01)
            ]
        ),
        tmp_path / "f.png",
    )  # fmt: skip
    (figure,) = drawn
    for axes in figure.axes:
        one, other, *_ = (np.asarray(line.get_xdata()) for line in axes.lines)
        assert (one < other).all()
        assert axes.get_legend() is None  # it hid the lines
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "other"]


@pytest.mark.usefixtures("quick_fit")
def test_scores_are_printed_before_a_figure_that_cannot_be_written(
    tmp_path: Path, truth: pd.DataFrame
) -> None:
    words, figure = files(tmp_path, truth), tmp_path / "no" / "curve.svg"
    done = CliRunner().invoke(
        app, [*words, "--strategy", "classical", "--seeds", "1", "--plot", str(figure)]
    )
    assert isinstance(done.exception, StorageError)
    assert "classical" in done.stdout


def test_a_truth_without_a_target_is_refused(tmp_path: Path, truth: pd.DataFrame) -> None:
    files(tmp_path, truth.iloc[: len(LRS)])
    targets = read_targets(tmp_path / "targets.csv")
    with pytest.raises(DataError, match=f"t{2**19}"):
        library.read_truth(tmp_path / "truth.csv", targets)


@pytest.mark.usefixtures("quick_fit")
def test_a_truth_without_a_valley_is_refused(tmp_path: Path, truth: pd.DataFrame) -> None:
    files(tmp_path, truth)
    targets, path = read_targets(tmp_path / "targets.csv"), tmp_path / "truth.csv"
    pd.concat([truth, truth.iloc[:1]]).to_csv(path, index=False)
    with pytest.raises(DataError, match="two runs at lr"):
        library.read_truth(path, targets)
    pd.concat([truth, truth.iloc[:1].assign(diverged=True)]).to_csv(path, index=False)
    with pytest.raises(DataError, match="two runs at lr"):
        library.read_truth(path, targets)
    truth.iloc[len(LRS) - 1 :].to_csv(path, index=False)
    with pytest.raises(DataError, match="has 1 finished run; a valley"):
        library.read_truth(path, targets)


def test_the_targets_that_were_asked_for_are_scored(tmp_path: Path, truth: pd.DataFrame) -> None:
    words = files(tmp_path, truth)
    targets = pd.read_csv(tmp_path / "targets.csv").iloc[:1].assign(target_id=7)
    targets.to_csv(tmp_path / "targets.csv", index=False)
    first = truth["target_id"] == truth["target_id"].iloc[0]
    truth.assign(target_id=np.where(first, 7, 8)).to_csv(tmp_path / "truth.csv", index=False)
    done = CliRunner().invoke(app, [*words, "--strategy", "classical", "--seeds", "1"])
    assert done.exit_code == 0, done.output
    assert "also holds 1 target that --targets does not" in done.stderr
    assert "failed" not in done.stderr


def test_a_raw_step_law_table_is_recognised(tmp_path: Path) -> None:
    lines = ["h,numl,lr,bs,smooth loss,exp_name,D,N"]
    lines += [
        f"960,7,{lr:.6g},{bs},{loss(2e8, 4e9, bs * 2048, lr):.4f},r{i}-{bs},4e9,2e8"
        for bs in (64, 128) for i, lr in enumerate(LRS)
    ]  # fmt: skip
    path = tmp_path / "train.csv"
    path.write_text("\n".join(lines) + "\n")
    pool = library.read_pool(path)
    assert len(pool) == 2 * len(LRS)
    assert pool.flops[0] == pytest.approx(6 * 2e8 * 4e9)


def test_a_pool_may_name_schedules_that_no_runner_knows() -> None:
    odd, wsd, none = rows()[:3]
    odd |= {"schedule": "to zero, in two steps"}
    wsd |= {"schedule": "wsd", "weight_decay": 0.0}
    specs = make_pool(make_table([odd, wsd, none])).specs
    assert [spec.schedule for spec in specs] == ["cosine", "wsd", "cosine"]
    assert [spec.weight_decay for spec in specs] == [0.1, 0.0, 0.1]
