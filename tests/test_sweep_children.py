"""Child processes: what they record, how they end, and that none outlives its sweep."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bayeslr.loop.children import (
    MAX_PARTIAL_ROWS,
    Child,
    judge,
    parse_rows,
    require_rules,
    start,
)
from bayeslr.runner_protocol import RECORDS_FILE
from bayeslr.specs import RunSpec

SPEC = RunSpec(
    run_id="r",
    family="f",
    runner="command",
    lr=1e-2,
    tokens=1000,
    decay_at=(500, 1000),
    batch_tokens=10,
    n_active=100,
    n_total=200,
    seq_len=10,
    shape={"name": "s", "d_model": 8},
)


def record(folder: Path, *rows: dict[str, object] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / RECORDS_FILE).write_text("\n".join(lines) + "\n")
    return folder


def begin(folder: Path, code: str) -> Child:
    (child,) = start([(SPEC, folder)], lambda _: [sys.executable, "-c", code])
    return child


def run(folder: Path, code: str) -> Child:
    child = begin(folder, code)
    wait(child)
    return child


def wait(child: Child, seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while child.running:
        assert time.monotonic() < give_up, "the child does not end"
        time.sleep(0.02)


def test_a_record_needs_only_tokens_and_loss() -> None:
    rows, broken = parse_rows(SPEC, b'{"tokens": 500, "loss": 3.5}\n')
    assert not broken
    (row,) = rows
    assert (row["status"], row["loss"], row["planned_tokens"]) == ("ok", 3.5, 500)
    assert (row["run_id"], row["lr"], row["d_model"], row["family"]) == ("r", 1e-2, 8, "f")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ('{"tokens": 300, "loss": 3.5}', "partial"),
        ('{"tokens": 495, "loss": 3.5}', "ok"),
        ('{"tokens": 300, "loss": null}', "diverged"),
        ('{"tokens": 300, "loss": NaN}', "diverged"),
        ('{"tokens": 300, "status": "diverged"}', "diverged"),
        ('{"tokens": 500, "loss": 3.5, "status": "partial"}', "partial"),
        ('{"tokens": 500, "loss": null, "status": "ok"}', "diverged"),
    ],
)
def test_the_status_follows_from_the_record(line: str, status: str) -> None:
    (row,) = parse_rows(SPEC, line.encode())[0]
    assert row["status"] == status


def test_lines_that_are_no_record_are_counted() -> None:
    rows, broken = parse_rows(SPEC, b'{"tok\n[1]\n{"loss": 1}\n\n{"tokens": 500, "loss": 1}\n')
    assert (len(rows), len(broken)) == (1, 3)


@pytest.mark.parametrize("tokens", ["NaN", "Infinity", "-1"])
def test_tokens_are_a_count(tokens: str) -> None:
    rows, (why,) = parse_rows(SPEC, f'{{"tokens": {tokens}, "loss": 3.5}}'.encode())
    assert not rows
    assert why.startswith("tokens must be a count")


def test_of_records_a_batch_apart_the_nearest_ends_a_horizon(tmp_path: Path) -> None:
    """A trainer that logs each step; the spec's batch is ten tokens."""
    steps = [{"tokens": t, "loss": 3.0} for t in range(10, 1001, 10)]
    record(tmp_path, *steps)
    verdict = judge(SPEC, tmp_path)
    ends = [(r["tokens"], r["planned_tokens"]) for r in verdict.rows if r["status"] == "ok"]
    assert (verdict.state, ends) == ("ok", [(500, 500), (1000, 1000)])
    record(tmp_path, *steps[:-1])
    assert judge(SPEC, tmp_path, failure="killed by SIGKILL", preempted=True).state == "lost"


def test_a_run_of_whole_batches_that_ended_by_itself_is_whole(tmp_path: Path) -> None:
    record(tmp_path, {"tokens": 493, "loss": 3.0}, {"tokens": 991, "loss": 2.5})
    assert judge(SPEC, tmp_path).state == "failed"
    assert judge(SPEC, tmp_path, ended=True).state == "ok"


def test_a_line_without_a_loss_says_nothing_of_the_run(tmp_path: Path) -> None:
    record(
        tmp_path, {"tokens": 100, "lr": 1e-3}, {"tokens": 500, "loss": 3.0},
        {"tokens": 1000, "loss": 2.5},
    )  # fmt: skip
    verdict = judge(SPEC, tmp_path)
    assert (verdict.state, len(verdict.rows)) == ("ok", 2)
    record(tmp_path, {"tokens": 500, "val_loss": 3.0}, {"tokens": 1000, "val_loss": 2.5})
    verdict = judge(SPEC, tmp_path)
    assert verdict.state == "failed"
    assert "2 of its lines are no records with tokens and loss" in verdict.reason
    assert "a record has a loss, null if the run diverged" in verdict.reason


