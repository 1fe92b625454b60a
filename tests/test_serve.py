"""Inference for other processes: what is answered, and what is said of a wrong request."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import pytest

from bayeslr import sampling, serve
from bayeslr.errors import UntrustworthyFit
from bayeslr.predict import prior_posterior
from tests.model_fixtures import run_record

TARGET = {
    "target_id": "big", "n_active": 1e9, "n_total": 4e9, "tokens": 1e11, "batch_tokens": 1e6,
}  # fmt: skip
SPEC = {
    "run_id": "r", "family": "made-up", "runner": "toy", "lr": 1e-3, "tokens": 2_000_000_000,
    "batch_tokens": 100_000, "n_active": 100_000_000, "n_total": 400_000_000, "seq_len": 128,
}  # fmt: skip
REQUEST: dict[str, Any] = {
    "op": "choose", "runs": [run_record("r0", 1e8, 2e9, 1e5, 1e-3, 3.0)], "prior": "weak",
    "seed": 1, "targets": [TARGET], "num_runs": 1, "choice_seed": 7, "flops": [1e18, 1e18],
    "candidates": [SPEC, {**SPEC, "lr": 2e-3}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sampling, "fit", lambda runs, prior, **_: prior_posterior(prior, num_draws=300)
    )


def ask(**changes: Any) -> dict[str, Any]:
    """Reply to REQUEST with these changes, which must be JSON."""
    replies = io.StringIO()
    serve.serve(io.StringIO(json.dumps({**REQUEST, **changes}) + "\n"), replies)
    found: dict[str, Any] = json.loads(replies.getvalue(), parse_constant=pytest.fail)
    return found


def without(document: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != name}


def test_no_candidate_is_answered_with_null_and_a_reason() -> None:
    reply = ask(candidates=[], flops=[])
    assert (reply["chosen"], reply["regret_now"]) == ([], None)
    assert reply["stop_reason"] == "every run of the space has been made"


def test_what_is_not_known_is_null_and_small_numbers_stay() -> None:
    reply = ask(op="predict", targets=[{**TARGET, "tokens": 1e30, "batch_tokens": 1e29}])
    (row,) = reply["predictions"]
    assert row["extrapolation"] is None
    assert 0 < row["lr_q05"] < 1e-8


def test_runs_that_break_a_rule_are_told() -> None:
    (run,) = REQUEST["runs"]
    assert ask()["set_aside"] == ""
    reply = ask(runs=[run, {**run, "run_id": "r1", "loss": 90.0}])
    assert "1 row: the loss of an ok run is not far above" in reply["set_aside"]


def fits(monkeypatch: pytest.MonkeyPatch, good: dict[bool, bool]) -> list[bool]:
    """The kinds of fit asked for (fast or not), of which those that ``good`` says pass the gate."""
    asked: list[bool] = []

    def fit(runs: Any, prior: str, *, fast: bool = False, **_: Any) -> Any:
        asked.append(fast)
        found = prior_posterior(prior, num_draws=300)
        told = {"trustworthy": good[fast], "verdict": "good" if good[fast] else "Do not trust it."}
        return dataclasses.replace(found, info={**found.info, **told})

    monkeypatch.setattr(sampling, "fit", fit)
    return asked


@pytest.mark.parametrize(
    ("good", "asked"), [({True: True}, [True]), ({True: False, False: True}, [True, False])]
)
def test_a_choice_is_made_by_a_fit_that_passed_its_gate(
    good: dict[bool, bool], asked: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fits(monkeypatch, good)
    reply = ask()
    assert (len(reply["chosen"]), reply["verdict"]) == (1, "good")
    assert found == asked
    assert ask(op="predict")["trustworthy"] is True


def test_no_choice_is_made_by_a_fit_that_failed_it_and_predictions_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = fits(monkeypatch, {True: False, False: False})
    server = serve.Server()
    for _ in range(2):
        with pytest.raises(UntrustworthyFit, match="Do not trust it"):
            server.answer(REQUEST)
    reply = server.answer({**REQUEST, "op": "predict"})
    assert (reply["trustworthy"], reply["verdict"]) == (False, "Do not trust it.")
    assert len(reply["predictions"]) == 1
    assert asked == [True, False]  # the same runs are fitted once
    assert ask() == {"error": "Do not trust it."}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"flops": [1e18]}, "flops must be 2 numbers, one a candidate, got 1 of them"),
        ({"flops": [1e18, None]}, "flops[1] must be a number > 0, got None"),
        ({"flops": 3}, "flops must be 2 numbers, one a candidate, got 3"),
        ({"num_runs": "a"}, "num_runs must be a whole number, at least 1, got 'a'"),
        ({"num_runs": True}, "num_runs must be a whole number, at least 1, got True"),
        ({"seed": "x"}, "seed must be a whole number, at least 0, got 'x'"),
        ({"choice_seed": 0.5}, "choice_seed must be a whole number, at least 0, got 0.5"),
        ({"prior": 3}, "prior must be the name of a card or the path of one, got 3"),
        ({"targets": [without(TARGET, "tokens")]}, "targets[0]: key 'tokens' is missing"),
        ({"targets": [{**TARGET, "top_k": "2"}]}, "targets[0]: top_k must be a number"),
        ({"targets": [{**TARGET, "colour": 1}]}, "targets[0]: unknown key 'colour'"),
        ({"targets": TARGET}, "targets must be a list of JSON objects, got {'target_id': 'big'"),
        ({"targets": []}, "targets must hold at least one target"),
        ({"targets": ["big"]}, "targets must be a list of JSON objects, got 'big' as targets[0]"),
        ({"candidates": [SPEC, without(SPEC, "lr")]}, "candidates[1]: key 'lr' is missing"),
        ({"candidates": [SPEC, {**SPEC, "lr": "x"}]}, "candidates[1]: lr must be a number"),
        ({"candidates": [SPEC, {**SPEC, "decay_at": "9"}]}, "decay_at must be a list of token"),
        ({"candidates": [SPEC, {**SPEC, "decay_fraction": None}]}, "decay_fraction must be a num"),
        ({"candidates": [SPEC, {**SPEC, "decay_at": [1e400]}]}, "decay_at must be a list of token"),
        ({"candidates": [SPEC, {**SPEC, "shape": 3}]}, "shape must be a mapping, got 3"),
        ({"targets": [{**TARGET, "tokens": 10**400}]}, "targets[0]: tokens must be finite and > 0"),
        ({"targets": [{**TARGET, "family": 7}]}, "family must be a text, got 7"),
        ({"candidates": [SPEC, {**SPEC, "decay_at": [10**400]}]}, "decay_at must be a list of tok"),
        ({"flops": [1e18, 10**400]}, "flops[1] must be a number > 0"),
        ({"op": []}, "op must be choose or predict, got []"),
        ({"runs": 5}, "runs must be a list of JSON objects, got 5"),
        ({"runs": [5]}, "runs must be a list of JSON objects, got 5 as runs[0]"),
        ({"tables": "moe.jsonl"}, "tables must be a list of paths, got 'moe.jsonl'"),
    ],
)
def test_a_wrong_request_is_told_which_key_and_what_it_must_be(
    changes: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = ask(**changes)
    assert list(reply) == ["error"]
    assert told in reply["error"]
    assert "fault" not in reply["error"]
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("line", ["", "{", "[" * 100_000, "9" * 5000, "[1]"])
def test_what_is_no_json_object_is_told(line: str) -> None:
    replies = io.StringIO()
    serve.serve(io.StringIO(line + "\n"), replies)
    assert json.loads(replies.getvalue())["error"].startswith("not a request: ")


def test_a_fault_of_ours_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(sampling, "fit", broken)
    assert "a fault of bayeslr's: ZeroDivisionError: oops" in ask()["error"]
