"""A comparison from its recipe to its report, in a toy world with a known answer."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from typer.testing import CliRunner, Result

from bayeslr.cli import app
from bayeslr.compare import Comparison, compare, describe
from bayeslr.compare.choosing import _trainable
from bayeslr.compare.heldout import MERGE_OCTAVES, _diagnostics, places
from bayeslr.compare.proxies import grid_runs
from bayeslr.compare.recipe import load_compare_recipe, parse_compare_recipe
from bayeslr.errors import BayeslrError, DataError, SpecError, UntrustworthyFit
from bayeslr.loop import to_toml
from bayeslr.runner_protocol import Trial
from bayeslr.runs import read_runs
from bayeslr.specs import Recipe, RunSpec
from bayeslr_runners.command import CommandRunner
from tests import compare_toy, fakes
from tests.compare_toy import toy_comparison
from tests.test_compare_scores import made_up_arms, recipe_document


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for (module, name), stand_in in compare_toy.stand_ins().items():
        monkeypatch.setattr(importlib.import_module(module), name, stand_in)


def write_recipe(path: Path, document: dict[str, Any]) -> Path:
    """Nested tables are written inline."""
    text = {k: v if isinstance(v, list) else dict(v) for k, v in document.items() if k != "targets"}
    path.write_text(to_toml({**text, "targets": document["targets"]}), encoding="utf-8")
    return path


def compared(out: Path, **changes: Any) -> Comparison:
    return compare(parse_compare_recipe(toy_comparison(**changes)), out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """One comparison for several tests; nothing in it is replaced but inference."""
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), stand_in in compare_toy.stand_ins().items():
            patch.setattr(importlib.import_module(module), name, stand_in)
        return compared(tmp_path_factory.mktemp("compare") / "out")


def test_every_arm_is_within_the_same_budget(finished: Comparison) -> None:
    names = [arm.name for arm in finished.arms]
    assert names == [
        "fitting", "fitting, two-stage", "transfer", "transfer, modules", "transfer, posterior"
    ]  # fmt: skip
    for arm in finished.arms:
        assert 0.5 < arm.proxy_flops / finished.recipe.proxy_flops <= 1.0 + 1e-9, arm.name


def test_held_out_models_were_trained_at_and_around_the_choices(finished: Comparison) -> None:
    for arm in ("fitting", "transfer", "transfer, modules"):
        chosen = next(c for c in finished.cells if arm in c.chosen_by)
        lrs = [c.lr for c in finished.cells if c.variant == chosen.variant]
        for multiple in (0.5, 2.0):
            assert any(abs(lr / chosen.lr / multiple - 1) < 0.08 for lr in lrs), (arm, multiple)
    for cell in finished.cells:
        assert len(cell.losses) == finished.recipe.num_seeds
        assert cell.complete


def test_no_arm_is_judged_on_seeds_that_it_was_tuned_on(finished: Comparison) -> None:
    frame = finished.runs.frame
    is_held_out = frame["run_id"].str.contains("held-out")
    seeds, proxies = set(frame["seed"][is_held_out]), set(frame["seed"][~is_held_out])
    assert len(seeds) == finished.recipe.num_seeds
    assert len(proxies) > 1
    assert not seeds & proxies


def test_each_paradigm_trains_under_its_own_rules(finished: Comparison) -> None:
    frame = finished.runs.frame
    held_out = frame[frame["run_id"].str.contains("held-out")]
    kinds = set(zip(held_out["family"], held_out["parametrization"], strict=True))
    assert {kind for _, kind in kinds} == {"sp", "mup"}
    assert ("toy mup, embedding x2 head x0.5", "mup") in kinds


def test_modules_find_the_multipliers_of_the_world(finished: Comparison) -> None:
    arm = next(a for a in finished.arms if a.name == "transfer, modules")
    assert arm.multipliers == compare_toy.BEST_MULTIPLIERS
    found = finished.differences["transfer, modules"]
    assert found is not None
    # Two groups, each a factor of 2 off without them; the LR is the same but for its own noise.
    assert found.by_valley.value == pytest.approx(-2 * 0.05 * 0.48, abs=0.01)


def test_files_of_a_comparison(finished: Comparison) -> None:
    out = finished.out
    for name in ("compare.json", "report.html", "runs.parquet", "choices.json", "resolved.json",
                 "fitting/fit", "fitting/fit-two-stage", "transfer/fit", "transfer/fit-transfer",
                 "transfer/fit-moe-default"):  # fmt: skip
        assert (out / name).exists(), name
    document = json.loads((out / "compare.json").read_text())
    assert document["sentence"] == finished.verdict.sentence
    table = read_runs(out / "runs.parquet")
    assert set(table.frame["run_id"]) == set(finished.runs.frame["run_id"])
    assert len(table.quarantine) == 0


def test_a_second_start_trains_nothing_and_says_the_same(
    finished: Comparison, stand_ins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr("bayeslr.loop.worker.start", forbidden)
    again = compare(finished.recipe, finished.out)
    assert again.document() == finished.document()


def test_more_seeds_may_be_asked_for_and_nothing_else(tmp_path: Path, stand_ins: None) -> None:
    small = {"transfer__modules": None, "transfer__rungs": None, "compare__proxy_flops": 1.2e12}
    first = compared(tmp_path, compare__num_seeds=1, **small)
    assert first.verdict.winner is None
    assert "one seed has no interval" in first.verdict.sentence
    more = compared(tmp_path, compare__num_seeds=2, **small)
    assert [len(c.losses) for c in more.cells] == [2] * len(first.cells)
    assert [c.losses[0] for c in more.cells] == [c.losses[0] for c in first.cells]
    # Seeds at the choices alone: what the valley has cost already leaves their budget untouched.
    at_choices = compared(tmp_path, compare__num_seeds=4, compare__multiples=[1], **small)
    assert all(cell.complete and len(cell.losses) == 4 for cell in at_choices.cells)
    assert len(at_choices.cells) < len(more.cells)
    with pytest.raises(SpecError, match=r"compare\.seed differ; only workers, num_seeds"):
        compared(tmp_path, compare__seed=7, **small)


def test_a_trainer_that_never_works_is_named(tmp_path: Path, stand_ins: None) -> None:
    with pytest.raises(DataError, match=r"the last 3 runs came to nothing.*exit status 1"):
        compared(tmp_path, options__argv=["{python}", "-c", "raise SystemExit(1)"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare__proxy_flops": 1e9}, r"budget of 1B FLOPs|proxy_flops"),
        ({"compare__num_seeds": 0}, "num_seeds must be >= 1"),
        ({"compare__multiples": [0.5, 2]}, "hold 1, the chosen LR"),
        ({"compare__colour": 1}, r"\[compare\]: unknown key 'colour'"),
        ({"transfer__tokens": None}, "key 'tokens' is missing"),
        ({"transfer__modules": {"groups": ["head", "head"]}}, "different module groups"),
        ({"transfer__modules": {"groups": ["head"], "factors": [1]}}, "not 1"),
        ({"transfer__modules": {"groups": ["heads"]}}, "list of embedding, .*, got 'heads'"),
        ({"transfer__modules": {"groups": "head"}}, "list of embedding, .*, got 'h'"),
        ({"transfer__lr": {"low": 1e-3, "hi": 1e-2}}, r"\[transfer.lr\]: unknown key 'hi'"),
        ({"options__lr_multipliers": {"head": 2}}, "which searches them"),
        ({"targets": [{"target_id": "x", "tokens": 1e6, "batch_tokens": 4096}]}, "needs a shape"),
        ({"fitting": None}, r"\[fitting\] is missing"),
        ({"fitting__parametrization": "mup"}, "both under 'mup', but base_shape is None and"),
        (
            {
                "fitting__parametrization": "mup",
                "fitting__options": {"base_shape": {"n_active": 100_000, "n_total": 200_000}},
            },
            r"base_tokens is None and 400000.*set base_tokens in \[fitting.options\]",
        ),
    ],
)
def test_mistakes_in_a_recipe_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        describe(parse_compare_recipe(toy_comparison(**changes)))


def test_diagnostics_that_fade_with_the_lr_are_of_the_trunk() -> None:
    spec = RunSpec(
        run_id="r", family="f", runner="moe", lr=1e-2, tokens=300, batch_tokens=100, n_active=10,
        n_total=10, seq_len=10,
    )  # fmt: skip
    trunk = {"grad_norm": 1.0, "update_ratio": {"head": 1e-2}, "activation_rms": [1.0, 2.0]}
    end = {"grad_norm": 0.1, "update_ratio": {"head": 1e-6}, "activation_rms": [3.0, None]}
    rows = (
        {"tokens": 300, "status": "ok", "loss": 2.0, "diagnostics": end},
        {"tokens": 200, "status": "partial", "loss": 2.1, "diagnostics": trunk},
    )
    found = _diagnostics(Trial(number=0, spec=spec, state="ok", flops=1.0, records=rows))
    assert found == {"grad_norm": 1.0, "update_ratio.head": 1e-2, "activation_rms.layer 1": 3.0}


def test_near_choices_share_their_runs() -> None:
    """An LR within a tenth of an octave of a trained one is judged by its runs."""
    recipe = parse_compare_recipe(recipe_document())
    arms = {arm.name: arm for arm in made_up_arms()}
    for ratio, num_places in ((1.05, 3), (1.2, 4)):
        near = arms["fitting"].lr("wider") * ratio
        moved = [
            arms["fitting"],
            type(arms["fitting"])(
                name="fitting, two-stage", parametrization="sp", proxy_runs=1, proxy_flops=1.0,
                choices=tuple(
                    type(c)(target_id=c.target_id, lr=near, lr_q05=near, lr_q95=near)
                    for c in arms["fitting"].choices
                ),
            ),
        ]  # fmt: skip
        found = [p for p in places(recipe, moved) if p.target_id == "wider"]
        assert len(found) == num_places
        both = [p for p in found if len(p.chosen_by) == 2]
        assert len(both) == (1 if ratio < 2**MERGE_OCTAVES else 0)


def test_a_baseline_without_an_answer_is_left_out(
    tmp_path: Path, stand_ins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(runs: Any, prior: str = "", *, method: str = "bayes", **more: Any) -> Any:
        if method == "two-stage":
            raise DataError("too few vertices")
        return fakes.fit(runs, prior, **more)

    monkeypatch.setattr("bayeslr.sampling.fit", fit)
    small = {"transfer__modules": None, "transfer__rungs": None, "compare__proxy_flops": 1.2e12}
    result = compared(tmp_path, compare__num_seeds=1, **small)
    assert [arm.name for arm in result.arms] == ["fitting", "transfer"]
    assert result.details["left_out"] == {"fitting, two-stage": "too few vertices"}
    assert "was left out: too few vertices" in (tmp_path / "report.html").read_text()


def test_arms_that_the_budget_does_not_reach_are_named(tmp_path: Path, stand_ins: None) -> None:
    """The grid takes 0.96e12 FLOPs; a run on the base shape 0.24e12."""
    result = compared(tmp_path, compare__num_seeds=1, compare__proxy_flops=1e12)
    assert [arm.name for arm in result.arms] == ["fitting", "fitting, two-stage", "transfer"]
    assert set(result.details["left_out"]) == {"transfer, modules", "transfer, posterior"}
    assert "less than one run of it" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("lr", [1e4, float("nan"), 1e-12])
def test_lrs_that_no_run_can_have_are_left_out(lr: float) -> None:
    recipe = parse_compare_recipe(recipe_document())
    arms = made_up_arms()
    wild = dataclasses.replace(arms[1].choices[0], lr=lr)
    left_out: dict[str, str] = {}
    given = [arms[0], dataclasses.replace(arms[1], choices=(wild,)), arms[2]]
    assert _trainable(given, recipe, left_out) == [arms[0], arms[2]]
    assert "cannot be trained at" in left_out["fitting, two-stage"]
    with pytest.raises(UntrustworthyFit, match="cannot be trained at: fitting"):
        _trainable([dataclasses.replace(arms[0], choices=(wild,))], recipe, left_out)


# ---- the command line


def bayeslr(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_verb_prints_the_sentence_and_a_table(
    finished: Comparison, stand_ins: None, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "toy.toml", toy_comparison())
    done = bayeslr("compare", recipe, "--out", finished.out)
    assert done.exit_code == 0, done.output
    assert finished.verdict.sentence in done.stdout
    assert "transfer, modules" in done.stdout
    assert "\r" not in done.stderr
    as_json = bayeslr("compare", recipe, "--out", finished.out, "--json")
    assert json.loads(as_json.stdout) == json.loads((finished.out / "compare.json").read_text())


def test_dry_run_trains_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "toy.toml", toy_comparison())
    done = bayeslr("compare", recipe, "--out", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "held out: big, N=1M of 2M" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("verb", "recipe", "instead"),
    [("compare", "quickstart", "sweep"), ("sweep", "compare", "compare")],
)
def test_a_recipe_of_the_other_kind_is_pointed_to_its_verb(
    verb: str, recipe: str, instead: str
) -> None:
    done = bayeslr(verb, recipe)
    assert isinstance(done.exception, BayeslrError)
    assert f"bayeslr {instead} " in str(done.exception)


def test_the_shipped_recipe_is_in_order() -> None:
    pytest.importorskip("torch")
    plan = describe(load_compare_recipe("compare"))
    assert len(plan["targets"]) == 2
    # As much for held-out runs as two idle cores train in twenty minutes at 2e10 FLOPs a second.
    assert plan["held_out_flops_at_most"] + 4 * plan["proxy_flops"] < 5e13


# ---- killed and started again


def start(recipe: Path, out: Path, root: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, str(root / "tests" / "compare_toy.py"), "compare", recipe, out]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'runners'}"}
    with (out.parent / "log").open("ab") as log:
        return subprocess.Popen([str(w) for w in words], env=environment, stdout=log, stderr=log)


def kill_when(process: subprocess.Popen[bytes], out: Path, stage: str, num_runs: int) -> None:
    """Kill a comparison once so many runs of a stage have begun."""
    give_up = time.monotonic() + 100
    while len(list((out / stage / "runs").glob("*/records.jsonl"))) < num_runs:
        assert time.monotonic() < give_up
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    "kills",
    [
        [("held-out", 3)],
        pytest.param(
            [("transfer", 2), ("transfer", 9), ("transfer", 14), ("fitting", 3), ("held-out", 7)],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_killed_and_started_again_ends_the_same(
    kills: list[tuple[str, int]], finished: Comparison, tmp_path: Path, root: Path
) -> None:
    recipe = write_recipe(tmp_path / "toy.toml", toy_comparison())
    out = tmp_path / "out"
    for stage, num_runs in kills:
        kill_when(start(recipe, out, root), out, stage, num_runs)
    process = start(recipe, out, root)
    assert process.wait(200) == 0, (tmp_path / "log").read_text()
    expected = json.loads(json.dumps(finished.document()))
    assert json.loads((out / "compare.json").read_text()) == expected


# ---- stacks


STACK = """
import subprocess, sys
script, *folders = sys.argv[1:]
for f in folders:
    words = [script, "train", f + "/spec.json", f + "/records.jsonl", f]
    subprocess.run([sys.executable, *words], check=True)
