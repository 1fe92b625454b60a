"""The sampler and the pruner in plain Optuna studies; inference answered by a stand-in child."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from bayeslr.errors import SpecError
from bayeslr_runners.optuna_sampler import ScalingLawSampler, ValleyPruner

TARGETS = [{"n_active": 1e9, "n_total": 4e9, "tokens": 1e11, "batch_tokens": 1e6}]

# Chooses by the seed that it is given, of the candidates of the largest model.
STAND_IN = """
import json, sys
for line in sys.stdin:
    r = json.loads(line)
    if r["op"] == "predict":
        print(json.dumps({"predictions": [{"target_id": t["target_id"], "lr": 1e-3}
                                          for t in r["targets"]], "covariates": [],
                          "verdict": "fine", "trustworthy": True, "set_aside": ""}), flush=True)
        continue
    top = max(c["n_active"] for c in r["candidates"])
    big = [i for i, c in enumerate(r["candidates"]) if c["n_active"] == top]
    chosen = [big[(r["choice_seed"] + k) % len(big)] for k in range(r["num_runs"])]
    print(json.dumps({"chosen": chosen, "reasons": [f"after {len(r['runs'])}"] * len(chosen),
                      "regret_now": 0.1, "verdict": "", "set_aside": ""}), flush=True)
