from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bayeslr.errors import SpecError
from bayeslr.specs import (
    LrGrid,
    RunSpec,
    Space,
    Target,
    load_recipe,
    parse_recipe,
    recipe_document,
)
from tests.fakes import changed

TARGET: dict[str, Any] = {
    "target_id": "big",
    "n_active": 1.3e9,
    "n_total": 12e9,
    "tokens": 5e11,
    "batch_tokens": 4e6,
}

RUN: dict[str, Any] = {
    "run_id": "r1",
    "family": "f",
    "runner": "moe",
    "lr": 3e-3,
    "tokens": 100_000,
    "batch_tokens": 4096,
    "n_active": 10_000,
    "n_total": 20_000,
    "seq_len": 128,
}

RECIPE: dict[str, Any] = {
    "sweep": {"name": "s", "runner": "moe", "family": "f", "budget_flops": "1e14"},
    "space": {
        "lr": {"low": 1e-3, "high": 8e-3, "per_octave": 2},
        "tokens": ["100K", 200_000],
        "batch_tokens": ["4096"],
        "shapes": [{"name": "xs", "d_model": 32}, {"name": "s", "d_model": 64}],
    },
    "targets": [{"target_id": "t", "shape": {"d_model": 128}}],
    "run": {"seq_len": 128, "weight_decay": 0.1},
    "options": {"eval_tokens": 1000},
}


def recipe(**changes: Any) -> dict[str, Any]:
    """RECIPE with ``table__key=value`` changes; a value of None takes the key away."""
    return changed(RECIPE, changes)


