"""Designs as functions of what was run so far: classical, ladder, D-optimal."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from bayeslr.designs import CLASSICAL_LRS, DESIGNS, Menu, classical, slices_from_cheapest

LOG_LR = np.log(1e-3) + math.log(2.0) / 2 * np.arange(13)
SHAPES = (1e5, 3e5, 9e5)


def valley(menu: Menu, run: int) -> float:
    """Loss with the bottom at 8e-3 for the smallest shape, 0.3 octaves lower for each next."""
    size = math.log(menu.n_active[run] / 1e5) / math.log(3.0)
    bottom = math.log(8e-3) - 0.3 * math.log(2.0) * size
    return 3.0 - 0.2 * size + 0.05 * float(menu.log_lr[run] - bottom) ** 2


def menu(batches: tuple[float, ...] = (4096.0,), left_flops: float = 1e15) -> Menu:
    rows = [(n, b, x) for n in SHAPES for b in batches for x in LOG_LR]
    n_active, batch, log_lr = (np.array(column) for column in zip(*rows, strict=True))
    code = np.array([SHAPES.index(n) * len(batches) + batches.index(b) for n, b, _ in rows])
    flops = 6 * n_active * 4e5
    return Menu(
        n_active=n_active, n_total=4 * n_active, tokens=np.full(len(rows), 4e5),
        batch_tokens=batch, log_lr=log_lr, flops=flops, loss=np.full(len(rows), np.nan),
        slice_of_run=slices_from_cheapest(code, flops), left_flops=left_flops,
    )  # fmt: skip


def followed(start: Menu, name: str) -> tuple[Menu, list[list[int]]]:
    """A design to its end: the menu then, and the runs of each step."""
    steps = []
    while step := DESIGNS[name](start):
        loss = start.loss.copy()
        loss[step] = [valley(start, run) for run in step]
        left = start.left_flops - math.fsum(start.flops[step])
        start = dataclasses.replace(start, loss=loss, left_flops=left)
        steps.append(step)
    return start, steps


@pytest.mark.parametrize("name", list(DESIGNS))
@pytest.mark.parametrize("left_flops", [1e11, 2e12, 2e13, 1e15])
def test_a_design_ends_within_its_budget_and_makes_nothing_twice(
    name: str, left_flops: float
) -> None:
    end, steps = followed(menu((2048.0, 4096.0, 8192.0), left_flops), name)
    made = [run for step in steps for run in step]
    assert end.left_flops >= 0
    assert len(set(made)) == len(made)
    assert bool(made) is (left_flops > 1e11)


def test_the_classical_design_is_five_lrs_a_shape_about_the_best_so_far() -> None:
    end, steps = followed(menu(), "classical")
    assert [len(step) for step in steps] == [CLASSICAL_LRS] * 3
    assert [set(end.n_active[step]) for step in steps] == [{n} for n in SHAPES]
    first, second, third = (end.log_lr[sorted(step)] for step in steps)
    np.testing.assert_allclose(np.diff(first), 1.5 * math.log(2.0))  # over the whole range
    for lrs, before in ((second, steps[0]), (third, steps[0] + steps[1])):
        np.testing.assert_allclose(np.diff(lrs), math.log(2.0))
        best = end.log_lr[before[int(np.argmin(end.loss[before]))]]
        assert lrs[2] == pytest.approx(best)


def test_the_classical_design_keeps_five_lrs_at_the_end_of_the_grid() -> None:
    start = menu()
    loss = start.loss.copy()
    loss[:13:3] = 3.0 - 0.1 * np.arange(5)  # the best is the highest LR of all
    step = classical(dataclasses.replace(start, loss=loss))
    assert len(step) == CLASSICAL_LRS
    assert max(start.log_lr[step]) == LOG_LR[-1]


def test_the_classical_design_takes_the_middle_batch_first() -> None:
    end, steps = followed(menu((2048.0, 4096.0, 8192.0)), "classical")
    assert [set(end.batch_tokens[step]) for step in steps[:3]] == [{4096.0}] * 3
    assert len(steps) == 9


def test_runs_that_all_diverged_send_the_next_ones_down() -> None:
    start = menu()
    loss = start.loss.copy()
    loss[[4, 7, 10, 11, 12]] = math.inf
    step = classical(dataclasses.replace(start, loss=loss))
    assert float(np.median(start.log_lr[step])) == pytest.approx(LOG_LR[4])


def test_the_ladder_makes_every_second_lr_of_every_shape_before_the_others() -> None:
    end, steps = followed(menu(), "ladder")
    assert [len(step) for step in steps] == [7, 7, 7, 6, 6, 6]
    assert [end.n_active[step[0]] for step in steps] == [*SHAPES, *SHAPES]


def test_d_optimality_goes_to_the_ends_of_the_space() -> None:
    start = menu()
    equal = dataclasses.replace(start, flops=np.ones(len(start.flops)))
    _, steps = followed(equal, "d-optimal")
    assert [len(step) for step in steps] == [3, 3, 3]
    # Of three sizes on a line the middle one tells least: once an end is known, the other is next.
    assert [start.n_active[step[0]] for step in steps][-1] == SHAPES[1]
