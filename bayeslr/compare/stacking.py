"""Runs that differ in LR, seed or multipliers, trained as one program where the runner can.

A valley costs less in one piece than run by run. The records are those that each run would have
left alone, so whoever asks for a run afterwards finds it complete; a stack that breaks leaves its
runs to be trained one by one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from bayeslr.loop.children import Child, complete, launched
from bayeslr.loop.worker import POLL_SECONDS, Due, Progress
from bayeslr.runner_protocol import SPEC_FILE, Runner, StackRunner
from bayeslr.runs import write_atomically
from bayeslr.specs import RunSpec

MAX_STACK = 8
"""Members of a stack: beyond eight, memory grows and the time a run takes hardly falls."""


def train_stacks(
    runner: Runner, runs: Sequence[Due], runs_dir: Path, *, slots: int, progress: Progress
) -> None:
    """Train what of ``runs`` is not complete and can be stacked, ``slots`` stacks at a time.

    Does nothing for a runner that cannot stack. Whatever ends it early, its children end too; their
    runs go on from their checkpoints.
    """
    if not isinstance(runner, StackRunner):
        return
    waiting = stacks_of(runner, [d.spec for d in runs if not _ended(d.spec, runs_dir)], slots)
    total, running = len(waiting), list[Child]()
    try:
        while waiting or running:
            running = [child for child in running if child.running]
            while waiting and len(running) < slots:
                stack = waiting.pop(0)
                number = f"{total - len(waiting)} of {total}"
                progress(f"training {len(stack)} runs as one program ({number})")
                running.append(_start(runner, stack, runs_dir))
            time.sleep(POLL_SECONDS)
    finally:
        for child in running:
            child.stop()


def stacks_of(runner: StackRunner, specs: Sequence[RunSpec], slots: int) -> list[list[RunSpec]]:
    """Stacks of two runs or more, of about the same size, enough of them for all slots.

    Runs that find no second one are left out, as are groups that the slots can take at once.
    """
    groups: dict[str, list[RunSpec]] = {}
    for spec in specs:
        groups.setdefault(runner.stack_key(spec), []).append(spec)
    stacks = []
    for group in groups.values():
        if len(group) <= slots:
            continue
        # As many stacks for each slot: none is left idle while another trains the last one.
        number = slots * math.ceil(len(group) / (MAX_STACK * slots))
        parts = [group[i::number] for i in range(number)]
        stacks += [part for part in parts if len(part) > 1]
    return stacks


def _ended(spec: RunSpec, runs_dir: Path) -> bool:
    return complete(spec, runs_dir / spec.run_id)


def _start(runner: StackRunner, stack: Sequence[RunSpec], runs_dir: Path) -> Child:
    """The child of a stack; its log lies in the first run's folder, a lock in every run's."""
    # In one order everywhere, so that two stacks never wait for each other's locks.
    stack = sorted(stack, key=lambda spec: spec.run_id)
    folders = [runs_dir / spec.run_id for spec in stack]
    for spec, folder in zip(stack, folders, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / SPEC_FILE, (spec.to_json() + "\n").encode())
    command = runner.stack_command(folders)
    for folder in reversed(folders[1:]):
        command = launched(folder, command)
    return Child(stack[0], folders[0], command)
