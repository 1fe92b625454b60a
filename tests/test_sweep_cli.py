"""The verbs that train, as a user types them."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("optuna")

from typer.testing import CliRunner, Result

from bayeslr.cli import app, main
from bayeslr.errors import BayeslrError, SpecError, UntrustworthyFit
from tests import fakes
from tests.fakes import toy_recipe, write_recipe


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fakes.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    document = toy_recipe(sweep__max_runs=7, sweep__validate_target=True)
    return write_recipe(tmp_path / "toy.toml", document)


def bayeslr(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_sweep_prints_a_line_a_run_and_its_answer(recipe: Path, tmp_path: Path) -> None:
    done = bayeslr("sweep", recipe, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("% of budget] toy-") == 7 + 3
    assert "big: Train big with a peak LR of" in done.stdout
    assert "recommended" in done.stdout
    assert "It held." in done.stdout
    assert "report.html, runs.parquet, predictions.csv, fit" in done.stdout
    assert "\r" not in done.stderr


def test_status_in_words_and_in_json(recipe: Path, tmp_path: Path) -> None:
    bayeslr("sweep", recipe, "--out", tmp_path / "out")
    words = bayeslr("status", tmp_path / "out")
    assert "sweep toy: stopped" in words.stdout
    assert "runs: 7 ok" in words.stdout
    assert "prediction after 7 runs: big lr" in words.stdout
    assert "the last fit: so so" in words.stdout
    document = json.loads(bayeslr("status", tmp_path / "out", "--json").stdout)
    assert document["runs"] == {"ok": 7}
    assert document["stop"]["kind"] == "max_runs"


def test_a_last_fit_that_fails_its_gate_says_what_can_be_done(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unmixed(*words: Any, **rest: Any) -> Any:
        return dataclasses.replace(fakes.fit(*words, **rest), trustworthy=False)

    monkeypatch.setattr(sys.modules["bayeslr.sampling"], "fit", unmixed)
    out = tmp_path / "out"
    done = bayeslr("sweep", recipe, "--out", out)
    assert isinstance(done.exception, UntrustworthyFit)
    command = f"bayeslr fit {out / 'runs.parquet'} --prior moe-default --draws 4000 -o {out}"
    assert command in done.stderr
    assert "raise budget_flops or max_runs" in done.stderr
    assert command in bayeslr("status", out).stdout


@pytest.mark.parametrize("storage", [None, "sqlite"])
def test_the_study_of_a_sweep_is_imported_as_the_runs_of_the_sweep(
    storage: str | None, tmp_path: Path
) -> None:
    """Diverged runs and curves too; the target's own runs are in a study beside it."""
    changes = {"sweep__max_runs": 7, "sweep__validate_target": True, "space__lr__high": 0.5}
    document = toy_recipe(**changes)
    recipe, out, again = tmp_path / "toy.toml", tmp_path / "out", tmp_path / "again.parquet"
    write_recipe(recipe, document)
    url = storage and f"sqlite:///{tmp_path / 'study.db'}"
    done = bayeslr("sweep", recipe, "--out", out, *(("--storage", url) if url else ()))
    assert done.exit_code == 0, done.output
    done = bayeslr("import", "optuna", url or out, "-o", again)
    assert done.exit_code == 0, done.output
    pd.testing.assert_frame_equal(pd.read_parquet(again), pd.read_parquet(out / "runs.parquet"))
    assert "diverged" in done.stdout
    done = bayeslr("import", "optuna", url or out, "-o", again, "--family", "mine")
    assert set(pd.read_parquet(again)["family"]) == {"mine"}
    done = bayeslr("import", "optuna", url or out / "study.journal", "--set", "n_active=1M")
    assert isinstance(done.exception, SpecError)
    study = ("--study", "toy.validation")
    done = bayeslr("import", "optuna", url or out, *study, "-o", again)
    assert pd.read_parquet(again)["run_id"].nunique() == 3


def test_dry_run_trains_nothing(recipe: Path, tmp_path: Path) -> None:
    done = bayeslr("sweep", recipe, "--out", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0
    assert "budget 6T FLOPs (6e+12)" in done.stdout
    assert "LRs: 13 from 0.001 to 0.064" in done.stdout
    assert done.stdout.count("FLOPs a run") == 4
    assert "target big: N=1000000 of 2000000" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_first_runs_of_the_seed_that_is_given(recipe: Path) -> None:
    own, same, other = (
        bayeslr("sweep", recipe, "--dry-run", *seed).stdout
        for seed in ((), ("--seed", 1), ("--seed", 3))
    )
    assert own == same != other


def test_another_strategy_by_the_same_command_is_a_sweep_of_its_own(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dry = bayeslr("sweep", recipe, "--strategy", "classical", "--dry-run")
    first = [line for line in dry.stdout.splitlines() if line.startswith("  toy-")]
    assert [line.split()[0].rsplit("-", 2)[1] for line in first] == [
        "lr0.001", "lr0.0028284", "lr0.008", "lr0.022627", "lr0.064",
    ]  # fmt: skip
    done = bayeslr("sweep", recipe, "--strategy", "classical")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "toy-classical-out" / "predictions.csv").exists()
    wrong = bayeslr("sweep", recipe, "--strategy", "best")
    assert "strategy must be one of bayes, random, classical" in str(wrong.exception)


def test_a_worker_joins_by_folder(recipe: Path, tmp_path: Path) -> None:
    bayeslr("sweep", recipe, "--out", tmp_path / "out")
    done = bayeslr("worker", "--storage", tmp_path / "out", "--study", "toy")
    assert done.exit_code == 0
    assert "the sweep has stopped: 7 runs" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep", "no-such-recipe"], "recipe no-such-recipe does not exist"),
        (["status", "no-such-folder"], "is that the folder of a sweep"),
        (["status", "sqlite:///no-such.db", "--study", "x"], "is that the database of a sweep"),
        (["worker", "--storage", "no-such", "--study", "x"], "is that the folder of a sweep"),
    ],
)
def test_mistakes_are_errors_of_ours(words: list[str], message: str) -> None:
    done = bayeslr(*words)
    assert isinstance(done.exception, BayeslrError)
    assert message in str(done.exception)
    assert done.exception.exit_code == 2


def test_an_interrupted_command_says_that_what_was_finished_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise SystemExit(130)

    monkeypatch.setattr("bayeslr.cli.app", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main()
    assert "interrupted; what was finished is kept" in capsys.readouterr().err