"""
COMMAND = (sys.executable, "-c", STAND_IN)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def describe(params: Any) -> dict[str, float]:
    n = params["n_active"]
    return {"n_total": 4 * n, "tokens": 20 * n, "batch_tokens": 65536}


def objective(trial: optuna.Trial) -> float:
    n = trial.suggest_categorical("n_active", [1e6, 4e6, 1.6e7])
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    return 2 + n**-0.1 + 0.02 * math.log(lr / (1e-2 * (n / 1e6) ** -0.3)) ** 2


def sampler(**changes: Any) -> ScalingLawSampler:
    given = {"targets": TARGETS, "describe": describe, "num_startup_trials": 3, "seed": 5}
    return ScalingLawSampler(**{**given, "command": COMMAND, **changes})


def study(storage: str | None, made: ScalingLawSampler) -> optuna.Study:
    return optuna.create_study(
        storage=storage, study_name="s", sampler=made, load_if_exists=storage is not None
    )


def params(s: optuna.Study) -> list[dict[str, Any]]:
    return [t.params for t in s.get_trials(deepcopy=False)]


def test_it_starts_at_random_then_asks_the_law_and_says_why() -> None:
    made = sampler()
    s = study(None, made)
    s.optimize(objective, n_trials=6)
    assert [t.user_attrs.get("reason") for t in s.trials] == [None] * 3 + [
        "after 3", "after 4", "after 5",
    ]  # fmt: skip
    assert all(p["n_active"] == 1.6e7 for p in params(s)[3:])
    assert made.predict(s)[0]["lr"] == 1e-3
    made.close()


def test_a_study_resumed_by_another_process_goes_on_with_the_same_stream(tmp_path: Path) -> None:
    whole = study(f"sqlite:///{tmp_path / 'a.db'}", sampler())
    whole.optimize(objective, n_trials=7)
    for trials in (2, 3, 2):
        made = sampler()
        part = study(f"sqlite:///{tmp_path / 'b.db'}", made)
        part.optimize(objective, n_trials=trials)
        made.close()
    assert params(part) == params(whole)
    other = study(None, sampler(seed=6))
    other.optimize(objective, n_trials=7)
    assert params(other) != params(whole)


def test_nothing_is_proposed_twice_until_the_space_is_used_up() -> None:
    s = study(None, sampler(lr_per_octave=1, num_startup_trials=1))
    s.optimize(objective, n_trials=12)
    shown = [(p["n_active"], float(f"{p['lr']:.4g}")) for p in params(s)]
    assert len(set(shown)) == len(shown)


def test_runs_under_way_are_not_told_twice() -> None:
    s = study(None, sampler(num_startup_trials=1))
    s.optimize(objective, n_trials=1)
    trials = [s.ask() for _ in range(4)]
    for trial in trials:
        objective(trial)
    found = [t.params["lr"] for t in trials]
    assert len(set(found)) == len(found)


def test_runs_under_way_are_told_as_they_are() -> None:
    """Those whose LR is not known yet will get the best that is left: so many are passed over."""
    made = sampler(num_startup_trials=1)
    sent = listened_to(made, chosen=[0, 1, 2], reasons=["first", "second", "third"])
    s = study(None, made)
    s.optimize(objective, n_trials=1)
    objective(one := s.ask())
    objective(other := s.ask())
    s.ask()  # has not asked for its parameters yet
    objective(s.ask())
    lrs = [trial.params["lr"] for trial in (one, other)]
    told = [[spec["lr"] for spec in request["under_way"]] for request in sent]
    assert told == [[], lrs[:1], lrs]
    assert [request["num_runs"] for request in sent] == [1, 1, 2]
    assert sent[1]["under_way"][0]["n_active"] == one.params["n_active"]


def test_what_a_killed_process_was_training_is_proposed_again(tmp_path: Path, root: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    made = sampler(describe=one_model, num_startup_trials=2, command=("none",))
    s = study(url, made)
    s.optimize(good, n_trials=2)
    code = (
        "import os\n"
        "from tests.runners.test_optuna_sampler import *\n"
        "made = sampler(describe=one_model, num_startup_trials=2)\n"
        "listened_to(made, chosen=[0], reasons=['best'])\n"
        f"study({url!r}, made).optimize(lambda t: (lr_of(t), os.kill(os.getpid(), 9)), n_trials=1)"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == -9
    sent = listened_to(made, chosen=[0], reasons=["best"])
    s.optimize(good, n_trials=1)
    assert [t.state.name for t in s.trials] == ["COMPLETE"] * 2 + ["RUNNING"] * 2 + ["COMPLETE"]
    assert len({p["lr"] for p in params(s)[2:]}) == 1
    assert sent[0]["num_runs"] == 1


def listened_to(made: ScalingLawSampler, **reply: Any) -> list[Any]:
    """The requests of a sampler, from here on, each answered with ``reply``."""
    sent: list[Any] = []
    given = {"predictions": [], "covariates": [], "verdict": "", "trustworthy": True,
             "set_aside": "", **reply}  # fmt: skip

    class Child:
        def ask(self, request: Any) -> dict[str, Any]:
            sent.append(request)
            return given

    made._child = Child()  # type: ignore[assignment]
    return sent


def test_user_attributes_say_what_a_run_was() -> None:
    made = sampler(describe=None)
    sent = listened_to(made)
    s = optuna.create_study(sampler=made)

    def tagged(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        n = 1e6 * (1 + trial.number)
        for name, value in {"n_active": n, "n_total": n, "tokens": 2e7, "batch_tokens": 4096}.items():  # noqa: E501  # fmt: skip
            trial.set_user_attr(name, value)
        if trial.number == 1:
            trial.report(math.nan, step=10)
            raise optuna.TrialPruned
        return lr

    s.optimize(tagged, n_trials=3)
    made.predict(s)
    rows = sent[-1]["runs"]
    assert [r["n_active"] for r in rows] == [1e6, 2e6, 3e6]
    assert [r["status"] for r in rows] == ["ok", "diverged", "ok"]
    assert rows[1]["loss"] is None


def test_weight_decay_and_lr_multipliers_are_known_of_runs_and_of_proposals() -> None:
    made = sampler(num_startup_trials=2)
    sent = listened_to(
        made, chosen=[0], reasons=["told"], predictions=[{"target_id": "target1"}],
        covariates=[{"target_id": "target1", "covariate": "weight_decay"}],
    )  # fmt: skip
    s = study(None, made)

    def decayed(trial: optuna.Trial) -> float:
        trial.suggest_float("weight_decay", 0.0, 0.4)
        trial.suggest_categorical("lr_multiplier_router", [0.5, 2.0])
        return objective(trial)

    s.optimize(decayed, n_trials=3)
    request = sent[0]
    for row, p in zip(request["runs"], params(s), strict=False):
        assert row["weight_decay"] == p["weight_decay"]
        assert row["lr_multiplier_router"] == p["lr_multiplier_router"]
    specs = request["candidates"]
    assert {round(c["weight_decay"], 9) for c in specs} == {0.0, 0.1, 0.2, 0.3, 0.4}
    multipliers = [c["options"]["lr_multipliers"] for c in specs]
    assert {m["router"] for m in multipliers} == {0.5, 2.0}
    assert s.trials[2].user_attrs["reason"] == "told"
    (row,) = made.predict(s)
    assert row["covariates"] == [{"target_id": "target1", "covariate": "weight_decay"}]


@pytest.mark.parametrize("value", [-0.1, "much", math.nan])
def test_a_weight_decay_that_is_none_is_named(value: Any) -> None:
    made = sampler(num_startup_trials=1, describe=lambda p: {**describe(p), "weight_decay": value})
    s = study(None, made)
    s.optimize(objective, n_trials=2)
    assert "for weight_decay (a number >= 0)" in s.trials[1].user_attrs["reason"]
    made.close()


def test_a_study_can_be_imported_by_what_its_runs_were_taken_for(tmp_path: Path) -> None:
    from bayeslr.importers import optuna as importer

    s = study(f"sqlite:///{tmp_path / 'old.db'}", sampler())
    s.optimize(objective, n_trials=4)
    table = importer.read(tmp_path / "old.db")
    assert len(table.frame) == 4
    assert not len(table.quarantine)
    for trial, row in zip(s.trials, table.frame.to_dict("records"), strict=True):
        wanted = {"lr": trial.params["lr"], "loss": trial.value, **describe(trial.params)}
        assert {name: row[name] for name in wanted} == pytest.approx(wanted)


STORAGES = {
    "memory": lambda path: None,
    "sqlite": lambda path: f"sqlite:///{path}",
    "journal": lambda path: JournalStorage(JournalFileBackend(str(path))),
}
SPACE = {"lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)}


def rows(made: ScalingLawSampler, s: optuna.Study) -> list[dict[str, Any]]:
    """Rows of the run table that the child would get."""
    found: list[dict[str, Any]] = made._request(s.get_trials())["runs"]
    return found


def one_model(params: Any) -> dict[str, float]:
    return {"n_active": 1e6, "n_total": 1e6, "tokens": 2e7, "batch_tokens": 4096}


def lr_of(trial: optuna.Trial) -> float:
    return trial.suggest_float("lr", 1e-4, 1e-1, log=True)


def good(trial: optuna.Trial) -> float:
    return 2 + 0.02 * math.log(lr_of(trial) / 1e-2) ** 2


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_diverged_run_and_not_proposed_again(
    storage: str, loss: float, tmp_path: Path
) -> None:
    made = sampler(describe=one_model, num_startup_trials=2)
    s = study(STORAGES[storage](tmp_path / "s"), made)
    s.optimize(lambda t: good(t) if t.number < 2 else lr_of(t) * loss, n_trials=6)
    assert [t.user_attrs.get("status") for t in s.trials] == [None] * 2 + ["diverged"] * 4
    assert len({p["lr"] for p in params(s)}) == 6
    assert [(r["status"], r["loss"]) for r in rows(made, s)[2:]] == [("diverged", None)] * 4
    assert s.trials[5].user_attrs["reason"] == "after 5"
    made.close()


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_the_importer_counts_what_diverged_as_the_sampler_does(
    storage: str, tmp_path: Path
) -> None:
    from bayeslr.importers import optuna as importer

    made = sampler(describe=one_model)
    s = study(STORAGES[storage](tmp_path / "s"), made)

    def mixed(trial: optuna.Trial) -> float:
        lr = lr_of(trial)
        if trial.number == 1:
            raise RuntimeError("out of memory")
        if trial.number == 2:
            trial.report(math.nan, step=1)
            raise optuna.TrialPruned
        return {3: math.nan, 4: math.inf}.get(trial.number, 2 + lr)

    s.optimize(mixed, n_trials=5, catch=(RuntimeError,))
    table = importer.read(tmp_path / "s")
    statuses = ["ok", "failed", "diverged", "diverged", "diverged"]
    assert table.frame["status"].tolist() == statuses
    assert [r["status"] for r in rows(made, s)] == [n for n in statuses if n != "failed"]


def test_another_process_sees_what_diverged(tmp_path: Path, root: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    made = sampler(describe=one_model)
    s = study(url, made)
    code = (
        "from math import nan\n"
        "from tests.runners.test_optuna_sampler import lr_of, one_model, sampler, study\n"
        f"s = study({url!r}, sampler(describe=one_model))\n"
        "s.optimize(lambda trial: nan * lr_of(trial), n_trials=2)\n"
    )
    for worker in [subprocess.Popen([sys.executable, "-c", code], cwd=root) for _ in range(2)]:
        assert worker.wait() == 0
    assert [r["status"] for r in rows(made, s)] == ["diverged"] * 4


def test_the_sampler_within_another_still_sees_what_was_returned() -> None:
    made = sampler(describe=one_model)
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        outer = optuna.samplers.PartialFixedSampler({"lr": 1e-3}, made)
    s = optuna.create_study(sampler=outer)
    s.optimize(lambda t: lr_of(t) * math.nan, n_trials=1)
    assert s.trials[0].user_attrs["status"] == "diverged"


def test_ask_and_tell_know_divergence_too() -> None:
    made = sampler(describe=one_model)
    s = optuna.create_study(sampler=made)
    first, second, third = s.ask(SPACE), s.ask(SPACE), s.ask(SPACE)
    with pytest.warns(UserWarning, match="nan is not acceptable"):
        s.tell(first, math.nan)
    s.tell(second, state=TrialState.FAIL)
    third.report(math.inf, step=1)
    s.tell(third, state=TrialState.FAIL)
    assert [r["run_id"] for r in rows(made, s)] == ["trial-0", "trial-2"]
    made.close()


def test_a_run_that_raises_is_tried_twice_and_says_nothing_of_its_lr() -> None:
    made = sampler(describe=one_model, num_startup_trials=1)
    s = optuna.create_study(sampler=made)

    def broken(trial: optuna.Trial) -> float:
        lr = trial.suggest_categorical("lr", [1e-3, 2e-3, 4e-3])
        if trial.number:
            raise RuntimeError("out of memory")
        return 2 + lr

    s.optimize(broken, n_trials=6, catch=(RuntimeError,))
    reasons = [t.user_attrs["reason"] for t in s.trials[1:]]
    assert reasons[:4] == ["after 1"] * 4
    assert reasons[4] == "drawn at random: every run of the space has been made; widen it"
    assert len(rows(made, s)) == 1
    made.close()


def test_the_error_of_a_run_that_breaks_early_is_the_one_that_is_told() -> None:
    """Before the parameters that describe needs."""
    s = optuna.create_study(sampler=sampler())

    def broken(trial: optuna.Trial) -> float:
        lr_of(trial)
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own"):
        s.optimize(broken, n_trials=1)


LRS = {
    "choices": lambda t: t.suggest_categorical("lr", [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]),
    "step": lambda t: t.suggest_float("lr", 5e-4, 1.61e-2, step=3e-4),
    "linear": lambda t: t.suggest_float("lr", 1e-4, 1e-2),
    "whole": lambda t: t.suggest_int("lr", 1, 9),
    "log": lr_of,
}


@pytest.mark.parametrize("kind", LRS)
def test_every_distribution_of_the_lr_is_proposed_from(kind: str) -> None:
    """What is not among its values Optuna would replace by a random one."""
    made = sampler(describe=one_model, num_startup_trials=1)
    asked: list[tuple[Any, Any]] = []

    def ask(trial: optuna.Trial) -> float:
        lr = LRS[kind](trial)
        asked.append((trial.relative_params.get("lr"), lr))
        return float(2 + lr)

    optuna.create_study(sampler=made).optimize(ask, n_trials=5)
    assert all(proposed == lr for proposed, lr in asked[1:])
    assert len({lr for _, lr in asked[1:]}) == 4
    made.close()


@pytest.mark.parametrize(
    ("suggest", "found"),
    [
        (lambda t: t.suggest_float("lr", 0.0, 1e-2), "its range has 0.0"),
        (lambda t: t.suggest_float("lr", -10, -2), "its range has -10.0"),
        (lambda t: t.suggest_int("lr", 1, 64), "its range has 64"),
        (lambda t: t.suggest_categorical("lr", ["1e-3", "2e-3"]), "its choices has '1e-3'"),
        (lambda t: t.suggest_categorical("lr", [1e-3, None]), "its choices has None"),
    ],
)
def test_what_is_no_lr_is_told_before_anything_is_trained(suggest: Any, found: str) -> None:
    s = optuna.create_study(sampler=sampler())
    with pytest.raises(SpecError, match=rf"lr must be .*{re.escape(found)}.*suggest_float\('lr'"):
        s.optimize(suggest, n_trials=1)


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"]])
def test_a_study_of_anything_but_one_loss_is_refused(directions: list[str]) -> None:
    made = sampler(describe=one_model)
    s = optuna.create_study(sampler=made, directions=directions)
    told = f"must minimise one value.* direction is {', '.join(directions)}"
    with pytest.raises(SpecError, match=told):
        s.optimize(good, n_trials=1)
    with pytest.raises(SpecError, match=told):
        made.predict(s)
    with pytest.raises(SpecError, match=told):
        ValleyPruner().prune(s, s.trials[0])


def test_fixed_parameters_are_described_and_unknown_ones_drawn() -> None:
    made = sampler(num_startup_trials=1)
    s = optuna.create_study(sampler=made)

    def ask(trial: optuna.Trial) -> float:
        trial.suggest_categorical("n_active", [1e6])
        trial.suggest_float("dropout", 0.0, 0.4)
        trial.suggest_categorical("optimizer", ["muon"])
        return good(trial)

    s.optimize(ask, n_trials=12)
    assert all(t.user_attrs["reason"].startswith("after") for t in s.trials[1:])
    assert len({p["dropout"] for p in params(s)[1:]}) > 2
    assert {r["optimizer"] for r in rows(made, s)} == {"muon"}
    made.close()


def test_a_space_too_large_to_list_is_drawn_from() -> None:
    made = sampler(describe=one_model, num_startup_trials=1)
    s = optuna.create_study(sampler=made)

    def ask(trial: optuna.Trial) -> float:
        for i in range(40):
            trial.suggest_float(f"x{i}", 0.0, 1.0)
        return good(trial)

    s.optimize(ask, n_trials=2)
    assert s.trials[1].user_attrs["reason"] == "after 1"
    made.close()


NUMBERS = one_model({})


@pytest.mark.parametrize(
    ("describe", "lr", "why"),
    [
        (lambda p: {**NUMBERS, "tokens": math.nan}, "lr", "nan for tokens"),
        (lambda p: {**NUMBERS, "batch_tokens": "64K"}, "lr", "'64K' for batch_tokens"),
        (lambda p: {**NUMBERS, "seq_len": "2K"}, "lr", "'2K' for seq_len"),
        (lambda p: {**NUMBERS, "tokens": p["steps"]}, "lr", "KeyError: 'steps'"),
        (lambda p: None, "lr", "TypeError: 'NoneType'"),
        (one_model, "learning_rate", "share no parameter 'learning_rate'"),
    ],
)
def test_what_is_wrong_with_a_description_is_told_and_the_trial_is_random(
    describe: Any, lr: str, why: str
) -> None:
    made = sampler(describe=describe, lr=lr, num_startup_trials=1)
    s = optuna.create_study(sampler=made)
    s.optimize(good, n_trials=2)
    assert s.trials[1].user_attrs["reason"].startswith("drawn at random: ")
    assert why in s.trials[1].user_attrs["reason"]
    with pytest.raises(SpecError, match=r"for tokens|batch_tokens|seq_len|describe|peak LR"):
        made.predict(s)


def test_numbers_of_numpy_are_numbers() -> None:
    made = sampler(
        describe=lambda p: {k: np.int64(v) for k, v in one_model(p).items()}, num_startup_trials=1
    )
    s = optuna.create_study(sampler=made)
    s.optimize(good, n_trials=2)
    assert s.trials[1].user_attrs["reason"] == "after 1"
    made.close()


def test_threads_do_not_make_a_run_twice() -> None:
    made = sampler(describe=one_model, num_startup_trials=1)
    s = optuna.create_study(sampler=made)
    s.optimize(good, n_trials=1)
    s.optimize(good, n_trials=8, n_jobs=2)
    assert len({p["lr"] for p in params(s)}) == 9
    made.close()


def test_enqueued_runs_are_made_and_counted() -> None:
    made = sampler(describe=one_model, num_startup_trials=2)
    s = optuna.create_study(sampler=made)
    for lr in (2e-3, 3e-3):
        s.enqueue_trial({"lr": lr})
    s.optimize(good, n_trials=3)
    assert [p["lr"] for p in params(s)[:2]] == [2e-3, 3e-3]
    assert s.trials[2].user_attrs["reason"] == "after 2"
    made.close()


def test_a_sampler_serves_one_study_after_another() -> None:
    made = sampler(describe=one_model, num_startup_trials=1)
    for low in (1e-4, 1e-5):
        s = optuna.create_study(sampler=made)
        s.optimize(lambda t, low=low: t.suggest_float("lr", low, 1e-2, log=True), n_trials=2)
        assert s.trials[1].user_attrs["reason"] == "after 1"
    made.close()


def test_doubts_about_a_prediction_are_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit that failed its gate each time, the same rows set aside once."""
    doubted = {
        "predictions": [{"target_id": "a", "lr": 1e-3}], "covariates": [], "trustworthy": False,
        "verdict": "Do not trust it.", "set_aside": "1 row: too few tokens",
    }  # fmt: skip
    made = sampler(describe=one_model)
    monkeypatch.setattr(made._child, "ask", lambda request: doubted)
    s = optuna.create_study(sampler=made)
    for _ in range(2):
        (row,) = made.predict(s)
    assert (row["lr"], row["trustworthy"], row["verdict"]) == (1e-3, False, "Do not trust it.")
    doubt = "this prediction is not to be relied on. Do not trust it."
    assert caplog.messages == ["set aside, and not fitted:\n1 row: too few tokens", doubt, doubt]


