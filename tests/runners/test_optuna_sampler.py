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

import optuna
import pytest
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
                                          for t in r["targets"]], "verdict": ""}), flush=True)
        continue
    top = max(c["n_active"] for c in r["candidates"])
    big = [i for i, c in enumerate(r["candidates"]) if c["n_active"] == top]
    chosen = [big[(r["choice_seed"] + k) % len(big)] for k in range(r["num_runs"])]
    print(json.dumps({"chosen": chosen, "reasons": [f"after {len(r['runs'])}"] * len(chosen),
                      "regret_now": 0.1, "verdict": ""}), flush=True)
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


def test_user_attributes_say_what_a_run_was() -> None:
    sent: list[Any] = []

    class Child:
        def ask(self, request: Any) -> dict[str, Any]:
            sent.append(request)
            return {"predictions": []}

    made = sampler(describe=None)
    made._child = Child()  # type: ignore[assignment]
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
            return {"chosen": [0], "reasons": [""]}

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


def prune_study(losses: dict[float, float]) -> optuna.Study:
    s = optuna.create_study(pruner=ValleyPruner())
    for lr, loss in losses.items():
        s.add_trial(
            optuna.trial.create_trial(
                params={"lr": lr},
                distributions={"lr": optuna.distributions.FloatDistribution(1e-5, 1.0, log=True)},
                value=loss, intermediate_values={10: loss}, state=TrialState.COMPLETE,
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


def test_with_few_lrs_nothing_is_stopped() -> None:
    s = prune_study({1e-3: 2.1, 3e-3: 2.0})
    trial = s.ask({"lr": optuna.distributions.FloatDistribution(0.1, 0.11, log=True)})
    trial.report(5.0, step=10)
    assert trial.should_prune() is False