def test_target_counts_its_flops() -> None:
    assert Target(**TARGET).flops == pytest.approx(6 * 1.3e9 * 5e11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_active": 0}, "n_active must be finite and > 0, got 0"),
        ({"tokens": float("nan")}, "tokens must be finite"),
        ({"n_active": 13e9}, "must not exceed n_total"),
        ({"batch_tokens": 1e12}, "must not exceed tokens"),
        ({"param_convention": "all"}, "param_convention must be one of non_embedding, total"),
    ],
)
def test_target_names_the_broken_rule(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Target(**{**TARGET, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_id": ""}, "target_id must be a text that is not empty, got ''"),
        ({"target_id": 3}, "target_id must be a text that is not empty, got 3"),
        ({"n_active": "1.3B"}, "n_active must be a number, as in 1.3e9, got '1.3B'"),
        ({"n_active": True}, "n_active must be a number, as in 1.3e9, got True"),
        ({"tokens": None}, "tokens must be a number, as in 1.3e9, got None"),
        ({"seq_len": "2k"}, "seq_len must be a number"),
        ({"n_experts": 0}, "n_experts must be finite and > 0, got 0"),
        ({"top_k": -1}, "top_k must be finite and > 0, got -1"),
        ({"top_k": True}, "top_k must be a number"),
        ({"n_experts": 7.5}, "target big: n_experts must be a whole number, got 7.5"),
        ({"n_experts": 8, "top_k": 9}, r"top_k \(9\) must not exceed n_experts \(8\)"),
    ],
)
def test_target_refuses_what_is_no_count(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Target(**{**TARGET, **change})


def test_target_takes_numbers_of_numpy() -> None:
    assert Target(**{**TARGET, "n_active": np.float64(1e9), "top_k": np.int64(2)}).top_k == 2


def test_specs_are_frozen_and_keyword_only() -> None:
    target = Target(**TARGET)
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.tokens = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Target("big", 1e9, 1e9, 1e10, 1e6)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1e-3}, "lr must be finite and > 0"),
        ({"lr": 11}, "the peak LR itself"),
        ({"batch_tokens": 200_000}, "exceeds tokens"),
        ({"schedule": "step"}, "schedule must be one of wsd, cosine"),
        ({"weight_decay_kind": "both"}, "weight_decay_kind must be one of"),
        ({"decay_fraction": 0}, "decay_fraction must be in"),
        ({"warmup_tokens": 100_000}, "warmup_tokens must be in"),
        ({"decay_at": (200_000,)}, "decay_at must lie in"),
        ({"decay_at": (-5,)}, "decay_at must lie in"),
        ({"continues_at": 8192}, r"continues_at \(8192\) goes with continues"),
        ({"continues": "r0"}, r"continues_at must lie in \(0, 80000\], .* got 0"),
        ({"continues": "r0", "continues_at": 81_920}, r"must lie in \(0, 80000\], .* got 81920"),
        ({"continues": "r0", "continues_at": 40_960, "decay_at": (50_000,)}, r"in \(0, 40000\]"),
        ({"continues": "r0", "continues_at": "8k"}, "continues_at must be a number"),
        ({"continues": "r1", "continues_at": 8192}, "the run_id of another run, got 'r1'"),
        ({"continues": 3, "continues_at": 8192}, "the run_id of another run, got 3"),
        ({"continues": "r0", "continues_at": 8192, "schedule": "cosine"}, "only a 'wsd' run"),
    ],
)
def test_run_spec_names_the_broken_rule(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        RunSpec(**{**RUN, **change})


def test_decay_branches_are_sorted_and_end_at_the_horizon() -> None:
    spec = RunSpec(**RUN, decay_at=(50_000, 25_000, 50_000))
    assert spec.decay_at == (25_000, 50_000, 100_000)
    assert RunSpec(**RUN).decay_at == (100_000,)


def test_run_spec_survives_json() -> None:
    spec = RunSpec(**RUN, decay_at=(50_000,), shape={"d_model": 32}, options={"a": [1, 2]})
    text = spec.to_json()
    assert "\n" not in text
    assert RunSpec.from_json(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "run spec is not valid JSON"),
        ("[]", r"run spec must be a JSON object, got \[\]"),
        ("{}", "run spec: key 'run_id' is missing"),
    ],
)
def test_run_spec_of_broken_json(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        RunSpec.from_json(text)


def test_a_run_that_goes_on_says_so_and_any_other_does_not_speak_of_it() -> None:
    whole = RunSpec(**RUN)
    assert "continues" not in whole.to_json()
    rest = dataclasses.replace(whole, continues="r0", continues_at=40_960)
    assert json.loads(rest.to_json())["continues"] == "r0"
    assert RunSpec.from_json(rest.to_json()) == rest
    # It trains, and pays for, what comes after.
    assert rest.trained_tokens == whole.trained_tokens - 40_960
    assert whole.share_at(70_480) == pytest.approx(0.7048)
    assert [rest.share_at(tokens) for tokens in (0, 40_960, 70_480, 100_000)] == [0, 0, 0.5, 1]


def test_run_spec_rejects_an_unknown_key() -> None:
    raw = {**json.loads(RunSpec(**RUN).to_json()), "learning_rate": 1}
    with pytest.raises(SpecError, match="unknown key 'learning_rate'; allowed keys are"):
        RunSpec.from_json(json.dumps(raw))


def test_lr_grid_steps_in_octaves() -> None:
    values = LrGrid(low=1e-3, high=8e-3, per_octave=2).values()
    assert len(values) == 7
    assert values[0] == pytest.approx(1e-3)
    assert values[-1] == pytest.approx(8e-3)
    assert values[2] == pytest.approx(2e-3)
    with pytest.raises(SpecError, match=r"lr\.low \(0\.1\) must be below"):
        LrGrid(low=0.1, high=0.1)


def test_shapes_need_unique_names() -> None:
    grid = LrGrid(low=1e-3, high=2e-3)
    with pytest.raises(SpecError, match="unique name"):
        Space(lr=grid, tokens=(1,), batch_tokens=(1,), shapes=({"name": "a"}, {"name": "a"}))
    with pytest.raises(SpecError, match=r"space\.tokens must not be empty"):
        Space(lr=grid, tokens=(), batch_tokens=(1,), shapes=({"name": "a"},))


def test_recipe_reads_suffixes() -> None:
    parsed = parse_recipe(RECIPE)
    assert parsed.budget_flops == 1e14
    assert parsed.space.tokens == (100_000, 200_000)
    assert parsed.space.batch_tokens == (4096,)
    assert parsed.run["seq_len"] == 128


def test_recipe_document_is_the_inverse_of_parse() -> None:
    parsed = parse_recipe(RECIPE)
    document = json.loads(json.dumps(recipe_document(parsed)))
    assert parse_recipe(document) == parsed


def in_hours(hours: Any = 20, rate: Any = 4e14, **changes: Any) -> dict[str, Any]:
    changes |= {"sweep__budget_gpu_hours": hours, "sweep__flops_per_second": rate}
    return recipe(**{"sweep__budget_flops": None, **changes})


def test_a_budget_in_gpu_hours_is_one_in_flops() -> None:
    parsed = parse_recipe(in_hours("20", "4e14"))
    assert (parsed.budget_flops, parsed.flops_per_second) == (2.88e19, 4e14)


@given(st.floats(1e-6, 1e9), st.floats(1e3, 1e22))
def test_hours_are_read_back_as_written(hours: float, rate: float) -> None:
    parsed = parse_recipe(in_hours(hours, rate))
    document = json.loads(json.dumps(recipe_document(parsed)))
    assert document["sweep"]["budget_gpu_hours"] == pytest.approx(hours, rel=1e-11)
    again = parse_recipe(document)
    assert again.budget_flops == pytest.approx(parsed.budget_flops, rel=1e-11)
    assert json.loads(json.dumps(recipe_document(again))) == document


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_flops": 1e14, "budget_gpu_hours": 1, "flops_per_second": 1},
         "got budget_flops and budget_gpu_hours and flops_per_second"),
        ({"budget_flops": 1e14, "budget_gpu_hours": 1}, "got budget_flops and budget_gpu_hours"),
        ({"budget_flops": 1e14, "flops_per_second": 1}, "got budget_flops and flops_per_second"),
        ({"budget_gpu_hours": 1}, "together with flops_per_second.*got budget_gpu_hours"),
        ({"flops_per_second": 1e14}, "got flops_per_second"),
        ({}, "got none of them"),
        ({"budget_gpu_hours": 0, "flops_per_second": 1}, "budget_gpu_hours must be finite and > 0"),
        ({"budget_gpu_hours": math.nan, "flops_per_second": 1}, "budget_gpu_hours must be finite"),
        ({"budget_gpu_hours": 1, "flops_per_second": 0}, "flops_per_second must be finite and > 0"),
        ({"budget_gpu_hours": 1, "flops_per_second": "fast"}, "flops_per_second must be a number"),
    ],
)  # fmt: skip
def test_one_budget_is_given_and_whole(change: dict[str, Any], message: str) -> None:
    document = recipe(sweep__budget_flops=None)
    document["sweep"] |= change
    with pytest.raises(SpecError, match=rf"recipe, \[sweep\]: .*{message}"):
        parse_recipe(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sweep__budget": 1}, r"recipe, \[sweep\]: unknown key 'budget'; allowed keys are"),
        ({"space__sizes": []}, r"recipe, \[space\]: unknown key 'sizes'"),
        ({"space__lr__step": 2}, r"recipe, \[space\.lr\]: unknown key 'step'"),
        ({"run__lr": 1e-3}, r"\[run\]: unknown key 'lr'"),
        ({"extra": {}}, "recipe: unknown key 'extra'"),
        ({"space": None}, r"recipe: \[space\] is missing"),
        ({"targets": []}, r"at least one \[\[targets\]\]"),
        ({"sweep__family": None}, "family"),
        ({"space__tokens": None}, "'tokens' is missing"),
        ({"space__shapes": []}, r"space\.shapes must not be empty"),
        ({"sweep__budget_flops": "lots"}, "budget_flops must be a number"),
        ({"sweep__budget_flops": -1}, "budget_flops must be finite and > 0"),
        ({"sweep__start_runs": 2.5}, "start_runs must be a whole number, as in 4, got 2.5"),
        ({"sweep__workers": 1.5}, "workers must be a whole number"),
        ({"sweep__seed": -1}, "seed must be >= 0, got -1"),
        ({"sweep__early_ends": "no"}, "early_ends must be true or false, without quotes, got 'no'"),
        ({"run__seed": "x"}, r"\[run\]: seed must be a whole number, got 'x'"),
    ],
)
def test_recipe_names_the_broken_rule(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_recipe(recipe(**change))


def test_recipe_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nowhere\.toml does not exist"):
        load_recipe(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[sweep\n")
    with pytest.raises(SpecError, match=r"broken\.toml is not valid TOML"):
        load_recipe(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match=r"broken\.toml is not valid TOML"):
        load_recipe(broken)


def test_every_shipped_recipe_parses(root: Path) -> None:
    recipes = sorted((root / "runners" / "recipes").glob("*.toml"))
    recipes = [path for path in recipes if path.name != "compare.toml"]  # not a sweep's
    assert recipes, "no recipe ships with the runners"
    for path in recipes:
        assert load_recipe(path).name
