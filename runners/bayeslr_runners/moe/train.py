"""One training run: trunk, decay branches, records, checkpoints.

The position of a run is (horizon, whether it has left the trunk, step). A checkpoint holds the
position and the state of the network there, and inside a branch also the state of the trunk where
the branch left it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayeslr.errors import StorageError
from bayeslr.runner_protocol import RECORDS_FILE, SPEC_FILE
from bayeslr.specs import RunSpec
from bayeslr.units import format_quantity
from bayeslr_runners.moe import checkpoint
from bayeslr_runners.moe.divergence import Watch, cause
from bayeslr_runners.moe.records import RecordLog, build_row
from bayeslr_runners.moe.schedule import Horizon, horizons, lr_factor, schedule_state
from bayeslr_runners.moe.specfile import read_spec
from bayeslr_runners.moe.trainer import Step, Trainer

# A blow-up must last this share of the steps to the longest horizon, and this many steps at least.
PATIENCE_SHARE, PATIENCE_STEPS = 0.02, 20


def train(run_dir: Path, *, progress: Callable[[str], None] | None = None) -> None:
    """Train the run of a folder to its end, or go on with it; its records say what came of it.

    progress: called with a line of text after each step.
    Raises: SpecError if the spec breaks a rule, StorageError if the disk refuses.
    """
    spec = read_spec(run_dir)
    records = RecordLog(run_dir / RECORDS_FILE)
    if has_ended(records, spec):
        return
    run = _Run(run_dir, spec, records, Trainer.build(spec), progress or (lambda line: None))
    run.resume()
    run.to_the_end()


def has_ended(records: RecordLog, spec: RunSpec) -> bool:
    """Whether the records already say all there is to say about the run."""
    return any(
        row["status"] == "diverged" or (row["status"] == "ok" and row["tokens"] == spec.tokens)
        for row in records.rows
    )


@dataclass(slots=True)
class _Position:
    """``steps_trained`` also counts the steps of branches that were left behind."""

    horizon: int = 0
    in_branch: bool = False
    step: int = 0
    steps_trained: int = 0


class _Diverged(Exception):
    """The run is over, for the reason in the argument."""


class _Run:
    """Moves a trainer along the plan of its spec."""

    def __init__(
        self,
        run_dir: Path,
        spec: RunSpec,
        records: RecordLog,
        trainer: Trainer,
        progress: Callable[[str], None],
    ) -> None:
        self.run_dir, self.spec, self.records = run_dir, spec, records
        self.trainer, self.progress = trainer, progress
        self.options = trainer.options.train
        self.plan = horizons(spec)
        self.position = _Position()
        self.trunk: dict[str, Any] | None = None
        self.last: Step | None = None
        patience = max(PATIENCE_STEPS, round(PATIENCE_SHARE * self.plan[-1].num_steps))
        self.watch = Watch(patience=patience)
        self.wall_before = 0.0
        self.started = self.saved_at = time.monotonic()
        self.partial_steps = self._partial_steps()

    def to_the_end(self) -> None:
        """Train what is left of the plan."""
        try:
            for index in range(self.position.horizon, len(self.plan)):
                self._train_horizon(index)
        except _Diverged as error:
            self._record_divergence(str(error))
        if not self.options.keep_checkpoint:
            checkpoint.remove(self.run_dir)

    def resume(self) -> None:
        """Go to where the last checkpoint is; to the start if there is none."""
        saved = checkpoint.load(self.run_dir)
        if saved is None:
            return
        if saved["spec"] != self._spec_hash():
            raise StorageError(
                f"{self.run_dir / checkpoint.CHECKPOINT_FILE} belongs to another spec than "
                f"{SPEC_FILE} beside it; use a new folder for a new run"
            )
        self.position = _Position(**saved["position"])
        self.trunk = saved["trunk"]
        self.wall_before = saved["wall_s"]
        self._restore(saved["live"])

    def _train_horizon(self, index: int) -> None:
        horizon, position = self.plan[index], self.position
        is_last = index == len(self.plan) - 1
        if not position.in_branch:
            while position.step < horizon.branch_step:
                self._step(horizon)
                if position.step in self.partial_steps:
                    self._record_partial()
                self._save_if_due()
            position.in_branch = True
            if not is_last and horizon.branch_step < horizon.num_steps:
                self.trunk = self._state()
        while position.step < horizon.num_steps:
            self._step(horizon)
            self._save_if_due()
        self._record_horizon(horizon)
        if is_last:
            return
        if self.trunk is not None:
            self._restore(self.trunk)
            position.step = horizon.branch_step
        self.trunk = None
        position.horizon, position.in_branch = index + 1, False
        self._save()

    def _step(self, horizon: Horizon) -> None:
        position, spec = self.position, self.spec
        factor = lr_factor(
            spec,
            (position.step + 0.5) * spec.batch_tokens,
            horizon.tokens,
            decay_shape=self.options.decay_shape,
        )
        self.last = self.trainer.step(position.step, factor)
        reason = self.watch.see(self.last.loss, self.last.grad_norm)
        position.step += 1
        position.steps_trained += 1
        if reason is not None:
            raise _Diverged(reason)
        self.progress(
            f"{spec.run_id}: {format_quantity(position.step * spec.batch_tokens)} of "
            f"{format_quantity(horizon.tokens)} tokens, loss {self.last.loss:.3f}"
        )

    def _record_horizon(self, horizon: Horizon) -> None:
        measured = self.trainer.measure()
        reason = self.watch.judge(measured.loss)
        if reason is not None:
            raise _Diverged(reason)
        self._append(
            status="ok", tokens=horizon.tokens, planned_tokens=horizon.tokens, measured=measured
        )

    def _record_partial(self) -> None:
        self._append(
            status="partial",
            tokens=self.position.step * self.spec.batch_tokens,
            planned_tokens=self.spec.tokens,
            measured=self.trainer.measure(),
        )

    def _record_divergence(self, reason: str) -> None:
        shape = self.trainer.shape
        self._append(
            status="diverged",
            status_reason=cause(
                reason,
                effective_experts=self.last.effective_experts if self.last else None,
                top_k=shape.top_k,
                num_experts=shape.n_experts,
            ),
            tokens=self.position.step * self.spec.batch_tokens,
            planned_tokens=self.spec.tokens,
        )

    def _append(self, **values: Any) -> None:
        """Add a row for the run's present position."""
        tokens_seen = self.position.step * self.spec.batch_tokens
        horizon = self.plan[self.position.horizon]
        self.records.append(
            build_row(
                self.spec,
                **values,
                flops_tokens=tokens_seen,
                schedule_state=schedule_state(self.spec, tokens_seen, horizon.tokens),
                wall_s=self._wall_s(),
                corpus=self.trainer.corpus,
                device=self.trainer.device_name,
                diagnostics={
                    "train_loss": self.watch.smoothed,
                    "grad_norm": self.last.grad_norm if self.last else None,
                    "tokens_seen": tokens_seen,
                    "tokens_trained": self.position.steps_trained * self.spec.batch_tokens,
                    "threads": self.options.num_threads,
                },
            )
        )

    def _partial_steps(self) -> frozenset[int]:
        """Steps of the trunk, evenly spaced, at which its undecayed loss is measured."""
        trunk_steps, wanted = self.plan[-1].branch_step, self.options.partial_evals
        steps = {round(trunk_steps * (i + 1) / (wanted + 1)) for i in range(wanted)}
        # A step whose tokens are a horizon's is left out: one row a token count.
        return frozenset(steps - {h.num_steps for h in self.plan} - {0})

    def _save_if_due(self) -> None:
        """Checkpoint, after whatever is recorded at this step: resumed runs go on behind it."""
        if self.options.checkpoint_steps is not None:
            due = self.position.steps_trained % self.options.checkpoint_steps == 0
        else:
            due = time.monotonic() - self.saved_at >= self.options.checkpoint_seconds
        if due:
            self._save()

    def _save(self) -> None:
        checkpoint.save(
            self.run_dir,
            {
                "spec": self._spec_hash(),
                "position": dataclasses.asdict(self.position),
                "trunk": self.trunk,
                "wall_s": self._wall_s(),
                "live": self._state(),
            },
        )
        self.saved_at = time.monotonic()

    def _state(self) -> dict[str, Any]:
        """The network where it is now, with what was seen of its losses on the way."""
        return {
            "trainer": self.trainer.state(),
            "watch": dataclasses.asdict(self.watch),
            "last": dataclasses.asdict(self.last) if self.last else None,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.trainer.restore(state["trainer"])
        self.watch = Watch(**state["watch"])
        self.last = Step(**state["last"]) if state["last"] else None

    def _wall_s(self) -> float:
        return self.wall_before + time.monotonic() - self.started

    def _spec_hash(self) -> str:
        return hashlib.sha256(self.spec.to_json().encode()).hexdigest()
