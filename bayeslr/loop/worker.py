"""One worker of a sweep: asks for the runs that are due, trains them, tells what came of them.

Any number of workers share a study. The runs that are due stand in its notes ``batch:0``,
``batch:1``, ...: a batch is planned once all runs of the batches before it have ended, from exactly
those runs, so it does not depend on who plans it or how often the sweep was killed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

from bayeslr.errors import SpecError
from bayeslr.finishing import Finishing
from bayeslr.loop.children import (
    Child,
    Verdict,
    ended_early,
    judge,
    put_away,
    require_rules,
    write_rows,
)
from bayeslr.loop.early import hopeless
from bayeslr.runner_protocol import ContinuingRunner, RecordedRunner, Runner, Study, Trial
from bayeslr.specs import RunSpec
from bayeslr.units import format_lr, format_quantity

POLL_SECONDS = 0.05
IDLE_SECONDS = 1.0
"""How often a worker with nothing to start looks at the study."""

BEAT_SECONDS = 20.0
"""How often a sign of life is given; an owner elsewhere is given up after fifteen (study.py)."""

REPORT_SECONDS = 2.0
"""Least time between two intermediate losses of one run in the study."""

MAX_STARTS = 3
"""A run whose process was ended from outside is started again from its checkpoint, this often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """A run of a batch. nth: 2 for a run that is asked for again after it failed or was lost.

    finishing: what its end is worth, where a posterior chose it.
    """

    spec: RunSpec
    flops: float
    reason: str
    nth: int = 1
    finishing: Finishing | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """Why no further batch follows. kind: budget, max_runs, rule, failures or done."""

    kind: str
    reason: str


class Progress(Protocol):
    """Where lines for people go; transient ones are for a terminal and may be overwritten."""

    def __call__(self, line: str, *, transient: bool = False) -> None:
        """Show one line."""
        ...


Plan = Callable[[Sequence[Trial], int], "list[Due] | Stop"]


def silent(line: str, *, transient: bool = False) -> None:
    """Progress that shows nothing."""


