"""One worker of a sweep: asks for the runs that are due, trains them, tells what came of them.

Any number of workers share a study. The runs that are due stand in its notes ``batch:0``,
``batch:1``, ...: a batch is planned once all runs of the batches before it have ended, from exactly
those runs, so it does not depend on who plans it or how often the sweep was killed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

from bayeslr.errors import SpecError
from bayeslr.finishing import Finishing
from bayeslr.loop.children import (
    Child,
    Process,
    Verdict,
    ended_early,
    judge,
    put_away,
    require_rules,
    start,
    write_rows,
)
from bayeslr.loop.early import hopeless
from bayeslr.loop.stacking import stacks_of
from bayeslr.runner_protocol import (
    ContinuingRunner,
    RecordedRunner,
    Runner,
    StackRunner,
    Study,
    Trial,
)
from bayeslr.space import shares_trunk
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
"""A run whose process was ended from outside is started again from its checkpoint, this often; the
last time alone, for it may be the size of the stack that has it killed."""


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
    """Trains up to ``slots`` programs at a time in child processes, until the study says stop.

    A program is a run, or a stack of them where the runner can (`stacking`). Each run of a stack is
    asked for, renewed and told as it is alone.
    """

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
        self._processes: list[Process] = []
        self._children: dict[int, Child] = {}
        self._stopping: dict[int, str] = {}
        self._alone: set[str] = set()
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
                if len(self._processes) < self._slots and (ended or idle):
                    looked_at = time.monotonic()
                    stop = self._fill()
                    if stop is not None and not self._processes:
                        return stop
                time.sleep(POLL_SECONDS)
        finally:
            for process in self._processes:
                process.stop()
            for number in self._children:
                self._study.release(number)
            self._study.join(0)

    def _attend(self) -> bool:
        """Read the children's records, renew leases, tell what ended; whether anything did."""
        before = len(self._children)
        over = [process for process in self._processes if not process.running]
        beat = time.monotonic() - self._beat_at > BEAT_SECONDS
        if beat:
            self._study.join(self._slots)
            self._beat_at = time.monotonic()
        for number, child in list(self._children.items()):
            rows = child.new_rows()
            reported = self._report(number, rows)
            if child.process in over:
                continue
            if number in self._stopping:
                if child.left_out:
                    self._end_early(number)
            elif why := self._hopeless(child) if reported else "":
                self._stopping[number] = why
                if self._stop(child):
                    self._end_early(number)
            elif self._ended_before_others(child, rows):
                del self._children[number]
                self._tell(number, child.spec, judge(child.spec, child.run_dir), child.wall_s)
            if beat and number in self._children and not self._study.beat(number):
                self._stop(child)
                self._forget(number)
                self._progress(f"{child.spec.run_id}: somebody else has taken it over")
        for process in over:
            self._processes.remove(process)
            self._end(process)
        return bool(over) or len(self._children) < before

    def _report(self, number: int, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Put the newest loss into the study; whether there was one, and it was time for it."""
        rows = [row for row in rows if row["loss"] is not None]
        if not rows:
            return False
        if time.monotonic() - self._reported_at.get(number, -REPORT_SECONDS) < REPORT_SECONDS:
            return False
        self._reported_at[number] = time.monotonic()
        self._study.report(number, tokens=int(rows[-1]["tokens"]), loss=float(rows[-1]["loss"]))
        return True

    def _ended_before_others(self, child: Child, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these new rows complete a run of a stack; of one alone the process tells."""
        ends = any(row["status"] in ("ok", "diverged") for row in rows)
        return child.stacked and ends and judge(child.spec, child.run_dir).complete

    def _hopeless(self, child: Child) -> str:
        """Why a run should be stopped, judged against the runs of earlier batches."""
        recipe = self._study.recipe()
        if not recipe.early_ends or recipe.strategy != "bayes":
            return ""
        self._find_batch()  # a run that was taken over may be the first thing seen of its batch
        mine = {due.spec.run_id: due for due in batch_runs(self._study, self._batch)}
        earlier = [t for t in self._study.trials() if t.finished and t.spec.run_id not in mine]
        if not shares_trunk(self._runner, child.spec):
            earlier = [t for t in earlier if t.spec.tokens == child.spec.tokens]
        due = mine.get(child.spec.run_id)
        return hopeless(child.spec, child.rows(), earlier, due.finishing if due else None)

    def _stop(self, child: Child) -> bool:
        """Stop a run; False if others share its process, which has yet to leave it out."""
        sharing = [other for other in self._children.values() if other.process is child.process]
        if len(sharing) > 1:
            child.leave_out()
            return False
        child.process.stop()
        self._processes.remove(child.process)
        return True

    def _end_early(self, number: int) -> None:
        why = self._stopping[number]
        child = self._forget(number)
        verdict = ended_early(child.spec, child.run_dir, why)
        self._tell(number, child.spec, verdict, child.wall_s)

    def _forget(self, number: int) -> Child:
        self._stopping.pop(number, None)
        return self._children.pop(number)

    def _end(self, process: Process) -> None:
        """Tell how an ended process left its runs, or see to those that deserve another try."""
        lost: list[tuple[int, RunSpec]] = []
        for number, child in list(self._children.items()):
            if child.process is not process:
                continue
            if number in self._stopping:
                self._end_early(number)
                continue
            self._forget(number)
            verdict = child.verdict()
            left = MAX_STARTS - self._starts[number]
            if verdict.state == "lost" and left > (1 if child.stacked else 0):
                lost.append((number, child.spec))
                line = f"{verdict.reason}; goes on from its checkpoint"
                self._progress(f"{child.spec.run_id}: {line}")
            elif child.stacked and not verdict.complete:
                # Nothing says which member broke the stack: each is a run of its own from here on.
                self._alone.add(child.spec.run_id)
                self._study.release(number)
                self._progress(f"{child.spec.run_id}: {verdict.reason}; goes on alone")
            else:
                self._tell(number, child.spec, verdict, child.wall_s)
        self._start(lost)

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
            # An undecayed loss may lie at the same tokens as the last one, or beyond it.
            final = [row for row in verdict.rows if row["status"] == "ok"][-1]
            outcome = f"loss {final['loss']:.4f}"
        elif verdict.state == "pruned":
            outcome = f"stopped early: {verdict.reason}"
        elif verdict.reason:
            outcome += f" ({verdict.reason})"
        # A run that was trained before, in a stack say, ends here at once: its records know better.
        recorded = [row.get("wall_s") for row in verdict.rows]
        wall_s = max([wall_s, *(s for s in recorded if isinstance(s, int | float))])
        return (
            f"[{share:4.0%} of budget] {spec.run_id}: {spec.shape.get('name', '')} "
            f"N={format_quantity(spec.n_active)} D={format_quantity(spec.tokens)} "
            f"lr={format_lr(spec.lr)}  {outcome}  {wall_s:.1f} s"
        )

    def _fill(self) -> Stop | None:
        """Start what is due in the free slots; the stop, once there is nothing left to do."""
        while len(self._processes) < self._slots:
            trials = self._study.trials()
            orphans = [
                t
                for t in trials
                if not t.finished and not t.alive and t.number not in self._children
            ]
            stop = self._study.note("stop")
            due = [] if stop is not None else self._due(trials)
            if claimed := self._claim_next(orphans, due):
                self._start(claimed)
            elif stop is not None:
                return Stop(**stop)
            elif any(not t.finished for t in self._study.trials()):
                return None  # the batch is under way, here or elsewhere
            elif not self._plan_next(refused=due):
                return None  # somebody else is planning it
        return None

    def _claim_next(
        self, orphans: Sequence[Trial], due: Sequence[Due]
    ) -> list[tuple[int, RunSpec]]:
        """Number and spec of what to start next, which is ours from now on; empty if nothing is."""
        orphan_of = {trial.spec.run_id: trial for trial in orphans}
        due_of_id = {run.spec.run_id: run for run in due}
        specs = [trial.spec for trial in orphans] + [self._startable(run.spec) for run in due]
        for stack in self._stacks(specs):
            claimed = []
            for spec in stack:
                orphan = orphan_of.get(spec.run_id)
                if orphan is None:
                    trial = self._ask(due_of_id[spec.run_id], spec)
                else:
                    trial = self._adopt(orphan)
                if trial is not None:
                    claimed.append((trial.number, trial.spec))
            if claimed:
                return claimed
        return []

    def _stacks(self, specs: Sequence[RunSpec]) -> list[list[RunSpec]]:
        """Runs that wait for a slot, those together that are better trained as one program."""
        runner = self._runner
        if not isinstance(runner, StackRunner):
            return [[spec] for spec in specs]
        alone = [[spec] for spec in specs if spec.run_id in self._alone]
        waiting = {spec.run_id: spec for spec in specs if spec.run_id not in self._alone}
        if not waiting:
            return alone
        slots = max(self._slots, self._study.slots())
        # The whole batch is dealt, so that a stack does not depend on which slot is free first.
        batch = [self._startable(run.spec) for run in batch_runs(self._study, self._batch)]
        whole = {spec.run_id: spec for spec in batch} | waiting
        stacks = [
            [spec for spec in stack if spec.run_id in waiting]
            for stack in stacks_of(runner, list(whole.values()), slots)
        ]
        stacks = [stack for stack in stacks if stack]
        if len(stacks) < self._slots - len(self._processes):
            stacks = stacks_of(runner, list(waiting.values()), slots)
        return stacks + alone

    def _adopt(self, orphan: Trial) -> Trial | None:
        if not self._study.adopt(orphan.number):
            return None
        if orphan.spec.run_id not in self._alone:
            self._progress(f"{orphan.spec.run_id}: goes on (its worker {orphan.owner} is gone)")
        return orphan

    def _due(self, trials: Sequence[Trial]) -> list[Due]:
        """Runs of the batch in force that nobody has asked for."""
        self._find_batch()
        return due_runs(self._study, trials, self._batch)

    def _find_batch(self) -> None:
        """Go on to the batch in force."""
        while self._study.note(f"batch:{self._batch + 1}") is not None:
            self._batch += 1

    def _ask(self, run: Due, spec: RunSpec) -> Trial | None:
        """The trial of a run, trained as ``spec`` says; None if it was refused."""
        reason, note = run.reason, ""
        if spec != run.spec:
            note = (
                f"trained whole, for the trunk of {run.spec.continues} is not in {self._runs_dir}"
            )
            reason = f"{reason}; {note}"
        # The price is that of what may be trained here, whatever the plan or a trial says.
        trial = self._study.ask(spec, flops=self._runner.flops(spec), reason=reason)
        if trial is not None and note:
            self._progress(f"{spec.run_id}: {note}")
        return trial

    def _startable(self, spec: RunSpec) -> RunSpec:
        """The run, or the whole of it where it cannot go on from another here."""
        if self._can_start(spec):
            return spec
        return dataclasses.replace(spec, continues=None, continues_at=0)

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

    def _start(self, runs: Sequence[tuple[int, RunSpec]]) -> None:
        """Train runs of ours, by number, as one program; those with nothing to train are told."""
        runs = [(number, spec) for number, spec in runs if not self._settled(number, spec)]
        if not runs:
            return
        folders = [(spec, self._runs_dir / spec.run_id) for _, spec in runs]
        children = start(folders, self._command([spec for _, spec in runs]))
        self._processes.append(children[0].process)
        for (number, _), child in zip(runs, children, strict=True):
            self._starts[number] = self._starts.get(number, 0) + 1
            self._children[number] = child
        self._progress(f"training {len(self._children)} run(s)", transient=True)

    def _command(self, specs: Sequence[RunSpec]) -> Callable[[Sequence[Path]], list[str]]:
        """Command line that trains these runs, from their folders."""
        runner = self._runner
        if len(specs) > 1 and isinstance(runner, StackRunner):
            return runner.stack_command
        return lambda folders: runner.command(specs[0], folders[0])

    def _settled(self, number: int, spec: RunSpec) -> bool:
        """Tell a run that needs no process, or cannot have one; whether it was one."""
        run_dir = self._runs_dir / spec.run_id
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
            return False
        return True

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
    asked = [t.spec.run_id for t in trials if not t.void]
    runs = batch_runs(study, batch)
    return [due for due in runs if asked.count(due.spec.run_id) < due.nth]


def batch_runs(study: Study, batch: int) -> list[Due]:
    """All runs of a batch; none if there is no such batch."""
    note = study.note(f"batch:{batch}")
    return [] if note is None else [due_of(entry) for entry in note["runs"]]


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
