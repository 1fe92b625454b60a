"""Any program as a runner."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from bayeslr.errors import SpecError
from bayeslr.runner_protocol import find_entry_point
from bayeslr.specs import RunSpec
from bayeslr_runners.command import CommandRunner

SPEC = RunSpec(
    run_id="r", family="f", runner="command", lr=1e-2, tokens=1000, decay_at=(500, 1000),
    batch_tokens=10, n_active=100, n_total=200, seq_len=10,
)  # fmt: skip


def test_the_blanks_are_filled_in(tmp_path: Path) -> None:
    runner = CommandRunner({"argv": ["{python}", "t.py", "--spec={spec}", "{records}", "{dir}"]})
    assert runner.command(SPEC, tmp_path) == [
        sys.executable,
        "t.py",
        f"--spec={tmp_path}/spec.json",
        f"{tmp_path}/records.jsonl",
        str(tmp_path),
    ]


def test_doubled_braces_are_braces(tmp_path: Path) -> None:
    runner = CommandRunner({"argv": ["t", '{{"a": 1}}']})
    assert runner.command(SPEC, tmp_path) == ["t", '{"a": 1}']


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "argv must be a list of words"),
        ({"argv": "python t.py"}, "argv must be a list of words"),
        ({"argv": []}, "argv must be a list of words"),
        ({"argv": ["t", 3]}, "argv must be a list of words"),
        ({"argv": ["t", "{speck}"]}, r"no blank named 'speck'; there are \{spec\}"),
        ({"argv": ["t", "{"]}, r"write \{\{ for"),
    ],
)
def test_a_bad_template_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        CommandRunner(options)


@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        ({"name": "s", "n_active": 100}, (100, 100)),
        ({"name": "s", "n_active": "1.5M", "n_total": "12M"}, (1_500_000, 12_000_000)),
    ],
)
def test_a_shape_states_its_counts(shape: dict[str, Any], counts: tuple[int, int]) -> None:
    assert CommandRunner({"argv": ["t"]}).counts(shape) == counts


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"name": "s"}, "shape 's' needs n_active"),
        ({"name": "s", "n_active": 3, "n_total": 2}, r"n_active \(3\) exceeds n_total \(2\)"),
        ({"name": "s", "n_active": "big"}, "shape 's': n_active must be a number"),
    ],
)
def test_a_shape_without_counts_is_named(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        CommandRunner({"argv": ["t"]}).counts(shape)


def test_flops_count_the_branches() -> None:
    assert CommandRunner({"argv": ["t"]}).flops(SPEC) == 6 * 100 * (800 + 200 + 100)


def test_it_is_found_by_name() -> None:
    assert find_entry_point("bayeslr.runners", "command") is CommandRunner
