"""The verbs fit, predict, plan, report, calibrate: output, files, exit codes, no traceback."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bayeslr import __version__, cli
from bayeslr.acquire import plan as make_plan
from bayeslr.cli.plan import _lines, _write_specs
from bayeslr.posterior import Posterior, load
from bayeslr.predict import prior_posterior
from bayeslr.runner_protocol import find_runner, spec_row
from bayeslr.runs import RunTable, make_table
from bayeslr.space import candidates
from bayeslr.specs import parse_recipe
from tests.fakes import changed, toy_recipe, write_recipe
from tests.model_fixtures import run_record
from tests.test_acquire import space_recipe

FLAGS = ("--n-active", "600M", "--n-total", "4.8B", "--tokens", "48B", "--batch-tokens", "1M")


@pytest.fixture
def bayeslr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``bayeslr(words...)``: exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bayeslr", *(str(word) for word in words)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err + out
        return code, out, err

    return run


@pytest.fixture
def folder(posterior: Posterior, tmp_path: Path) -> Path:
    path = tmp_path / "fit"
    posterior.save(path)
    return path


@pytest.fixture
def runs_csv(table: RunTable, tmp_path: Path) -> Path:
    path = tmp_path / "runs.csv"
    table.write(path)
    return path


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch, posterior: Posterior) -> None:
    """The fit that is at hand stands in for a new one."""
    sampling = importlib.import_module("bayeslr.sampling")
    monkeypatch.setattr(sampling, "fit", lambda *_, **__: posterior)


@pytest.mark.usefixtures("no_sampling")
def test_fit_writes_the_folder_and_sums_it_up(bayeslr: Any, runs_csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    code, text, _ = bayeslr("fit", runs_csv, "-o", out, "--no-check")
    assert code in (0, 4)  # The shared fit has few draws.
    assert "40 runs (" in text
    assert "in 8 slices of made-up" in text
    assert "lr_tokens" in text
    assert f"Fit written to {out}" in text
    assert load(out).info["num_runs"] == 40


def test_an_untrustworthy_fit_is_written_and_ends_with_4(
    bayeslr: Any, runs_csv: Path, tmp_path: Path, posterior: Posterior,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    info = {**posterior.info, "trustworthy": False, "verdict": "Do not trust this fit: chains."}
    doubtful = dataclasses.replace(posterior, info=info)
    sampling = importlib.import_module("bayeslr.sampling")
    monkeypatch.setattr(sampling, "fit", lambda *_, **__: doubtful)
    code, _, err = bayeslr("fit", runs_csv, "-o", tmp_path / "new", "--no-check")
    assert code == 4
    assert "Do not trust this fit" in err
    code, out, err = bayeslr("predict", tmp_path / "new", *FLAGS)
    assert code == 0
    assert "Train 600M active" in out
    assert "Warning: Do not trust this fit" in err


def test_two_stage_end_to_end(bayeslr: Any, runs_csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    code, text, _ = bayeslr("fit", runs_csv, "-o", out, "--method", "two-stage", "--no-check")
    assert code == 0
    assert "Least squares, R^2" in text
    assert "log_sparsity     not estimated" in text
    code, text, _ = bayeslr("predict", out, *FLAGS)
    assert code == 0
    assert "peak LR of" in text


def test_fit_json_parses(bayeslr: Any, runs_csv: Path, tmp_path: Path) -> None:
    code, text, _ = bayeslr(
        "fit", runs_csv, "-o", tmp_path / "j", "--method", "two-stage", "--json", "--no-check"
    )
    assert code == 0
    assert json.loads(text)["num_runs"] == 40


def test_rows_set_aside_are_told(bayeslr: Any, table: RunTable, tmp_path: Path) -> None:
    frame = table.frame.copy()
    frame.loc[0, "lr"] = -1.0
    frame.to_csv(tmp_path / "r.csv", index=False)
    code, _, err = bayeslr(
        "fit", tmp_path / "r.csv", "-o", tmp_path / "f", "--method", "two-stage", "--no-check"
    )
    assert code == 0
    assert "1 row set aside (bayeslr check lists them):\n" in err
    assert "lr must be finite and > 0, got '-1.0'" in err


def test_what_an_import_set_aside_is_counted_and_a_taken_place_costs_no_fit(
    bayeslr: Any, table: RunTable, tmp_path: Path
) -> None:
    runs = tmp_path / "r.parquet"
    table.write(runs)
    aside = "file,line,column,value,rule,advice\nx.csv,3,lr,-7,lr must be > 0,mend it\n"
    (tmp_path / "r.parquet.quarantine.csv").write_text(aside)
    code, _, err = bayeslr("fit", runs, "-o", tmp_path / "f", "--method", "two-stage", "--no-check")
    assert code == 0
    assert "1 row set aside" in err
    assert json.loads((tmp_path / "f" / "fit.json").read_text())["num_quarantined"] == 1
    code, out, err = bayeslr("fit", tmp_path / "no.csv", "-o", runs)
    assert (code, out) == (2, "")
    assert "exists and is no fit folder" in err


def test_all_diverged_ends_with_3(bayeslr: Any, tmp_path: Path) -> None:
    rows = [run_record(f"r{i}", 1e8, 2e9, 1e5, 10 ** (-2 + i / 4), None) for i in range(4)]
    pd.DataFrame(rows).to_csv(tmp_path / "r.csv", index=False)
    code, _, err = bayeslr("fit", tmp_path / "r.csv", "-o", tmp_path / "f")
    assert code == 3
    assert "all 4 runs diverged" in err
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("fit", "nowhere.csv"), 3, "nowhere.csv"),
        (("predict",), 2, "either a fit folder or --prior"),
        (("predict", "no-fit", *FLAGS), 2, "is no fit folder"),
        (("predict", "--prior", "nope", *FLAGS), 2, "the shipped cards are"),
        (("predict", "--prior", "weak", "--tokens", "1B"), 2, "--n-active is missing"),
        (("predict", "--prior", "weak", *FLAGS, "--targets", "t.csv"), 2, "not both"),
        (("predict", "--prior", "weak", "--targets", "t.csv"), 3, "does not exist"),
        (("predict", "--prior", "weak", "--n-active", "big", "--tokens", "1B", "--batch-tokens",
          "1M"), 2, "--n-active must be a number such as 1.3B"),
        (("predict", "--prior", "weak", "--n-active", "2B", "--n-total", "1B", "--tokens", "1B",
          "--batch-tokens", "1M"), 2, "must not exceed n_total"),
        (("predict", "--prior", "weak", "--n-active", "1.3", "--tokens", "500", "--batch-tokens",
          "4"), 2, "did you mean millions or billions? Give 1.3B, not 1.3"),
        (("predict", "--prior", "weak", *FLAGS, "-o", "out.xlsx"), 2, "must end in .csv"),
        (("plan", "no-fit", "--space", "r.toml", "--budget", "1e18"), 2, "is no fit folder"),
        (("report", "no-fit"), 2, "is no fit folder"),
        (("priors", "show", "nope"), 2, "the shipped cards are"),
        (("calibrate", "--prior", "nope"), 2, "the shipped cards are"),
        (("sweep", ".", "--dry-run"), 2, "recipe . is a folder; name the .toml file in it"),
        (("compare", "folder.toml", "--dry-run"), 2, "recipe folder.toml is a folder"),
        (("priors", "check", "folder.toml"), 2, "prior card folder.toml is a folder"),
        (("priors", "check", "none.toml"), 2, "prior card none.toml does not exist"),
        (("replay", "r.csv", "--targets", "t.csv", "--truth", "t.csv", "--plot", "folder.svg"), 2,
         "folder.svg is a folder"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, tuple) else None,
)  # fmt: skip
def test_mistakes_end_in_one_message(
    bayeslr: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...],
    code: int, told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("folder.toml", "folder.svg"):
        (tmp_path / name).mkdir()
    found, _, err = bayeslr(*words)
    assert (found, told in err) == (code, True), err


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        (PermissionError(13, "Permission denied", "runs.csv"), "cannot use runs.csv: Permission"),
        (OSError(28, "No space left on device"), "refused: [Errno 28] No space left"),
    ],
)
def test_what_the_system_refuses_is_told_without_a_traceback(
    bayeslr: Any, monkeypatch: pytest.MonkeyPatch, refusal: OSError, told: str
) -> None:
    def refuse(*_: object) -> None:
        raise refusal

    monkeypatch.setattr("bayeslr.runs.read_runs", refuse)
    code, _, err = bayeslr("check", "runs.csv")
    assert (code, told in err) == (2, True), err


def test_predict_echoes_the_target_in_full_and_answers_in_a_sentence(
    bayeslr: Any, folder: Path
) -> None:
    code, out, _ = bayeslr("predict", folder, *FLAGS)
    assert code == 0
    assert "600,000,000 active of 4,800,000,000 non-embedding parameters" in out
    assert "48,000,000,000 tokens, batch 1,000,000 tokens" in out
    assert "90 % probability" in out


def stand_in_predictions(monkeypatch: pytest.MonkeyPatch, **changes: float) -> None:
    """``bayeslr.predict.predict`` answers as it does, but for these columns."""
    module = importlib.import_module("bayeslr.predict")
    real = module.predict
    monkeypatch.setattr(module, "predict", lambda *given: real(*given).assign(**changes))


def test_json_keeps_small_numbers_and_has_null_for_what_is_no_number(
    bayeslr: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = {"lr_q05": 1.2345678901234567e-13, "p_diverge": math.nan, "extrapolation": math.inf}
    stand_in_predictions(monkeypatch, **strange)
    out = tmp_path / "preds.jsonl"
    code, text, _ = bayeslr("predict", "--prior", "weak", *FLAGS, "--json", "-o", out)
    assert code == 0
    (row,) = json.loads(text, parse_constant=pytest.fail)
    assert row["lr_q05"] == strange["lr_q05"]
    assert row["p_diverge"] is row["extrapolation"] is None
    assert json.loads(out.read_text(), parse_constant=pytest.fail) == row


def test_what_the_fit_does_not_know_is_printed_as_unknown(
    bayeslr: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_predictions(monkeypatch, p_diverge=math.nan, extra_tokens=100.0)
    targets = tmp_path / "targets.csv"
    targets.write_text(
        "target_id,n_active,n_total,tokens,batch_tokens\na,6e8,4.8e9,48e9,1e6\nb,6e8,6e8,9e9,1e6\n"
    )
    code, text, _ = bayeslr("predict", "--prior", "weak", "--targets", targets)
    assert code == 0
    for line in text.splitlines()[1:]:
        assert line.split()[-4:-1] == ["10,000", "%", "unknown"]
        assert "over 10,000 %" in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("predict", "--prior", "weak", "--targets", "t.csv", "--family", "f"), "family included"),
        (("plan", "fit", "--space", "r.toml", "--budget", "1e18", "--runs", "0"), "--runs"),
        (("plan", "fit", "--space", "r.toml", "--budget", "1e18", "--runs", "-3"), "--runs"),
        (("sweep", "r.toml", "--json"), "--json goes with --dry-run"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(
    bayeslr: Any, words: tuple[str, ...], told: str
) -> None:
    code, _, err = bayeslr(*words)
    assert (code, told in err) == (2, True), err


def test_the_version(bayeslr: Any) -> None:
    code, text, _ = bayeslr("--version")
    assert (code, text) == (0, f"bayeslr {__version__}\n")


def test_predict_from_a_card_alone(bayeslr: Any) -> None:
    code, out, _ = bayeslr(
        "predict", "--prior", "moe-default", "--n-active", "1.3B", "--n-total", "12B", "--tokens",
        "500B", "--batch-tokens", "4M", "--json",
    )  # fmt: skip
    (row,) = json.loads(out)
    assert code == 0
    assert 4.55e-4 < row["lr_q50"] < 7.47e-4
    assert row["lr_q95"] / row["lr_q05"] <= 8


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_predict_a_table_of_targets(
    bayeslr: Any, folder: Path, tmp_path: Path, suffix: str
) -> None:
    targets, out = tmp_path / "targets.csv", tmp_path / f"preds.{suffix}"
    targets.write_text(
        "target_id,n_active,n_total,tokens,batch_tokens,family\n"
        "a,6e8,4.8e9,48e9,1e6,made-up\nb,6e8,4.8e9,96e9,1e6,unseen\n"
    )
    code, text, _ = bayeslr("predict", folder, "--targets", targets, "-o", out)
    assert code == 0
    assert text.splitlines()[0].split()[0] == "target"
    reader: Any = {"csv": pd.read_csv, "parquet": pd.read_parquet}.get(
        suffix, lambda path: pd.read_json(path, lines=True)
    )
    table = reader(out)
    assert table["target_id"].tolist() == ["a", "b"]
    assert table["level"].tolist() == ["family", "population"]
    code, text, _ = bayeslr("predict", folder, "--targets", targets, "--json")
    assert [row["target_id"] for row in json.loads(text)] == ["a", "b"]


def test_a_damaged_fit_ends_with_2_and_advice(bayeslr: Any, folder: Path) -> None:
    (folder / "posterior.nc").write_bytes(b"nothing")
    code, _, err = bayeslr("predict", folder, *FLAGS)
    assert code == 2
    assert "fit again" in err


def test_plan_says_which_runs_go_on_from_others(tmp_path: Path) -> None:
    """Where the trainer can, and the records of a shorter run say that its trunk was kept."""
    shape = {"name": "tiny", "d_model": 32, "n_layers": 2, "n_heads": 1, "d_expert": 32,
             "n_experts": 8, "top_k": 2}  # fmt: skip
    document = toy_recipe(
        sweep__runner="moe", space__tokens=[204_800, 819_200], space__shapes=[shape], options={},
        space__lr={"low": 1e-3, "high": 1.6e-2, "per_octave": 1},
        targets=[{"n_active": 6e9, "n_total": 4.8e10, "tokens": 1.2e12, "batch_tokens": 4_194_304}],
    )  # fmt: skip
    recipe = parse_recipe(document)
    short = [p.spec for p in candidates(recipe, find_runner(recipe)) if p.spec.tokens == 204_800]
    rows = [{**spec_row(s), "loss": 3.0, "status": "ok", "trunk_tokens": 163_840} for s in short]
    # What these runs tell, a hundredth of the regret, is not told from chance by a few hundred.
    alone = prior_posterior("moe-default", num_draws=2000)
    found = make_plan(dataclasses.replace(alone, runs=make_table(rows)), recipe, budget_flops=1e15)
    on = [(i, p) for i, p in enumerate(found.proposals, start=1) if p.spec.continues]
    assert on
    text = _lines(found, [])
    for number, proposal in on:
        spec = proposal.spec
        assert (spec.decay_at, spec.continues_at) == ((819_200,), 163_840)
        assert f"goes on from {spec.continues} at 163.8K tokens" in proposal.reason
        told = f"{number:>4}  goes on from {spec.continues} at 163.8K tokens"
        assert any(line.startswith(told) for line in text)
    _write_specs(tmp_path / "next.jsonl", found)
    ready = [json.loads(line) for line in (tmp_path / "next.jsonl").read_text().splitlines()]
    assert [s.get("continues") for s in ready] == [p.spec.continues for p in found.proposals]


def test_plan_prints_costs_and_writes_specs(bayeslr: Any, folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.toml", space_recipe())
    out = tmp_path / "next.jsonl"
    words = ("plan", folder, "--space", recipe, "--budget", "1e20", "--runs", "2")
    code, text, _ = bayeslr(*words, "-o", out)
    assert code == 0
    assert text.startswith("Budget: 100,000,000,000,000,000,000 FLOPs\n")
    assert "their mean regret, were valleys plain parabolas, falls from" in text
    assert "If nothing more is run:\n  big: peak LR" in text
    assert "more runs" in text
    assert "FLOPs at the targets" in text
    assert "Then stop: 2 runs were asked for" in text
    lines = out.read_text().splitlines()
    code, text, _ = bayeslr(*words, "--json")
    document = json.loads(text)
    assert code == 0
    assert len(document["proposals"]) == len(lines)
    assert document["stop_reason"]
    assert document["budget_flops"] == 1e20
    assert document["predictions"][0]["target_id"] == "big"
    code, _, _ = bayeslr(*words, "-o", tmp_path / "next")
    assert code == 0
    assert {path.read_text() for path in (tmp_path / "next").iterdir()} == {f"{x}\n" for x in lines}
    code, _, err = bayeslr(*words, "-o", tmp_path / "next.csv")
    assert code == 2
    assert "must end in .jsonl" in err
    (tmp_path / "folder.jsonl").mkdir()
    for place, told in (("folder.jsonl", "it is a folder"), ("next.jsonl/x", "name another place")):
        code, _, err = bayeslr(*words, "-o", tmp_path / place)
        assert (code, told in err) == (2, True), err
    code, text, _ = bayeslr("plan", folder, "--space", recipe, "--budget", "1e9")
    assert "No run is proposed: no run fits" in text


def test_a_plan_for_a_family_that_was_not_fitted_says_so(
    bayeslr: Any, folder: Path, tmp_path: Path
) -> None:
    """Else a name that is misspelt has runs made again that have been made."""
    document = changed(space_recipe(), {"sweep__family": "mode-up"})
    recipe = write_recipe(tmp_path / "recipe.toml", document)
    words = ("plan", folder, "--space", recipe, "--runs", "2", "--budget", "1e20", "--json")
    code, text, err = bayeslr(*words)
    assert code == 0
    (warning,) = json.loads(text)["warnings"]
    assert "no run of the recipe's family 'mode-up', but of made-up" in warning
    assert f"Warning: {warning}" in err


def test_plan_takes_gpu_hours(bayeslr: Any, folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.toml", space_recipe())
    words = ("plan", folder, "--space", recipe, "--runs", "2")
    hours = ("--gpu-hours", "50", "--flops-per-second", "4e14")
    code, text, err = bayeslr(*words, *hours)
    assert code == 0, err
    assert text.startswith("Budget: 72,000,000,000,000,000,000 FLOPs, 50 GPU-hours at 400T FLOP/s")
    assert "GPU-hours  saves, nats" in text
    document = json.loads(bayeslr(*words, *hours, "--json")[1])
    assert (document["budget_gpu_hours"], document["flops_per_second"]) == (50, 4e14)
    assert document["proposals"]
    for proposal in document["proposals"]:
        assert proposal["gpu_hours"] == pytest.approx(proposal["flops"] / 3600 / 4e14)
    assert math.fsum(p["gpu_hours"] for p in document["proposals"]) <= 50
    changes = {"sweep__budget_flops": None, "sweep__budget_gpu_hours": 1}
    timed = {**changes, "sweep__flops_per_second": 4e14}
    recipe = write_recipe(tmp_path / "timed.toml", changed(space_recipe(), timed))
    words = ("plan", folder, "--space", recipe, "--runs", "1")
    assert "50 GPU-hours at 400T FLOP/s" in bayeslr(*words, "--gpu-hours", "50")[1]
    assert "25 GPU-hours at 400T FLOP/s" in bayeslr(*words, "--budget", "3.6e19")[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "got none of them"),
        (("--budget", "1e18", "--gpu-hours", "3"), "got --budget and --gpu-hours"),
        (("--budget", "1e18", "--flops-per-second", "1e14"), "got --budget and --flops-per-second"),
        (("--gpu-hours", "3"), "--gpu-hours needs --flops-per-second"),
        (("--gpu-hours", "0", "--flops-per-second", "1e14"), "--gpu-hours must be finite and > 0"),
        (("--gpu-hours", "1", "--flops-per-second", "nan"), "--flops-per-second must be a number"),
    ],
)
def test_plan_needs_one_whole_budget(
    bayeslr: Any, folder: Path, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.toml", space_recipe())
    code, _, err = bayeslr("plan", folder, "--space", recipe, *words)
    assert (code, told in " ".join(err.split())) == (2, True), err


def test_a_sweep_is_described_in_json(bayeslr: Any, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.toml", toy_recipe())
    code, text, _ = bayeslr("sweep", recipe, "--dry-run", "--json")
    plan = json.loads(text)
    assert (code, plan["name"], plan["budget_flops"]) == (0, "toy", 6e12)
    assert len(plan["cells"]) == 4


def test_report_writes_one_file(bayeslr: Any, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    code, text, _ = bayeslr("report", folder, "-o", out)
    assert code == 0
    assert f"Report written to {out}" in text
    assert out.read_text().lstrip().startswith("<!")
    code, _, err = bayeslr("report", folder, "-o", ".")
    assert code == 2
    assert "cannot write .: it is a folder; name a file in it" in err


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is at hand stands in for a calibration."""

    class Result:
        def document(self) -> dict[str, Any]:
            return {}

        def text(self) -> str:
            return "the intervals are what they say"

        def html(self) -> str:
            return "<html>"

    monkeypatch.setattr("bayeslr.calibration.calibrate", lambda *_, **__: Result())


@pytest.mark.usefixtures("calibrated")
def test_a_pipe_is_written_to_and_not_replaced(bayeslr: Any, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    code, _, _ = bayeslr("calibrate", "-o", pipe)
    assert (code, pipe.is_fifo(), os.read(reader, 100)) == (0, True, b"<html>")
    os.close(reader)


@pytest.mark.usefixtures("calibrated")
@pytest.mark.parametrize("place", ["folder.html", "none/page.html"])
def test_a_calibration_that_cannot_be_written_is_printed_all_the_same(
    bayeslr: Any, tmp_path: Path, place: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    code, out, err = bayeslr("calibrate", "-o", tmp_path / place)
    assert (code, out) == (2, "the intervals are what they say\n")
    assert "cannot write" in err