@final
class Worker:
    """Trains up to ``slots`` runs at a time in child processes, until the study says stop."""

    def __init__(
        self,
        study: Study,
        runner: Runner,
        runs_dir: Path,
        *,
        slots: int,
        plan: Plan,
        progress: Progress = silent,
    ) -> None:
        self._study = study
        self._runner = runner
        self._runs_dir = runs_dir
        self._slots = slots
        self._plan = plan
        self._progress = progress
        self._children: dict[int, Child] = {}
        self._starts: dict[int, int] = {}
        self._reported_at: dict[int, float] = {}
        self._beat_at = 0.0
        self._batch = -1

    def run(self) -> Stop:
        """Work until the study says stop and nothing of ours runs.

        Whatever ends it early, the children are stopped first and their runs can be adopted.
        """
        looked_at = 0.0
        try:
            while True:
                ended = self._attend()
                idle = time.monotonic() - looked_at > IDLE_SECONDS
                if len(self._children) < self._slots and (ended or idle):
                    looked_at = time.monotonic()
                    stop = self._fill()
                    if stop is not None and not self._children:
                        return stop
                time.sleep(POLL_SECONDS)
        finally:
            for number, child in self._children.items():
                child.stop()
                self._study.release(number)

    def _attend(self) -> bool:
        """Read the children's records, renew leases, tell what ended; whether anything did."""
        ended = False
        beat = time.monotonic() - self._beat_at > BEAT_SECONDS
        for number, child in list(self._children.items()):
            running = child.running
            reported = self._report(number, child)
            why = self._hopeless(child) if reported and running else ""
            if why:
                self._end_early(number, child, why)
                ended = True
            elif not running:
                self._end(number, child)
                ended = True
            elif beat and not self._study.beat(number):
                child.stop()
                del self._children[number]
                self._progress(f"{child.spec.run_id}: somebody else has taken it over")
                ended = True
        if beat:
            self._beat_at = time.monotonic()
        return ended

    def _report(self, number: int, child: Child) -> bool:
        """Put the newest loss into the study; whether there was one, and it was time for it."""
        rows = [r for r in child.new_rows() if r["loss"] is not None]
        if not rows:
            return False
        if time.monotonic() - self._reported_at.get(number, -REPORT_SECONDS) < REPORT_SECONDS:
            return False
        self._reported_at[number] = time.monotonic()
        self._study.report(number, tokens=int(rows[-1]["tokens"]), loss=float(rows[-1]["loss"]))
        return True

    def _hopeless(self, child: Child) -> str:
        """Why a run should be stopped, judged against the runs of earlier batches."""
        recipe = self._study.recipe()
        if not recipe.early_ends or recipe.strategy != "bayes":
            return ""
        self._find_batch()  # a run that was taken over may be the first thing seen of its batch
        note = self._study.note(f"batch:{self._batch}")
        mine = {due.spec.run_id: due for due in map(due_of, note["runs"])} if note else {}
        earlier = [t for t in self._study.trials() if t.finished and t.spec.run_id not in mine]
        due = mine.get(child.spec.run_id)
        return hopeless(child.spec, child.rows(), earlier, due.finishing if due else None)

    def _end_early(self, number: int, child: Child, why: str) -> None:
        child.stop()
        del self._children[number]
        verdict = ended_early(child.spec, child.run_dir, why)
        self._tell(number, child.spec, verdict, child.wall_s)

    def _end(self, number: int, child: Child) -> None:
        del self._children[number]
        verdict = child.verdict()
        if verdict.state == "lost" and self._starts[number] < MAX_STARTS:
            self._progress(f"{child.spec.run_id}: {verdict.reason}; goes on from its checkpoint")
            self._start(number, child.spec)
            return
        self._tell(number, child.spec, verdict, child.wall_s)

    def _tell(self, number: int, spec: RunSpec, verdict: Verdict, wall_s: float) -> None:
        verdict = require_rules(spec, verdict)
        reserved = self._runner.flops(spec)
        # Nothing recorded proves nothing spent: then the reservation counts in full.
        spent = reserved * (verdict.share or 1.0)
        self._study.tell(number, state=verdict.state, flops=spent, records=verdict.rows)
        self._progress(self._line(spec, verdict, wall_s))

    def _line(self, spec: RunSpec, verdict: Verdict, wall_s: float) -> str:
        spent = sum(t.flops for t in self._study.trials())
        share = spent / self._study.recipe().budget_flops
        outcome = verdict.state
        if verdict.state == "ok":
            outcome = f"loss {verdict.rows[-1]['loss']:.4f}"
        elif verdict.state == "pruned":
            outcome = f"stopped early: {verdict.reason}"
        elif verdict.reason:
            outcome += f" ({verdict.reason})"
        # A run that was trained before, in a stack say, ends here at once: its records know better.
        wall_s = max([wall_s, *(row.get("wall_s") or 0.0 for row in verdict.rows)])
        return (
            f"[{share:4.0%} of budget] {spec.run_id}: {spec.shape.get('name', '')} "
            f"N={format_quantity(spec.n_active)} D={format_quantity(spec.tokens)} "
            f"lr={format_lr(spec.lr)}  {outcome}  {wall_s:.1f} s"
        )

    def _fill(self) -> Stop | None:
        """Start what is due in the free slots; the stop, once there is nothing left to do."""
        while len(self._children) < self._slots:
            trials = self._study.trials()
            orphan = next(
                (
                    t
                    for t in trials
                    if not t.finished and not t.alive and t.number not in self._children
                ),
                None,
            )
            if orphan is not None and self._study.adopt(orphan.number):
                self._progress(f"{orphan.spec.run_id}: goes on (its worker {orphan.owner} is gone)")
                self._start(orphan.number, orphan.spec)
                continue
            if (stop := self._study.note("stop")) is not None:
                return Stop(**stop)
            due = self._due(trials)
            trial = self._ask_first(due)
            if trial is not None:
                self._start(trial.number, trial.spec)
            elif any(not t.finished for t in self._study.trials()):
                return None  # the batch is under way, here or elsewhere
            elif not self._plan_next(refused=due):
                return None  # somebody else is planning it
        return None

    def _due(self, trials: Sequence[Trial]) -> list[Due]:
        """Runs of the batch in force that nobody has asked for."""
        self._find_batch()
        return due_runs(self._study, trials, self._batch)

    def _find_batch(self) -> None:
        """Go on to the batch in force."""
        while self._study.note(f"batch:{self._batch + 1}") is not None:
            self._batch += 1

    def _ask_first(self, due: Sequence[Due]) -> Trial | None:
        for run in due:
            spec, reason, note = run.spec, run.reason, ""
            if not self._can_start(spec):
                spec = dataclasses.replace(spec, continues=None, continues_at=0)
                note = (
                    f"trained whole, for the trunk of {run.spec.continues} is not in "
                    f"{self._runs_dir}"
                )
                reason = f"{reason}; {note}"
            # The price is that of what may be trained here, whatever the plan or a trial says.
            trial = self._study.ask(spec, flops=self._runner.flops(spec), reason=reason)
            if trial is not None:
                if note:
                    self._progress(f"{spec.run_id}: {note}")
                return trial
        return None

    def _can_start(self, spec: RunSpec) -> bool:
        """Whether this worker's folders hold what the run goes on from, if it does."""
        if spec.continues is None:
            return True
        runner = self._runner
        return isinstance(runner, ContinuingRunner) and runner.has_trunk(spec, self._runs_dir)

    def _plan_next(self, *, refused: Sequence[Due]) -> bool:
        number = self._batch + 1
        if not self._study.claim(f"batch:{number}"):
            return False
        if self._study.note(f"batch:{number}") is not None or self._study.note("stop") is not None:
            return True
        self._progress("choosing the next runs", transient=True)
        plan = self._plan([t for t in self._study.trials() if not t.void], number)
        if not isinstance(plan, Stop) and {_id(d) for d in plan} <= {_id(d) for d in refused}:
            needed = format_quantity(min(due.flops for due in plan))
            plan = Stop(
                kind="budget",
                reason=f"what is planned, {len(plan)} runs of {needed} FLOPs or more, does not fit "
                f"into what is left of {format_quantity(self._study.recipe().budget_flops)}",
            )
        if isinstance(plan, Stop):
            self._study.set_note("stop", {"kind": plan.kind, "reason": plan.reason})
        else:
            self._study.set_note(f"batch:{number}", {"runs": [due_entry(due) for due in plan]})
        return True

    def _start(self, number: int, spec: RunSpec) -> None:
        run_dir = self._runs_dir / spec.run_id
        self._starts[number] = self._starts.get(number, 0) + 1
        verdict = judge(spec, run_dir, recorded=isinstance(self._runner, RecordedRunner))
        known = verdict.complete  # a worker was killed before it could tell
        if known and self._made_again(spec, verdict):
            put_away(run_dir)
            known = False
        if known:
            self._tell(number, spec, verdict, 0.0)
        elif isinstance(self._runner, RecordedRunner):
            self._look_up(self._runner, number, spec, run_dir)
        elif not self._can_start(spec):
            # Taken over from a worker that had the trunk; what was reserved does not pay for all.
            reason = f"the trunk of {spec.continues} is not in {self._runs_dir}"
            verdict = judge(spec, run_dir, failure=reason, preempted=True)
            self._tell(number, spec, verdict, 0.0)
        else:
            self._children[number] = Child(spec, run_dir, self._runner.command(spec, run_dir))
            self._progress(f"training {len(self._children)} run(s)", transient=True)

    def _made_again(self, spec: RunSpec, verdict: Verdict) -> bool:
        """Whether a complete run begins anew, for what it recorded broke a rule.

        Its checkpoint is at the end: the trainer would have nothing to add.
        """
        before = [t for t in self._study.trials() if t.spec.run_id == spec.run_id and t.finished]
        failed = any(t.state == "failed" for t in before)
        return failed and require_rules(spec, verdict).state == "failed"

    def _look_up(self, runner: RecordedRunner, number: int, spec: RunSpec, run_dir: Path) -> None:
        failure = ""
        try:
            write_rows(run_dir, runner.records(spec))
        except SpecError as error:
            failure = str(error)
        verdict = judge(spec, run_dir, failure=failure, recorded=True)
        self._tell(number, spec, verdict, 0.0)


def due_runs(study: Study, trials: Sequence[Trial], batch: int) -> list[Due]:
    """Runs of a batch that nobody has asked for; none if there is no such batch."""
    note = study.note(f"batch:{batch}")
    if note is None:
        return []
    asked = [t.spec.run_id for t in trials if not t.void]
    runs = [due_of(entry) for entry in note["runs"]]
    return [due for due in runs if asked.count(due.spec.run_id) < due.nth]


def _id(due: Due) -> str:
    return due.spec.run_id


def due_entry(due: Due) -> dict[str, Any]:
    """JSON-safe form of a run that is due."""
    return {
        "spec": due.spec.to_json(),
        "flops": due.flops,
        "reason": due.reason,
        "nth": due.nth,
        "finishing": due.finishing and due.finishing.document(),
    }


def due_of(entry: dict[str, Any]) -> Due:
    """Inverse of `due_entry`; entries of an earlier version say nothing of finishing."""
    finishing = entry.get("finishing")
    return Due(
        **{
            **entry,
            "spec": RunSpec.from_json(entry["spec"]),
            "finishing": finishing and Finishing.of(finishing),
        }
    )