def test_what_is_not_known_of_a_run_is_asked_for() -> None:
    made = sampler(describe=None)
    s = optuna.create_study(sampler=made)
    s.optimize(lambda t: t.suggest_float("lr", 1e-4, 1e-1, log=True), n_trials=1)
    with pytest.raises(SpecError, match="trial 0 lacks n_active"):
        made.predict(s)


def test_a_child_that_dies_leaves_random_trials_and_a_message() -> None:
    made = sampler(command=(sys.executable, "-c", ""), num_startup_trials=1)
    s = study(None, made)
    s.optimize(objective, n_trials=3)
    assert len(s.trials) == 3
    with pytest.raises(SpecError, match="inference process ended"):
        made.predict(s)


def test_targets_must_say_what_they_are() -> None:
    with pytest.raises(SpecError, match=r"targets\[0\] lacks tokens"):
        ScalingLawSampler(targets=[{"n_active": 1e9, "n_total": 1e9}])


def test_the_server_answers_and_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from bayeslr import sampling, serve
    from bayeslr.predict import prior_posterior

    monkeypatch.setattr(
        sampling, "fit", lambda runs, prior, **_: prior_posterior(prior, num_draws=300)
    )
    made = sampler()
    requests: list[Any] = []

    class Child:
        def ask(self, request: Any) -> dict[str, Any]:
            requests.append(request)
            return {"chosen": [0], "reasons": [""], "set_aside": ""}

    made._child = Child()  # type: ignore[assignment]
    s = study(None, made)
    s.optimize(objective, n_trials=4)
    request = {**requests[-1], "num_runs": 2}
    broken = {**request, "targets": [{**request["targets"][0], "tokens": -1}]}
    short = {name: value for name, value in request.items() if name != "targets"}
    lines = [json.dumps(r) for r in (request, broken, short, {**request, "op": "x"})]
    lines += ["{", json.dumps({**request, "runs": 3})]
    replies = io.StringIO()
    serve.serve(io.StringIO("\n".join(lines) + "\n"), replies)
    first, *rest = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert len(set(first["chosen"])) == 2
    assert "tokens must be finite and > 0" in rest[0]["error"]
    assert "targets is missing" in rest[1]["error"]
    assert "op must be" in rest[2]["error"]
    assert "not a request" in rest[3]["error"]
    assert "runs must be a list of JSON objects, got 3" in rest[4]["error"]


