"""Which runs are trained together as one program, where the runner can.

A program that trains several runs starts once, and takes less time than one run after another. It
must not leave other slots idle: runs are dealt to the slots as if a stack saved nothing, and only
runs of one slot share a program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bayeslr.runner_protocol import StackRunner
from bayeslr.specs import RunSpec

MAX_STACK = 8
"""Members of a stack: beyond eight, memory grows and the time a run takes hardly falls."""


def stacks_of(runner: StackRunner, specs: Sequence[RunSpec], slots: int) -> list[list[RunSpec]]:
    """The runs in stacks of one or more, in the order of the first run of each.

    Were a stack as slow as its runs one by one, the last slot would be through no later than if the
    runs were dealt one by one, the costliest first.
    """
    flops = [runner.flops(spec) for spec in specs]
    keys = [runner.stack_key(spec) for spec in specs]
    order = sorted(range(len(specs)), key=lambda i: (-flops[i], keys[i]))
    dealt, longest = _dealt(order, flops, keys, slots)
    # One part in 1e9 forgives the rounding of sums.
    together, at_most = _dealt(order, flops, keys, slots, room=longest * (1 + 1e-9))
    if at_most <= longest * (1 + 1e-9):
        dealt = together
    stacks = []
    for members in dealt:
        number = math.ceil(len(members) / MAX_STACK)
        stacks += [sorted(members[i::number]) for i in range(number)]
    return [[specs[i] for i in stack] for stack in sorted(stacks)]


def _dealt(
    order: Sequence[int],
    flops: Sequence[float],
    keys: Sequence[str],
    slots: int,
    room: float = 0.0,
) -> tuple[list[list[int]], float]:
    """Runs of one slot and key, and the FLOPs of the slot with most to do.

    Each run goes to a slot that has its key and room for it, otherwise to the one with least to do.
    """
    load = [0.0] * slots
    dealt: dict[tuple[int, str], list[int]] = {}
    for i in order:
        fitting = [s for s in range(slots) if (s, keys[i]) in dealt and load[s] + flops[i] <= room]
        slot = fitting[0] if fitting else min(range(slots), key=load.__getitem__)
        load[slot] += flops[i]
        dealt.setdefault((slot, keys[i]), []).append(i)
    return list(dealt.values()), max(load)
