from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from bayeslr import runner_protocol
from bayeslr.errors import SpecError
from bayeslr.runner_protocol import Trial, find_entry_point
from bayeslr.specs import RunSpec


def spec() -> RunSpec:
    return RunSpec(
        run_id="r", family="f", runner="moe", lr=1e-3, tokens=1000, batch_tokens=100,
        n_active=10, n_total=10, seq_len=10,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("state", "finished"),
    [
        ("waiting", False),
        ("running", False),
        ("ok", True),
        ("diverged", True),
        ("failed", True),
        ("lost", True),
        ("pruned", True),
    ],
)
def test_a_trial_is_finished_in_whatever_way_it_ended(state: str, finished: bool) -> None:
    assert Trial(number=0, spec=spec(), state=state, flops=1.0).finished is finished


def install(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Pretend that these entry points are installed, and no others."""

    def entry_points(group: str) -> list[EntryPoint]:
        return [EntryPoint(name=k, value=v, group=group) for k, v in points.items()]

    monkeypatch.setattr(runner_protocol, "entry_points", entry_points)


def test_entry_points_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, mine="bayeslr.specs:RunSpec")
    assert find_entry_point("bayeslr.runners", "mine") is RunSpec


def test_an_unknown_runner_lists_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, moe="a:b", command="a:c")
    with pytest.raises(SpecError, match="no runner named 'mo'; installed: command, moe"):
        find_entry_point("bayeslr.runners", "mo")
    install(monkeypatch)
    with pytest.raises(SpecError, match="installed: none"):
        find_entry_point("bayeslr.studies", "optuna")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, moe="a_package_that_is_not_here:Runner")
    with pytest.raises(SpecError, match=r"needs the package .*bayeslr\[runners\]"):
        find_entry_point("bayeslr.runners", "moe")
