"""Optuna's samplers as strategies of a replay."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bayeslr.replay import score, strategies
from bayeslr_runners import strategies as plugged
from tests.test_replay import campaign, pool, truth  # noqa: F401


@pytest.mark.parametrize("name", ["tpe", "gp"])
@pytest.mark.parametrize("share", [0.005, 0.05])
def test_the_lr_of_the_largest_affordable_cell_is_copied(
    name: str,
    share: float,
    pool,  # noqa: F811
    truth,  # noqa: F811
) -> None:
    made = campaign(pool, share)
    start = len(made.bought)
    table = getattr(plugged, name)(made)
    assert math.fsum(pool.flops[made.bought]) <= share * pool.total_flops
    assert len(set(pool.slice_of_run[made.bought[start:]].tolist())) <= 1
    best = pool.specs[made.bought[int(np.argmin(made.losses()))]]
    assert table["lr"].nunique() == 1
    if share > 0.01:
        assert best.n_active > pool.specs[0].n_active
    assert score(truth, table).regret_mean < 0.5


def test_they_are_found_by_the_entry_point() -> None:
    found, notices = strategies("tpe")
    assert list(found) == ["tpe"]
    assert notices == []
