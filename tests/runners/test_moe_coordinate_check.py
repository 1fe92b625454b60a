"""The coordinate check's sizes, slopes and verdict; its child process is in test_cli_transfer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from bayeslr.errors import SpecError
from bayeslr_runners.moe.coordinate_check import judged, lines, main, plot, sizes
from bayeslr_runners.moe.coordinates import Change
from bayeslr_runners.moe.options import GROUPS
from bayeslr_runners.moe.shapes import MoeShape

BASE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_expert": 48, "n_experts": 4, "top_k": 2}


def changes(exponents: dict[str, float], *, seeds: int = 2, noise: float = 0.0) -> list[Change]:
    """Changes that follow power laws of the width, with ln-normal noise."""
    rng = random.Random(3)
    return [
        Change(MoeShape.from_mapping(shape), seed, group,
               0.5 * shape["d_model"] ** exponent * 2.718 ** rng.gauss(0, noise))
        for shape in sizes(BASE, "width", 8)
        for seed in range(seeds)
        for group, exponent in exponents.items()
    ]  # fmt: skip


def test_width_keeps_the_head_and_the_share_of_the_expert() -> None:
    found = sizes(BASE, "width", 4)
    assert [shape["d_model"] for shape in found] == [32, 64, 128]
    assert [shape["n_heads"] for shape in found] == [2, 4, 8]
    assert [shape["d_expert"] for shape in found] == [48, 96, 192]
    assert {shape["n_layers"] for shape in found} == {2}


@pytest.mark.parametrize(
    ("axis", "grown"),
    [("depth", {"n_layers": 16}), ("experts", {"n_experts": 32, "top_k": 16}),
     ("sparsity", {"n_experts": 32}), ("expert-width", {"d_expert": 384})],
)  # fmt: skip
def test_the_other_axes_grow_what_they_say_alone(axis: str, grown: dict[str, int]) -> None:
    last = sizes(BASE, axis, 8)[-1]
    assert {key: last[key] for key in BASE} == BASE | grown


@pytest.mark.parametrize("factor", [0, 1, 3, 6])
def test_a_factor_that_is_no_power_of_two_is_refused(factor: int) -> None:
    with pytest.raises(SpecError, match=f"power of two from 2 on, got {factor}"):
        sizes(BASE, "width", factor)


def test_slopes_are_recovered_and_judged_on_both_sides() -> None:
    flat = dict.fromkeys(GROUPS, 0.0)
    assert judged(changes(flat), "width", 0.1)["inside"]
    for exponent in (0.2, -0.2):
        found = judged(changes(flat | {"router": exponent}), "width", 0.1)
        assert found["groups"]["router"]["slope"] == pytest.approx(exponent)
        assert [g for g, row in found["groups"].items() if not row["inside"]] == ["router"]
        assert not found["inside"]


def test_the_stream_may_change_less_but_not_more() -> None:
    assert judged(changes({"stream": -0.4}), "width", 0.1)["inside"]
    assert not judged(changes({"stream": 0.2}), "width", 0.1)["inside"]


def test_the_standard_error_is_that_of_the_seeds() -> None:
    """Slope of 4 sizes with noise sd s: s / sqrt(sum of squares) = s / (ln 2 sqrt 5) a seed.

    A standard deviation from 400 seeds is within 15 % of it, but one time in 30 000.
    """
    row = judged(changes({"head": 0.0}, seeds=400, noise=0.1), "width", 0.1)["groups"]["head"]
    assert row["slope_se"] == pytest.approx(0.1 / (0.6931 * 5**0.5) / 20, rel=0.15)
    single = judged(changes({"head": 0.0}, seeds=1), "width", 0.1)["groups"]["head"]
    assert single["slope_se"] is None


def test_the_table_and_the_plot_show_every_group(tmp_path: Path) -> None:
    document = judged(changes(dict.fromkeys((*GROUPS, "stream"), 0.3)), "width", 0.1)
    document |= {"parametrization": "sp", "source": "s", "steps": 10, "lr": 1e-3, "seeds": 2}
    text = "\n".join(lines(document))
    assert text.count("OUTSIDE") == len(GROUPS) + 1
    assert "+0.300" in text
    assert "d_model 32, 64, 128, 256" in text
    plot(document, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 5000


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main([
        "--parametrization=mup", "--axis=width", "--factor=2", "--seeds=1", f"--out={tmp_path}",
        "--base", json.dumps(BASE), "--options", '{"device": "cuda"}',
    ])  # fmt: skip
    assert status == SpecError.exit_code
    assert "sees no CUDA device" in capsys.readouterr().err
