"""From run table to design: which run is in which slice, cell, shape and family."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from bayeslr.errors import DataError
from bayeslr.features import REGRESSORS, Design, build_design
from bayeslr.runs import make_table
from tests.model_fixtures import made_up_runs, run_record


def design_of(*rows: dict[str, Any]) -> Design:
    return build_design(make_table(list(rows)))


def row(run_id: str, n: float = 1e8, d: float = 2e9, b: float = 1e5, lr: float = 1e-3,
        loss: float | None = 3.0, **more: Any) -> dict[str, Any]:  # fmt: skip
    return run_record(run_id, n, d, b, lr, loss, **more)


def test_levels_are_counted() -> None:
    design = build_design(made_up_runs())
    sizes = (design.num_runs, design.num_slices, design.num_cells, design.num_shapes)
    assert sizes == (40, 8, 4, 2)
    assert design.families == ("made-up",)
    assert design.parametrizations == ("sp",)


def test_indices_lead_from_each_run_to_its_own_scales() -> None:
    runs = made_up_runs()
    design, frame = build_design(runs), runs.frame
    s = design.slice_of_run
    features = design.slice_features()
    assert tuple(features) == REGRESSORS
    np.testing.assert_allclose(features["log_n_active"][s], np.log(frame["n_active"]))
    np.testing.assert_allclose(
        features["log_sparsity"][s], np.log(frame["n_active"] / frame["n_total"])
    )
    np.testing.assert_allclose(features["log_tokens"][s], np.log(frame["tokens"]))
    np.testing.assert_allclose(features["log_batch"][s], np.log(frame["batch_tokens"]))
    np.testing.assert_allclose(design.log_lr, np.log(frame["lr"]))


def test_the_order_of_rows_does_not_matter() -> None:
    runs = made_up_runs()
    shuffled = make_table(runs.frame.sample(frac=1.0, random_state=3))
    first, second = build_design(runs), build_design(shuffled)
    np.testing.assert_array_equal(first.log_batch, second.log_batch)
    np.testing.assert_array_equal(first.cell_of_slice, second.cell_of_slice)
    assert sorted(zip(first.slice_of_run, first.log_lr, strict=True)) == sorted(
        zip(second.slice_of_run, second.log_lr, strict=True)
    )


def test_decay_branches_and_data_orders_are_told_apart() -> None:
    """A run of one row shares no noise; nor do seeds that every run, or none, has to itself."""
    design = design_of(
        row("a", d=1e9), row("a", d=2e9), row("b", d=1e9), row("c", d=1e9, lr=2e-3),
        row("c", d=2e9, loss=None, lr=2e-3),
        *(row(f"s{s}{i}", n=2e8, lr=1e-3 * 2**i, seed=s) for s in (0, 1) for i in range(2)),
        row("s9", n=2e8, lr=3e-3),
        *(row(f"t{i}", n=4e8, lr=1e-3 * 2**i, seed=i) for i in range(3)),
        *(row(f"u{i}", n=8e8, lr=1e-3 * 2**i, seed=0) for i in range(3)),
    )  # fmt: skip
    # Under WSD a longer run with the same seed has the trunk of a shorter one.
    wsd = [row(f"w{d}{s}", d=d, seed=s, schedule="wsd") for d in (1e9, 2e9) for s in (0, 1)]
    assert design_of(*wsd).trunk_of_run.tolist() == [0, 1, 0, 1]
    assert design_of(*(w | {"schedule": "cosine"} for w in wsd)).num_shared == 0
    # An LR multiplier that is not stated is 1, and 2 is another trunk.
    stated = [w | {"lr_multiplier_head": 1.0 if w["tokens"] == 2e9 else None} for w in wsd]
    assert design_of(*stated).trunk_of_run.tolist() == [0, 1, 0, 1]
    other = [w | {"lr_multiplier_head": 2.0 if w["tokens"] == 2e9 else None} for w in wsd]
    assert design_of(*other).trunk_of_run.tolist() == [-1] * 4
    none = [-1] * 6
    assert design.trunk_of_run.tolist() == [0, 0, -1, 1, 1, *[-1] * 5, *none]
    assert design.order_of_run.tolist() == [-1] * 5 + [2, 2, 3, 3, -1, *none]
    assert design.num_shared == 4


def test_families_part() -> None:
    design = design_of(
        row("a"), row("b", family="other", parametrization="mup"), row("c", parametrization="sp"),
        row("d", n=2e8),
    )  # fmt: skip
    assert design.families == ("made-up", "other")
    assert design.parametrizations == ("sp", "mup")
    assert design.num_shapes == 3
    np.testing.assert_array_equal(
        design.family_of_slice, design.family_of_shape[design.shape_of_slice]
    )


def test_one_family_under_two_parametrizations_is_refused() -> None:
    with pytest.raises(DataError, match=r"family 'made-up' holds runs under mup and sp, .* own"):
        design_of(row("a"), row("b", parametrization="mup"))


def test_diverged_runs_with_checkpoints_are_no_valley() -> None:
    rows = [
        row("a", loss=3.1, d=1e9, status="partial"), row("a", loss=None, status="diverged"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="all 1 runs diverged"):
        design_of(*rows)


def test_tokens_that_differ_by_whole_batches_are_one_cell() -> None:
    rows = [
        row(f"{b}-{lr}", d=round(2e9 / b) * b, b=b, lr=lr)
        for b in (196_608, 262_144, 393_216, 524_288) for lr in (1e-3, 2e-3)
    ]  # fmt: skip
    design = design_of(*rows, row("other", d=2.2e9), row("wider", d=2e9, d_model=512))
    assert (design.num_slices, design.num_cells, design.num_shapes) == (6, 3, 2)


def test_a_stopped_run_counts_once() -> None:
    rows = [row("a", status=status, d=1e9) for status in ("partial", "pruned")]
    assert design_of(row("b"), *rows).num_runs == 2


def test_a_familys_centre_is_the_mean_of_its_own_slices() -> None:
    design = design_of(
        row("a", n=1e8), row("b", n=4e8), row("c", n=4e8, lr=2e-3), row("d", n=1e9, family="other")
    )
    np.testing.assert_allclose(
        design.family_centres()["log_n_active"], np.log([2e8, 1e9])
    )  # two runs of one slice count once
    first = np.flatnonzero(design.family_of_slice == 0)[:1]
    kept = design.family_centres(first)["log_n_active"]
    only = design.slice_features()["log_n_active"][first[0]]
    np.testing.assert_allclose(kept, [only, only])  # a family without a slice: all that count


def test_seeds_and_lrs_share_a_slice_and_widths_do_not() -> None:
    design = design_of(
        row("a"), row("b", seed=2), row("c", lr=2e-3), row("d", d_model=256), row("e", b=2e5)
    )
    assert (design.num_slices, design.num_cells, design.num_shapes) == (3, 2, 2)


def test_diverged_runs_stay_without_their_loss_and_at_their_horizon() -> None:
    design = design_of(
        row("a"), row("b", lr=1e-2, loss=None, d=3e8, planned_tokens=2e9),
        row("c", lr=2e-2, loss=9.0, status="diverged"),
    )  # fmt: skip
    assert design.num_slices == 1
    np.testing.assert_array_equal(np.sort(design.diverged), [False, True, True])
    assert np.isnan(design.loss[design.diverged]).all()
    assert design.log_tokens[0] == pytest.approx(math.log(2e9))


def test_unfinished_runs_have_cells_of_their_own() -> None:
    design = design_of(row("a"), row("b", status="partial"), row("c", status="pruned"))
    assert design.num_cells == 2
    assert sorted(design.annealed) == [False, True]


def test_failed_and_lost_runs_say_nothing() -> None:
    design = design_of(
        row("a"), row("b", status="failed"), row("c", status="lost", loss=None),
        row("d", status="partial", loss=None),
    )  # fmt: skip
    assert design.num_runs == 1


def test_no_usable_run_is_refused() -> None:
    with pytest.raises(DataError, match=r"no run can be used.*failed and lost"):
        design_of(row("a", status="failed"), row("b", status="lost", loss=None))


def test_only_diverged_runs_are_refused_with_advice() -> None:
    with pytest.raises(DataError, match=r"all 2 runs diverged.*add runs at lower LR"):
        design_of(row("a", loss=None), row("b", loss=None, lr=2e-3))


def test_unknown_standard_errors_are_zero() -> None:
    design = design_of(row("a"), row("b", loss_se=0.002, lr=2e-3))
    assert sorted(design.loss_se) == [0.0, 0.002]
