"""Which runs of a batch share a program, and that no slot is idle for it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from bayeslr.loop.stacking import MAX_STACK, stacks_of
from bayeslr.specs import RunSpec


class Pricer:
    """A runner that only names keys and prices: a run's key is its family, its price its tokens."""

    def counts(self, shape: object) -> tuple[int, int]:
        return 1, 1

    def flops(self, spec: RunSpec) -> float:
        return float(spec.tokens)

    def command(self, spec: RunSpec, run_dir: Path) -> list[str]:
        raise NotImplementedError

    def stack_key(self, spec: RunSpec) -> str:
        return spec.family

    def stack_command(self, run_dirs: Sequence[Path]) -> list[str]:
        raise NotImplementedError


def runs(*prices: tuple[str, int]) -> list[RunSpec]:
    return [
        RunSpec(
            run_id=f"{key}{i}", family=key, runner="r", lr=1e-2, tokens=price, batch_tokens=1,
            n_active=1, n_total=1, seq_len=1,
        )
        for i, (key, price) in enumerate(prices)
    ]  # fmt: skip


def names(prices: Sequence[tuple[str, int]], slots: int) -> list[list[str]]:
    stacks = stacks_of(Pricer(), runs(*prices), slots)
    return [[spec.run_id for spec in stack] for stack in stacks]


@pytest.mark.parametrize(
    ("prices", "slots", "wanted"),
    [
        ([("a", 1)] * 3, 1, [["a0", "a1", "a2"]]),
        ([("a", 1), ("b", 1), ("a", 1)], 1, [["a0", "a2"], ["b1"]]),
        # As many slots as runs: alone.
        ([("a", 1)] * 2, 2, [["a0"], ["a1"]]),
        ([("a", 1)] * 3, 4, [["a0"], ["a1"], ["a2"]]),
        # Two runs one after another or in a stack: a slot has two to do in either case.
        ([("a", 1)] * 3, 2, [["a0", "a1"], ["a2"]]),
        ([("b", 1), ("a", 1), ("a", 1)], 2, [["b0"], ["a1", "a2"]]),
        ([("a", 1)] * 6, 2, [["a0", "a1", "a2"], ["a3", "a4", "a5"]]),
        # A stack of both of a would be through at 8, alone they are at 4.
        ([("a", 4), ("a", 4), ("b", 1)], 2, [["a0"], ["a1"], ["b2"]]),
        ([("a", 3)] * 3 + [("b", 1)] * 3, 2, [["a0", "a1"], ["a2"], ["b3", "b4", "b5"]]),
    ],
)
def test_runs_are_stacked_where_no_slot_is_idle_for_it(
    prices: list[tuple[str, int]], slots: int, wanted: list[list[str]]
) -> None:
    assert names(prices, slots) == wanted


def test_stacks_are_even_and_bounded() -> None:
    assert [len(stack) for stack in names([("a", 1)] * 36, 2)] == [6] * 6
    assert max(map(len, names([("a", 1)] * 101, 3))) <= MAX_STACK


def test_stacks_are_dealt_no_worse_than_runs_one_by_one() -> None:
    rng = random.Random(1)
    stacked = 0
    for _ in range(300):
        prices = [(rng.choice("abc"), rng.randint(1, 9)) for _ in range(rng.randint(1, 14))]
        slots = rng.randint(1, 4)
        load = [0] * slots
        for _, price in sorted(prices, key=lambda p: (-p[1], p[0])):
            load[load.index(min(load))] += price
        stacks = stacks_of(Pricer(), runs(*prices), slots)
        assert Counter(s.run_id for stack in stacks for s in stack) == Counter(
            s.run_id for s in runs(*prices)
        )
        assert max(sum(s.tokens for s in stack) for stack in stacks) <= max(load)
        assert all(len({s.family for s in stack}) == 1 for stack in stacks)
        stacked += any(len(stack) > 1 for stack in stacks)
    assert stacked > 150