def test_the_spec_says_which_run_a_record_is_of(tmp_path: Path) -> None:
    logged = {"lr": 3e-5, "n_total": 1, "family": "g", "d_model": 9, "run_id": "x", "n_layers": 2}
    record(tmp_path, {"tokens": 500, "loss": 3.0, **logged}, {"tokens": 1000, "loss": 2.5})
    for row in judge(SPEC, tmp_path).rows:
        assert (row["run_id"], row["lr"], row["n_total"]) == ("r", 1e-2, 200)
        assert (row["family"], row["d_model"]) == ("f", 8)
    first, _ = judge(SPEC, tmp_path).rows
    assert first["n_layers"] == 2  # the spec does not know
    recorded, _ = judge(SPEC, tmp_path, recorded=True).rows
    assert (recorded["run_id"], recorded["lr"]) == ("x", 3e-5)


def test_an_unknown_status_is_named(tmp_path: Path) -> None:
    record(tmp_path, {"tokens": 500, "loss": 3.0, "status": "weird"}, {"tokens": 1000, "loss": 2.5})
    verdict = judge(SPEC, tmp_path)
    assert verdict.state == "failed"
    assert "status 'weird' is none of ok, partial, diverged" in verdict.reason


def test_all_horizons_measured_is_ok(tmp_path: Path) -> None:
    record(tmp_path, {"tokens": 500, "loss": 3.0}, {"tokens": 1000, "loss": 2.5})
    verdict = judge(SPEC, tmp_path)
    assert (verdict.state, verdict.share, len(verdict.rows)) == ("ok", 1.0, 2)
    assert judge(SPEC, tmp_path).complete


def test_divergence_keeps_what_was_measured_before(tmp_path: Path) -> None:
    record(tmp_path, {"tokens": 500, "loss": 3.0}, {"tokens": 700, "loss": None})
    verdict = judge(SPEC, tmp_path)
    assert (verdict.state, verdict.share) == ("diverged", 0.7)
    assert [r["status"] for r in verdict.rows] == ["ok", "diverged"]


@pytest.mark.parametrize(
    ("last", "state", "rule"),
    [
        ({"loss": 2.5}, "ok", ""),
        ({"loss": 0.0}, "failed", "loss must be > 0, got '0.0'"),
        ({"loss": 3000.0}, "failed", "not far above ln(vocabulary)"),
        ({"loss": None}, "diverged", ""),
    ],
)
def test_a_run_whose_end_breaks_a_rule_has_failed(
    tmp_path: Path, last: dict[str, Any], state: str, rule: str
) -> None:
    start = {"tokens": 0, "loss": 9.0}  # a checkpoint that the run table sets aside
    spec = dataclasses.replace(SPEC, n_active=10_000, n_total=20_000)
    record(tmp_path, start, {"tokens": 500, "loss": 3.0}, {"tokens": 1000, **last})
    verdict = require_rules(spec, judge(spec, tmp_path))
    assert (verdict.state, verdict.rows[-1]["status"]) == (state, state)
    assert rule in verdict.reason
    assert verdict.rows[-1].get("status_reason", verdict.reason) == verdict.reason


def test_complete_records_outweigh_a_broken_exit(tmp_path: Path) -> None:
    record(tmp_path, {"tokens": 500, "loss": 3.0}, {"tokens": 1000, "loss": 2.5})
    assert judge(SPEC, tmp_path, failure="exit status 1: at shutdown").state == "ok"


def test_a_resumed_childs_repetition_replaces_the_first_row(tmp_path: Path) -> None:
    record(tmp_path, {"tokens": 300, "loss": 9.0}, {"tokens": 300, "loss": 3.0})
    rows = judge(SPEC, tmp_path, failure="x").rows
    assert [r["loss"] for r in rows if r["status"] == "partial"] == [3.0]


def test_long_curves_are_thinned_for_the_study_and_keep_their_end(tmp_path: Path) -> None:
    record(tmp_path, *({"tokens": t, "loss": 3.0, "status": "partial"} for t in range(1, 400)))
    partial = [r for r in judge(SPEC, tmp_path, failure="x").rows if r["status"] == "partial"]
    assert len(partial) <= MAX_PARTIAL_ROWS
    assert partial[-1]["tokens"] == 399


