"""One training run, or a stack of them: trunk, decay branches, records, checkpoints.

The position, the same for all members of a stack, is (horizon, whether it has left the trunk,
step). A checkpoint holds the position and the state of the network there, and inside a branch also
the state of the trunk where the branch left it. The state before the last branch is kept for longer
runs (`trunk`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayeslr.errors import StorageError
from bayeslr.runner_protocol import RECORDS_FILE, SPEC_FILE, STOP_FILE
from bayeslr.specs import RunSpec
from bayeslr.units import format_quantity
from bayeslr_runners.moe import checkpoint
from bayeslr_runners.moe.divergence import Watch, cause
from bayeslr_runners.moe.options import Options
from bayeslr_runners.moe.records import RecordLog, build_row
from bayeslr_runners.moe.schedule import Horizon, horizons, lr_factor, schedule_state
from bayeslr_runners.moe.specfile import read_spec
from bayeslr_runners.moe.spikes import Spikes
from bayeslr_runners.moe.stack import check_stack
from bayeslr_runners.moe.trainer import Step, Trainer
from bayeslr_runners.moe.trunk import CHECKPOINT_FILE, TRUNK_FILE, trunk_key, trunk_tokens

# A blow-up must last this share of the steps to the longest horizon, and this many steps at least.
PATIENCE_SHARE, PATIENCE_STEPS = 0.02, 20


def train(*run_dirs: Path, progress: Callable[[str], None] | None = None) -> None:
    """Train the run of a folder to its end, or go on with it; its records say what came of it.

    Several folders are trained as one program (see `stack`), each with the records and the
    checkpoints that it would have alone. Those that have ended are left as they are, those that
    stopped at different places are not stacked with each other.
    progress: called with a line of text after each step.
    Raises: SpecError if a spec breaks a rule, StorageError if the disk refuses.
    """
    specs = [read_spec(run_dir) for run_dir in run_dirs]
    check_stack(specs)
    by_position: dict[_Position, list[_Member]] = {}
    for run_dir, spec in zip(run_dirs, specs, strict=True):
        records = RecordLog(run_dir / RECORDS_FILE)
        if not has_ended(records, spec):
            position, member = _resumed(_Member(run_dir, spec, records))
            by_position.setdefault(position, []).append(member)
    for position, members in by_position.items():
        # One path for a run alone and among others: then what it is stacked with changes no bit.
        # On a GPU this was not measured: there a run alone takes the path that it always took.
        on_cpu = Options.from_mapping(specs[0].options).train.device == "cpu"
        trainer = Trainer.build(*(member.spec for member in members), stacked=on_cpu)
        _Run(members, position, trainer, progress or (lambda line: None)).to_the_end()


def has_ended(records: RecordLog, spec: RunSpec) -> bool:
    """Whether the records already say all there is to say about the run."""
    return any(
        row["status"] == "diverged" or (row["status"] == "ok" and row["tokens"] == spec.tokens)
        for row in records.rows
    )


@dataclass(frozen=True, slots=True)
class _Position:
    """``steps_trained`` also counts the steps of branches that were left behind."""

    horizon: int = 0
    in_branch: bool = False
    step: int = 0
    steps_trained: int = 0


class _Member:
    """One run of a stack: where it is kept, what was seen of its losses, its part of the time."""

    def __init__(self, run_dir: Path, spec: RunSpec, records: RecordLog) -> None:
        self.run_dir, self.spec, self.records = run_dir, spec, records
        num_steps = horizons(spec)[-1].num_steps
        self.watch = Watch(patience=max(PATIENCE_STEPS, round(PATIENCE_SHARE * num_steps)))
        self.spikes = Spikes()
        self.last: Step | None = None
        self.live: dict[str, Any] | None = None
        self.trunk: dict[str, Any] | None = None
        self.wall_s = 0.0

    def state(self, network: dict[str, Any]) -> dict[str, Any]:
        """The network where it is now, with what was seen of its losses on the way."""
        return {
            "trainer": network,
            "watch": dataclasses.asdict(self.watch),
            "spikes": dataclasses.asdict(self.spikes),
            "last": dataclasses.asdict(self.last) if self.last else None,
        }

    def restore(self, state: dict[str, Any]) -> dict[str, Any]:
        """Inverse of `state`; the network."""
        self.watch = Watch(**{**state["watch"], "patience": self.watch.patience})
        self.spikes = Spikes(**state.get("spikes", {}))
        self.last = Step(**state["last"]) if state["last"] else None
        network: dict[str, Any] = state["trainer"]
        return network

    def spec_hash(self) -> str:
        """What a checkpoint must have been saved under: the run, wherever it began."""
        whole = dataclasses.replace(self.spec, continues=None, continues_at=0)
        return hashlib.sha256(whole.to_json().encode()).hexdigest()


def _resumed(member: _Member) -> tuple[_Position, _Member]:
    """The member where its last checkpoint is; at the start if there is none."""
    path = member.run_dir / CHECKPOINT_FILE
    saved = checkpoint.load(path)
    if saved is None:
        return _started(member), member
    if saved["spec"] != member.spec_hash():
        raise StorageError(
            f"{path} belongs to another spec than {SPEC_FILE} beside it; use a new folder for a "
            "new run"
        )
    member.trunk, member.live, member.wall_s = saved["trunk"], saved["live"], saved["wall_s"]
    return _Position(**saved["position"]), member


def _started(member: _Member) -> _Position:
    """Where the member begins: at no step, or at the end of the trunk that it goes on from."""
    spec = member.spec
    if spec.continues is None:
        return _Position()
    path = member.run_dir.parent / spec.continues / TRUNK_FILE
    saved = checkpoint.load(path)
    wanted = (trunk_key(spec), spec.continues_at)
    if saved is None or (saved["key"], saved["tokens"]) != wanted:
        wrong = "is not there" if saved is None else "is not the trunk of this run"
        raise StorageError(
            f"run {spec.run_id} goes on from {spec.continues} at {spec.continues_at} tokens, but "
            f"{path} {wrong}; put the folders of both beside each other, or take continues and "
            f"continues_at out of {SPEC_FILE} to train the whole run"
        )
    member.live = saved["live"]
    return _Position(step=spec.continues_at // spec.batch_tokens)


class _AllEnded(Exception):
    """No member of the stack is left to train."""


class _Run:
    """Moves a trainer along the plan that its members share."""

    def __init__(
        self,
        members: list[_Member],
        position: _Position,
        trainer: Trainer,
        progress: Callable[[str], None],
    ) -> None:
        self.members, self.position = members, position
        self.trainer, self.progress = trainer, progress
        self.spec = members[0].spec  # but for its LR, weight decay, seed and names
        self.options = trainer.options.train
        self.plan = horizons(self.spec)
        self.charged_at = self.saved_at = time.monotonic()
        self.partial_steps = self._partial_steps()
        if members[0].live is not None:
            self._restore([member.live for member in members if member.live is not None])

    def to_the_end(self) -> None:
        """Train what is left of the plan."""
        with contextlib.suppress(_AllEnded):
            for index in range(self.position.horizon, len(self.plan)):
                self._train_horizon(index)
        for member in self.members:
            self._clean(member)

    def _train_horizon(self, index: int) -> None:
        horizon = self.plan[index]
        is_last = index == len(self.plan) - 1
        if not self.position.in_branch:
            while self.position.step < horizon.branch_step:
                self._step(horizon)
                if self.position.step in self.partial_steps:
                    self._record_partial()
                self._save_if_due()
            self._move(in_branch=True)
            if is_last:
                self._keep_trunk()
            elif horizon.branch_step < horizon.num_steps:
                for member, state in zip(self.members, self._states(), strict=True):
                    member.trunk = state
        while self.position.step < horizon.num_steps:
            self._step(horizon)
            self._save_if_due()
        self._record_horizon(horizon)
        if is_last:
            return
        trunks = [member.trunk for member in self.members if member.trunk is not None]
        if trunks:
            self._restore(trunks)
            self._move(step=horizon.branch_step)
        for member in self.members:
            member.trunk = None
        self._move(horizon=index + 1, in_branch=False)
        self._save()

    def _step(self, horizon: Horizon) -> None:
        self._leave_out()
        position, spec = self.position, self.spec
        factor = lr_factor(
            spec,
            (position.step + 0.5) * spec.batch_tokens,
            horizon.tokens,
            decay_shape=self.options.decay_shape,
        )
        steps = self.trainer.step(position.step, factor)
        self._move(step=position.step + 1, steps_trained=position.steps_trained + 1)
        reasons = {}
        for member, step in zip(self.members, steps, strict=True):
            member.last = step
            member.spikes.see(step.loss)
            reason = member.watch.see(step.loss, step.grad_norm)
            if reason is not None:
                reasons[member.spec.run_id] = reason
        self._drop(reasons)
        self.progress(
            f"{_names(self.members)}: {format_quantity(self.position.step * spec.batch_tokens)} of "
            f"{format_quantity(horizon.tokens)} tokens, loss {_losses(self.members)}"
        )

    def _record_horizon(self, horizon: Horizon) -> None:
        found = dict(zip(self._ids(), self.trainer.measure(), strict=True))
        reasons = {}
        for i, member in enumerate(self.members):
            loss = found[member.spec.run_id].loss
            reason = member.watch.judge(loss, functools.partial(self.trainer.initial_loss, i))
            if reason is not None:
                reasons[member.spec.run_id] = reason
        self._drop(reasons)
        for member in self.members:
            self._append(
                member,
                status="ok",
                tokens=horizon.tokens,
                planned_tokens=horizon.tokens,
                measured=found[member.spec.run_id],
                trunk_tokens=self._kept_trunk(member) if horizon is self.plan[-1] else None,
            )

    def _record_partial(self) -> None:
        for member, measured in zip(self.members, self.trainer.measure(), strict=True):
            self._append(
                member,
                status="partial",
                tokens=self.position.step * self.spec.batch_tokens,
                planned_tokens=self.spec.tokens,
                measured=measured,
            )

    def _drop(self, reasons: Mapping[str, str]) -> None:
        """Record the runs that have diverged, by run_id, and go on without them."""
        if not reasons:
            return
        shape = self.trainer.shape
        for member in self.members:
            if member.spec.run_id in reasons:
                self._append(
                    member,
                    status="diverged",
                    status_reason=cause(
                        reasons[member.spec.run_id],
                        effective_experts=member.last.effective_experts if member.last else None,
                        top_k=shape.top_k,
                        num_experts=shape.n_experts,
                    ),
                    tokens=self.position.step * self.spec.batch_tokens,
                    planned_tokens=self.spec.tokens,
                )
                self._clean(member)
                (member.run_dir / TRUNK_FILE).unlink(missing_ok=True)
        self._keep([i for i, m in enumerate(self.members) if m.spec.run_id not in reasons])

    def _leave_out(self) -> None:
        """Go on without the runs whose folders say so; see `StackRunner` in the protocol."""
        stops = [member.run_dir / STOP_FILE for member in self.members]
        kept = [i for i, stop in enumerate(stops) if not stop.exists()]
        if len(kept) == len(stops):
            return
        self._charge()
        try:
            self._keep(kept)
        finally:
            for i in set(range(len(stops))) - set(kept):
                stops[i].unlink(missing_ok=True)

    def _keep(self, kept: Sequence[int]) -> None:
        self.members = [self.members[i] for i in kept]
        if not kept:
            raise _AllEnded
        self.trainer = self.trainer.keeping(kept)

    def _append(self, member: _Member, **values: Any) -> None:
        """Add a row for the run's present position."""
        self._charge()
        tokens_seen = self.position.step * self.spec.batch_tokens
        horizon = self.plan[self.position.horizon]
        member.records.append(
            build_row(
                member.spec,
                **values,
                flops_tokens=tokens_seen - self.spec.continues_at,
                schedule_state=schedule_state(self.spec, tokens_seen, horizon.tokens),
                wall_s=member.wall_s,
                corpus=self.trainer.corpus,
                device=self.trainer.device_name,
                diagnostics={
                    "train_loss": member.watch.smoothed,
                    "grad_norm": member.last.grad_norm if member.last else None,
                    "tokens_seen": tokens_seen,
                    "tokens_trained": self.position.steps_trained * self.spec.batch_tokens,
                    "threads": self.trainer.num_threads,
                    **member.spikes.summary(),
                },
            )
        )

    def _charge(self) -> None:
        """Share the time since the last call between the members."""
        now = time.monotonic()
        for member in self.members:
            member.wall_s += (now - self.charged_at) / len(self.members)
        self.charged_at = now

    def _move(self, **changes: Any) -> None:
        self.position = dataclasses.replace(self.position, **changes)

    def _ids(self) -> list[str]:
        return [member.spec.run_id for member in self.members]

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
        self._charge()
        for member, state in zip(self.members, self._states(), strict=True):
            checkpoint.save(
                member.run_dir / CHECKPOINT_FILE,
                {
                    "spec": member.spec_hash(),
                    "position": dataclasses.asdict(self.position),
                    "trunk": member.trunk,
                    "wall_s": member.wall_s,
                    "live": state,
                },
            )
        self.saved_at = time.monotonic()

    def _keep_trunk(self) -> None:
        """Leave the network before the last decay to longer runs."""
        tokens = trunk_tokens(self.spec)
        if tokens is None:
            return
        for member, state in zip(self.members, self._states(), strict=True):
            kept = {"key": trunk_key(member.spec), "tokens": tokens, "live": state}
            checkpoint.save(member.run_dir / TRUNK_FILE, kept)

    def _kept_trunk(self, member: _Member) -> int | None:
        # Not there if the run was resumed from a checkpoint that is older than this file.
        return trunk_tokens(member.spec) if (member.run_dir / TRUNK_FILE).exists() else None

    def _states(self) -> list[dict[str, Any]]:
        networks = self.trainer.state()
        return [m.state(network) for m, network in zip(self.members, networks, strict=True)]

    def _restore(self, states: list[dict[str, Any]]) -> None:
        self.trainer.restore(
            [member.restore(state) for member, state in zip(self.members, states, strict=True)]
        )

    def _clean(self, member: _Member) -> None:
        if not self.options.keep_checkpoint:
            (member.run_dir / CHECKPOINT_FILE).unlink(missing_ok=True)


def _names(members: Sequence[_Member]) -> str:
    first = members[0].spec.run_id
    return first if len(members) == 1 else f"{first} and {len(members) - 1} more"


def _losses(members: Sequence[_Member]) -> str:
    losses = [member.last.loss for member in members if member.last is not None]
    low, high = f"{min(losses):.3f}", f"{max(losses):.3f}"
    return low if len(members) == 1 else f"{low} to {high}"