@pytest.mark.slow
def test_the_example_of_the_docs_runs(tmp_path: Path, root: Path) -> None:
    """As it stands in docs/sweeps.md; the law is made up, so the best LR is known."""
    text = (root / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert " is random: " not in done.stderr
    low, high = map(float, re.findall(r"between (\S+) and (\S+) with", done.stdout)[0])
    # A 90 % interval; the seed is fixed.
    assert low < 1e-2 * 1000**-0.3 < high


# ------------------------------------------------------------------------------- pruner


def prune_study(losses: dict[float, float], **attributes: Any) -> optuna.Study:
    s = optuna.create_study(pruner=ValleyPruner())
    for lr, loss in losses.items():
        s.add_trial(
            optuna.trial.create_trial(
                params={"lr": lr},
                distributions={"lr": optuna.distributions.FloatDistribution(1e-5, 1.0, log=True)},
                value=loss, intermediate_values={10: loss}, state=TrialState.COMPLETE,
                user_attrs=attributes,
            )
        )  # fmt: skip
    return s


@pytest.mark.parametrize(
    ("lr", "loss", "stopped"),
    [
        (3e-2, 2.5, True),  # far up the high side, with 1e-2 between it and the best
        (3e-2, 2.05, False),  # not far enough up
        (2e-3, 2.5, False),  # the best's neighbour: a bracket
        (1e-4, 2.5, True),  # far up the low side
        (2e-3, math.nan, True),
    ],
)
def test_only_runs_that_the_valley_has_no_use_for_are_stopped(
    lr: float, loss: float, stopped: bool
) -> None:
    s = prune_study({1e-3: 2.1, 3e-3: 2.0, 1e-2: 2.1, 3e-4: 2.2})
    trial = s.ask({"lr": optuna.distributions.FloatDistribution(lr, lr * 1.0001, log=True)})
    trial.report(loss, step=10)
    assert trial.should_prune() is stopped


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [("weight_decay", 0.1, 0.3), ("family", "adamw", "muon"), ("optimizer", "adamw", "muon"),
     ("parametrization", "sp", "mup"), ("d_model", 64, 128)],
)  # fmt: skip
def test_runs_that_are_another_thing_are_another_valley(name: str, value: Any, other: Any) -> None:
    s = prune_study({1e-3: 2.1, 3e-3: 2.0, 1e-2: 2.1, 3e-4: 2.2}, **{name: value})
    for own, stopped in ((other, False), (value, True)):
        trial = s.ask({"lr": optuna.distributions.FloatDistribution(3e-2, 3.1e-2, log=True)})
        trial.set_user_attr(name, own)
        trial.report(2.5, step=10)
        assert trial.should_prune() is stopped