def test_a_failure_says_the_last_lines_of_stderr(tmp_path: Path) -> None:
    verdict = run(tmp_path, "raise SystemExit('CUDA not found')").verdict()
    assert (verdict.state, verdict.reason) == ("failed", "exit status 1: CUDA not found")
    assert verdict.rows[-1]["status_reason"] == verdict.reason


def test_a_silent_success_is_a_failure(tmp_path: Path) -> None:
    verdict = run(tmp_path, "pass").verdict()
    assert verdict.state == "failed"
    assert "no final record at 500 tokens" in verdict.reason


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (child,) = start([(SPEC, tmp_path)], lambda _: ["no-such-trainer"])
    wait(child)
    assert "cannot start 'no-such-trainer'" in child.verdict().reason


@pytest.mark.parametrize(
    ("number", "state"),
    [(signal.SIGTERM, "lost"), (signal.SIGKILL, "lost"), (signal.SIGSEGV, "failed")],
)
def test_ended_from_outside_is_lost_and_a_crash_is_failed(
    tmp_path: Path, number: signal.Signals, state: str
) -> None:
    verdict = run(tmp_path, f"import os; os.kill(os.getpid(), {int(number)})").verdict()
    assert (verdict.state, verdict.reason) == (state, f"killed by {number.name}")


def test_an_out_of_memory_kill_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = iter([3, 4])
    monkeypatch.setattr("bayeslr.loop.children._oom_kills", lambda: next(kills))
    verdict = run(tmp_path, "import os; os.kill(os.getpid(), 9)").verdict()
    assert (verdict.state, verdict.reason) == ("failed", "killed by SIGKILL: out of memory")


def test_rows_are_read_as_they_are_completed(tmp_path: Path) -> None:
    child = run(tmp_path, "pass")
    path = tmp_path / RECORDS_FILE
    path.write_text('{"tokens": 100, "loss": 3.0}\n{"tokens": 2')
    assert [r["tokens"] for r in child.new_rows()] == [100]
    path.write_text('{"tokens": 100, "loss": 3.0}\n{"tokens": 200, "loss": 3.0}\n')
    assert [r["tokens"] for r in child.new_rows()] == [200]
    assert child.new_rows() == []


def test_a_torn_last_line_does_not_swallow_the_next_record(tmp_path: Path) -> None:
    (tmp_path / RECORDS_FILE).write_text('{"tokens": 100, "loss": 3.0}\n{"tokens": 2')
    row = '{"tokens": 300, "loss": 2.9}'
    code = f"open({str(tmp_path / RECORDS_FILE)!r}, 'a').write({row!r} + chr(10))"
    rows, broken = parse_rows(SPEC, (run(tmp_path, code).run_dir / RECORDS_FILE).read_bytes())
    assert ([r["tokens"] for r in rows], len(broken)) == ([100, 300], 1)


def test_stop_ends_a_child_that_ignores_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bayeslr.loop.children.STOP_SECONDS", 0.3)
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    child = begin(tmp_path, code)
    time.sleep(0.3)
    child.process.stop()
    assert not child.running


PARENT = """
import sys, time
from pathlib import Path
from tests.test_sweep_children import begin
code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
child = begin(Path("."), code)
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_child_dies_with_its_killed_parent(tmp_path: Path, root: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
    )
    give_up = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < give_up
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    while _alive(pid):
        assert time.monotonic() < give_up, "the child outlived its parent"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_two_children_never_train_in_one_folder(tmp_path: Path) -> None:
    first = begin(tmp_path, "import time; time.sleep(1.0)")
    time.sleep(0.3)
    second = begin(tmp_path, "")
    time.sleep(0.3)
    assert first.running
    assert second.running
    wait(second)
    assert not first.running


def test_a_stack_waits_for_the_lock_of_each_of_its_folders(tmp_path: Path) -> None:
    held = begin(tmp_path / "b", "import time; time.sleep(1.0)")
    time.sleep(0.3)
    runs = [(dataclasses.replace(SPEC, run_id=name), tmp_path / name) for name in "ba"]
    told: list[list[str]] = []
    children = start(
        runs, lambda folders: told.append([f.name for f in folders]) or [sys.executable, "-c", ""]
    )
    assert [child.spec.run_id for child in children] == ["b", "a"]
    assert told == [["a", "b"]]
    time.sleep(0.3)
    assert held.running
    assert children[0].running
    wait(children[1])
    assert not held.running
