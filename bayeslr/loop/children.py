"""Runs in child processes: start them, read what they record, judge how they ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from bayeslr.errors import DataError
from bayeslr.runner_protocol import RECORDS_FILE, SPEC_FILE, STOP_FILE, spec_row
from bayeslr.runs import STATUSES, first_reasons, make_table, write_atomically
from bayeslr.runs.columns import RUN_KEYS, SHAPE_KEYS
from bayeslr.specs import RunSpec

LAUNCHER = Path(__file__).with_name("launch.py")
STDERR_FILE = "stderr.log"
STDOUT_FILE = "stdout.log"
LOCK_FILE = "lock"

MAX_PARTIAL_ROWS = 40
"""Checkpoint rows of one run that the study keeps, evenly spread; the run's folder keeps all."""

STOP_SECONDS = 10.0
"""How long a child may take to write its checkpoint after SIGTERM."""

_IDENTITY = ("run_id", "param_convention", *RUN_KEYS, *SHAPE_KEYS)
"""Columns that say which run it is: the spec's stand, for trainers log the LR of the step as lr."""

_PREEMPTED = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT})


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How a run ended: its status, why, its rows of the run table, the share it got through."""

    state: str
    reason: str
    rows: tuple[Mapping[str, Any], ...]
    share: float

    @property
    def complete(self) -> bool:
        """Whether the records say all there is to say."""
        return self.state in ("ok", "diverged")


@final
class Process:
    """A child process that trains the runs of some folders; its log lies in the first one's."""

    def __init__(self, folders: Sequence[Path], command: Sequence[str]) -> None:
        self.folders = tuple(folders)
        self.started = time.monotonic()
        self._oom_kills = _oom_kills()
        self._stderr_path = folders[0] / STDERR_FILE
        self._stderr_start = self._stderr_path.stat().st_size if self._stderr_path.exists() else 0
        with (
            self._stderr_path.open("ab") as stderr,
            (folders[0] / STDOUT_FILE).open("ab") as stdout,
        ):
            # A session of its own: Ctrl-C reaches the sweep alone, which then stops its children.
            self._process = subprocess.Popen(
                _launched(folders, command),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether the process is still there."""
        return self._process.poll() is None

    def failure(self) -> tuple[str, bool]:
        """How the ended process broke, if it did, and whether it was ended from outside."""
        code = self._process.returncode
        if code > 0:
            return f"exit status {code}: {self._stderr_tail()}", False
        if code == 0:
            return "", False
        before, after = self._oom_kills, _oom_kills()
        oom = -code == signal.SIGKILL and before is not None and (after or 0) > before
        reason = f"killed by {signal.Signals(-code).name}" + (": out of memory" if oom else "")
        return reason, -code in _PREEMPTED and not oom

    def stop(self) -> None:
        """End the process and what it started: SIGTERM, then SIGKILL."""
        for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
                return

    def _stderr_tail(self) -> str:
        with self._stderr_path.open("rb") as file:
            file.seek(self._stderr_start)
            text = file.read().decode("utf-8", errors="replace")
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        return " | ".join(lines[-5:])[-600:] or f"nothing on stderr ({self._stderr_path})"


@final
class Child:
    """A run that a process trains, and the part of its records that was read."""

    def __init__(self, spec: RunSpec, run_dir: Path, process: Process) -> None:
        self.spec = spec
        self.run_dir = run_dir
        self.process = process
        self._read = 0

    @property
    def wall_s(self) -> float:
        """Seconds since the process started; 0 in a stack, whose records know their share."""
        return 0.0 if self.stacked else time.monotonic() - self.process.started

    @property
    def stacked(self) -> bool:
        """Whether the process was started with several runs."""
        return len(self.process.folders) > 1

    @property
    def running(self) -> bool:
        """Whether the process is still there."""
        return self.process.running

    def new_rows(self) -> list[dict[str, Any]]:
        """Records that were completed since the last call."""
        path = self.run_dir / RECORDS_FILE
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        return parse_rows(self.spec, whole)[0]

    def rows(self) -> list[dict[str, Any]]:
        """All records that are complete."""
        path = self.run_dir / RECORDS_FILE
        content = path.read_bytes() if path.exists() else b""
        return parse_rows(self.spec, content[: content.rfind(b"\n") + 1])[0]

    def verdict(self) -> Verdict:
        """How the ended process left the run."""
        failure, preempted = self.process.failure()
        return judge(
            self.spec, self.run_dir, failure=failure, preempted=preempted, ended=not failure
        )

    def leave_out(self) -> None:
        """Ask the process to go on without this run (`StackRunner`)."""
        (self.run_dir / STOP_FILE).touch()

    @property
    def left_out(self) -> bool:
        """Whether it has done so."""
        return not (self.run_dir / STOP_FILE).exists()


def start(
    runs: Sequence[tuple[RunSpec, Path]], command: Callable[[Sequence[Path]], Sequence[str]]
) -> list[Child]:
    """Start one process that trains these runs, each in its folder.

    command: its command line, from the folders in the order in which their locks are taken.
    """
    for spec, run_dir in runs:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / SPEC_FILE, (spec.to_json() + "\n").encode())
        (run_dir / STOP_FILE).unlink(missing_ok=True)
    # In one order everywhere, so that two stacks never wait for each other's locks.
    folders = sorted(run_dir for _, run_dir in runs)
    process = Process(folders, command(folders))
    return [Child(spec, run_dir, process) for spec, run_dir in runs]


def _launched(folders: Sequence[Path], command: Sequence[str]) -> list[str]:
    """The command as a child of ours that waits for the folders' locks and keeps them."""
    files = [str(run_dir / name) for run_dir in folders for name in (LOCK_FILE, RECORDS_FILE)]
    return [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *files, "--", *command]


def parse_rows(
    spec: RunSpec, content: bytes, *, recorded: bool = False, ended: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the run table from the child's JSON lines, and why each other line is no record.

    A record needs ``tokens`` and ``loss``; the spec fills in what it leaves out. A loss that is
    null or not finite means divergence, a line without one means nothing. One that does not say
    what it is ends a horizon if it is the nearest to it, by half a batch at most; a whole one where
    the run has ``ended`` by itself, for trainers count whole batches. recorded: the lines are
    those of a `RecordedRunner`, which answers with other runs of the cell, at LRs of their own.
    """
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    untold: list[dict[str, Any]] = []
    common = spec_row(spec)
    fixed = {} if recorded else {name: common[name] for name in _IDENTITY if name in common}
    for line in content.splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            _require_record(record)
            tokens = float(record["tokens"])
            loss = math.nan if record.get("loss") is None else float(record["loss"])
        except (ValueError, TypeError, OverflowError) as error:
            broken.append(str(error))
            continue
        finite = math.isfinite(loss)
        status = record.get("status") or "partial"
        if not finite and status in ("ok", "partial"):
            status = "diverged"
        planned = {"planned_tokens": tokens} if status == "ok" else {}
        measured = {"tokens": tokens, "loss": loss if finite else None, "status": status}
        rows.append({**common, **planned, **record, **fixed, **measured})
        if finite and not record.get("status"):
            untold.append(rows[-1])
    within = spec.batch_tokens / (1 if ended else 2)
    for horizon in spec.decay_at:
        near = {row["tokens"] for row in untold if abs(row["tokens"] - horizon) <= within}
        if near and not _measured(spec, rows, horizon):
            end = min(near, key=lambda tokens: (abs(tokens - horizon), -tokens))
            for row in untold:
                if row["tokens"] == end:
                    row |= {"status": "ok", "planned_tokens": end}
    return rows, broken


def _require_record(record: Any) -> None:
    """Raises: ValueError that says what a line lacks."""
    if not isinstance(record, dict):
        raise ValueError("a record is a JSON object")
    if record.get("tokens") is None:
        raise ValueError("a record has tokens")
    if not 0.0 <= float(record["tokens"]) < math.inf:
        raise ValueError(f"tokens must be a count, got {record['tokens']!r}")
    if (status := record.get("status")) and status not in STATUSES:
        raise ValueError(f"status {status!r} is none of {', '.join(STATUSES)}")
    # Recorded divergences have no loss, and say what they are.
    if "loss" not in record and record.get("status") != "diverged":
        raise ValueError("a record has a loss, null if the run diverged")


def judge(
    spec: RunSpec,
    run_dir: Path,
    *,
    failure: str = "",
    preempted: bool = False,
    ended: bool = False,
    recorded: bool = False,
) -> Verdict:
    """Verdict from the records of a run whose child has ended (or was never started).

    Parameters
    ----------
    failure
        How the process broke, if it did; records that are complete outweigh it.
    preempted
        Whether it was ended from outside, which says nothing about the run.
    ended
        Whether it is known to have ended by itself, as it should.
    recorded
        Whether a `RecordedRunner` answered for it.
    """
    path = run_dir / RECORDS_FILE
    content = path.read_bytes() if path.exists() else b""
    rows, broken = parse_rows(spec, content, recorded=recorded, ended=ended or recorded)
    # A resumed child repeats its last checkpoint: the later row stands.
    rows = list({(r["run_id"], r["tokens"], r["status"]): r for r in rows}.values())
    rows.sort(key=lambda r: (r["tokens"], r["status"]))
    share = spec.share_at(max((r["tokens"] for r in rows), default=0.0))
    if diverged := [r for r in rows if r["status"] == "diverged"]:
        return Verdict(
            state="diverged",
            reason=str(diverged[-1].get("status_reason") or "loss is not finite"),
            rows=_thinned(rows),
            share=share,
        )
    missing = [t for t in spec.decay_at if not _measured(spec, rows, t)]
    if not missing:
        return Verdict(state="ok", reason="", rows=_thinned(rows), share=1.0)
    if not failure:
        failure = f"exit status 0, but {RECORDS_FILE} has no final record at {missing[0]} tokens"
        if broken:
            failure += (
                f" ({len(broken)} of its lines are no records with tokens and loss; "
                f"the first: {broken[0]})"
            )
    state = "lost" if preempted else "failed"
    end = _end_row(spec, share, state, failure)
    return Verdict(state=state, reason=failure, rows=(*_thinned(rows), end), share=share)


def require_rules(spec: RunSpec, verdict: Verdict) -> Verdict:
    """The same verdict, or that the run failed, for the run table sets aside how it ended.

    Checkpoints are left to the quarantine: a run without one of them is a run all the same.
    """
    if verdict.state not in ("ok", "diverged", "pruned") or not (why := _set_aside(verdict.rows)):
        return verdict
    reason = f"its records break a rule of the run table: {why}"
    end = _end_row(spec, verdict.share, "failed", reason)
    return Verdict(state="failed", reason=reason, rows=(*verdict.rows, end), share=verdict.share)


def _set_aside(rows: Sequence[Mapping[str, Any]]) -> str:
    """Why the run table sets aside rows that are no checkpoints; empty if it takes them all."""
    try:
        quarantine = make_table(rows, source="records").quarantine
    except DataError as error:  # no row is left
        return " ".join(str(error).split())
    ends = [line for line, row in enumerate(rows, start=1) if row["status"] != "partial"]
    broken = quarantine[quarantine["line"].isin(ends)]
    return " ".join(first_reasons(broken, limit=1).split()) if len(broken) else ""


def _end_row(spec: RunSpec, share: float, state: str, reason: str) -> dict[str, Any]:
    seen = spec.continues_at + share * (spec.tokens - spec.continues_at)
    end = {**spec_row(spec), "tokens": max(1.0, seen), "loss": None}
    return {**end, "status": state, "status_reason": reason}


def ended_early(spec: RunSpec, run_dir: Path, reason: str) -> Verdict:
    """Verdict of a run that was stopped: its curve, the last point ``pruned``.

    One that came to its end while it was being stopped is judged as any other.
    """
    whole = judge(spec, run_dir)
    if whole.state in ("ok", "diverged"):
        return whole
    rows = [dict(row) for row in whole.rows if row["status"] in ("partial", "ok")]
    rows[-1] |= {"status_reason": f"stopped early: {reason}"}
    if rows[-1]["status"] == "partial":
        rows[-1]["status"] = "pruned"
    return Verdict(state="pruned", reason=reason, rows=tuple(rows), share=whole.share)


def put_away(run_dir: Path) -> None:
    """Keep the folder of a run under another name, so that the run begins from nothing."""
    number = 1
    while (kept := run_dir.with_name(f"{run_dir.name}.failed-{number}")).exists():
        number += 1
    run_dir.rename(kept)


def write_rows(run_dir: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Records of a run that needed no child."""
    run_dir.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(dict(row)) + "\n" for row in rows)
    (run_dir / RECORDS_FILE).write_text(text, encoding="utf-8")


def _measured(spec: RunSpec, rows: Sequence[Mapping[str, Any]], tokens: int) -> bool:
    # One batch more or less is the same horizon.
    return any(r["status"] == "ok" and abs(r["tokens"] - tokens) <= spec.batch_tokens for r in rows)


def _thinned(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    partial = [r for r in rows if r["status"] == "partial"]
    step = max(1, math.ceil(len(partial) / MAX_PARTIAL_ROWS))
    kept = {id(r) for r in partial[::-1][::step]}
    return tuple(r for r in rows if r["status"] != "partial" or id(r) in kept)


def _oom_kills() -> int | None:
    """Processes that the kernel killed for memory in our control group; None if unknown."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/sys/fs/cgroup/memory.events").read_text(encoding="ascii").splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None