"""


class Stacker:
    """The toy as a runner that can stack: one child trains the runs of its folders in turn."""

    def __init__(self, options: Mapping[str, Any], program: str = STACK) -> None:
        self.alone = CommandRunner(options)
        self.program = program
        self.trained_alone: list[str] = []

    def counts(self, shape: Mapping[str, Any]) -> tuple[int, int]:
        return self.alone.counts(shape)

    def flops(self, spec: RunSpec) -> float:
        return self.alone.flops(spec)

    def command(self, spec: RunSpec, run_dir: Path) -> list[str]:
        self.trained_alone.append(spec.run_id)
        return self.alone.command(spec, run_dir)

    def stack_key(self, spec: RunSpec) -> str:
        return str(spec.shape["name"])

    def stack_command(self, run_dirs: Sequence[Path]) -> list[str]:
        script = str(Path(compare_toy.__file__))
        return [sys.executable, "-c", self.program, script, *map(str, run_dirs)]


@pytest.mark.parametrize(
    "program", [STACK, pytest.param("raise SystemExit(1)", marks=pytest.mark.slow)]
)
def test_a_comparison_by_stacks_ends_the_same(
    program: str, finished: Comparison, tmp_path: Path, stand_ins: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A stack that breaks leaves its runs to be trained one by one."""
    runners: list[Stacker] = []

    def find_stacker(recipe: Recipe) -> Stacker:
        runners.append(Stacker(recipe.options, program))
        return runners[-1]

    monkeypatch.setattr("bayeslr.compare.find_runner", find_stacker)
    result = compare(finished.recipe, tmp_path / "out")
    assert result.document() == finished.document()
    alone = {run_id for runner in runners for run_id in runner.trained_alone}
    stacked = {due.spec.run_id for due in grid_runs(finished.recipe, runners[0])}
    assert stacked.isdisjoint(alone) == (program == STACK)