def test_the_pruner_describes_runs_as_the_sampler_does() -> None:
    """Runs that have ended carry what the sampler noted of them; those under way do not yet."""
    made = sampler(num_startup_trials=99)
    s = optuna.create_study(sampler=made, pruner=ValleyPruner())
    for lr in (1e-3, 3e-3, 1e-2, 3e-4, 3e-2):
        s.enqueue_trial({"n_active": 1e6, "lr": lr})

    def ask(trial: optuna.Trial) -> float:
        trial.suggest_categorical("n_active", [1e6])
        loss = 2 + 0.1 * math.log(trial.suggest_float("lr", 1e-4, 1e-1, log=True) / 3e-3) ** 2
        trial.report(loss, step=1)
        if trial.should_prune():
            raise optuna.TrialPruned
        return loss

    s.optimize(ask, n_trials=5)
    assert [t.state for t in s.trials] == [TrialState.COMPLETE] * 3 + [TrialState.PRUNED] * 2
    made.close()


def test_with_few_lrs_nothing_is_stopped() -> None:
    s = prune_study({1e-3: 2.1, 3e-3: 2.0})
    trial = s.ask({"lr": optuna.distributions.FloatDistribution(0.1, 0.11, log=True)})
    trial.report(5.0, step=10)
    assert trial.should_prune() is False
