"""The verbs import and check: what they print, write, and end with."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pandas as pd
import pytest
import typer

from bayeslr.cli.data import check, import_app
from bayeslr.errors import DataError, SpecError
from bayeslr.runs import quarantine_path, read_runs

app = typer.Typer()
app.add_typer(import_app, name="import")
app.command()(check)

STEPLAW = "h,numl,lr,bs,loss,smooth loss,exp_name,D,N\n" + "".join(
    f"960,7,{lr},{bs},9,{loss},e{lr}_{bs},4000000000,214663680\n"
    for bs in (64, 128)
    for lr, loss in ((5e-4, 2.66), (1e-3, 2.64), (2e-3, 2.62), (4e-3, 2.65), (1.6e-2, 6.6))
)


def bayeslr(*words: object) -> tuple[str, str]:
    """Standard output and error of a command that must succeed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        app([str(word) for word in words], standalone_mode=False)
    return out.getvalue(), err.getvalue()


@pytest.fixture
def steplaw(tmp_path: Path) -> Path:
    path = tmp_path / "steplaw.csv"
    path.write_text(STEPLAW)
    return path


def test_import_steplaw(steplaw: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs.parquet"
    stdout, stderr = bayeslr("import", "steplaw", steplaw, "-o", out)
    assert "10 rows accepted" in stdout
    assert "steplaw_dense: 8 ok, 2 diverged" in stdout
    assert f"written to {out}" in stdout
    assert stderr == ""
    assert len(read_runs(out)) == 10
    assert not quarantine_path(out).exists()


def test_import_writes_the_quarantine_beside(steplaw: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs.csv"
    steplaw.write_text(STEPLAW.replace("0.001,64", "-7,64"))
    _, stderr = bayeslr("import", "steplaw", steplaw, "-o", out)
    assert f"1 row quarantined, all of them in {quarantine_path(out)}" in stderr
    assert "lr must be finite and > 0, got '-7'" in stderr
    entry = pd.read_csv(quarantine_path(out)).iloc[0]
    assert (entry["line"], entry["column"]) == (3, "lr")
    stdout, _ = bayeslr("check", out)
    assert "Quarantined: 1" in stdout
    assert "got '-7'" in stdout
    assert "line 3" in stdout
    steplaw.write_text(STEPLAW)  # a later clean import leaves no stale quarantine
    bayeslr("import", "steplaw", steplaw, "-o", out)
    assert not quarantine_path(out).exists()


def test_import_does_not_overwrite_what_it_reads(steplaw: Path, tmp_path: Path) -> None:
    before = steplaw.read_bytes()
    (tmp_path / "same.csv").symlink_to(steplaw)
    for out in (steplaw, tmp_path / "same.csv"):
        with pytest.raises(SpecError, match="is the file that is imported; name another"):
            bayeslr("import", "steplaw", steplaw, "-o", out)
        bayeslr("import", "steplaw", steplaw, "-o", out, "--dry-run")
    assert steplaw.read_bytes() == before


def test_import_with_nothing_left_is_rejected(steplaw: Path, tmp_path: Path) -> None:
    lines = STEPLAW.splitlines()
    steplaw.write_text(
        "\n".join([lines[0], *(line.replace("4000000000", "4") for line in lines[1:])])
    )
    with pytest.raises(DataError, match="did you mean billions") as caught:
        bayeslr("import", "steplaw", steplaw, "-o", tmp_path / "runs.parquet")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "runs.parquet").exists()


def test_dry_run_writes_nothing(steplaw: Path, tmp_path: Path) -> None:
    stdout, _ = bayeslr("import", "steplaw", steplaw, "-o", tmp_path / "x.csv", "--dry-run")
    assert "nothing was written" in stdout
    stdout, _ = bayeslr("import", "csv", steplaw, "--map", "lr=lr", "--dry-run")
    assert "lr <- lr" in stdout
    assert "missing: run_id, family" in stdout
    assert "perhaps --map run_id=exp_name" in stdout
    assert [path.name for path in tmp_path.iterdir()] == ["steplaw.csv"]


def test_dry_run_checks_the_rows_of_a_whole_table(tmp_path: Path) -> None:
    columns = "run_id,family,lr,n_active,n_total,param_convention,tokens,batch_tokens,loss,status"
    path = tmp_path / "runs.csv"
    path.write_text(f"{columns}\na,f,1e-3,,1e8,total,2e9,5e5,3.0,ok\n")
    with pytest.raises(DataError, match="no row is left"):
        bayeslr("import", "csv", path, "--dry-run")


def test_dry_run_of_a_tracker_shows_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "wandb.csv"
    path.write_text(
        "Name,State,learning_rate,total_tokens,train_batch_size,val/loss\n"
        "a,finished,0.001,2e9,262144,3.2\n"
    )
    words = ("import", "wandb", path, "-o", tmp_path / "x.csv", "--set", "n_active=1.3B")
    stdout, _ = bayeslr(*words, "--dry-run")
    assert "lr <- learning_rate" in stdout
    assert "n_active <- 1300000000" in stdout
    assert "run_id <- as the export tells it" in stdout
    assert "0.001" in stdout
    assert "missing: n_total, param_convention" in stdout
    assert [path.name for path in tmp_path.iterdir()] == ["wandb.csv"]
    with pytest.raises(DataError, match="gives no n_total, param_convention"):
        bayeslr(*words)


def test_import_csv(steplaw: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    flags = ["run_id=exp_name", "n_active=N", "n_total=N", "tokens=D", "batch_tokens=bs*2048",
             "loss=smooth loss"]  # fmt: skip
    maps = [word for flag in flags for word in ("--map", flag)]
    sets = ["--set", "param_convention=non_embedding", "--family", "f"]
    _, stderr = bayeslr("import", "csv", steplaw, "-o", out, *maps, *sets)
    assert "note: " in stderr
    assert "has no column status" in stderr
    assert read_runs(out).families == ("f",)


def test_flags_that_break_a_rule(steplaw: Path) -> None:
    with pytest.raises(SpecError, match="takes ours=theirs"):
        bayeslr("import", "csv", steplaw, "--map", "lr")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "optuna", "tensorboard"])
def test_every_format_has_its_verb(name: str, steplaw: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="bayeslr import csv"):
        bayeslr("import", name, steplaw, "-o", tmp_path / "runs.parquet")


def test_check(steplaw: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs.parquet"
    bayeslr("import", "steplaw", steplaw, "-o", out)
    stdout, _ = bayeslr("check", out)
    assert "10 rows" in stdout
    assert "family steplaw_dense (dense): 10 runs; 8 ok, 2 diverged" in stdout
    assert "shapes: 1; cells (shape x tokens): 1; slices (cell x batch): 2" in stdout
    assert "LRs a slice: 5" in stdout
    assert "Quarantined: nothing" in stdout
    assert "one model size only (n_active 214.7M): the size exponent is the prior's" in stdout


def test_check_json(steplaw: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs.parquet"
    bayeslr("import", "steplaw", steplaw, "-o", out)
    stdout, _ = bayeslr("check", out, "--json")
    facts = json.loads(stdout)
    assert facts["rows"] == 10
    assert facts["families"][0]["status"] == {"ok": 8, "diverged": 2}
    assert any("one model size only" in text for text in facts["cannot_identify"])
    assert facts["quarantine"] == []


def test_check_several_tables(steplaw: Path, tmp_path: Path) -> None:
    for family in ("f", "g"):
        out = tmp_path / f"{family}.csv"
        bayeslr("import", "steplaw", steplaw, "-o", out, "--family", family)
        text = out.read_text().replace(",e", f",{family}e").replace("\ne", f"\n{family}e")
        out.write_text(text)
    stdout, _ = bayeslr("check", tmp_path / "f.csv", tmp_path / "g.csv")
    assert "family f" in stdout
    assert "family g" in stdout


def test_check_of_a_missing_file() -> None:
    with pytest.raises(DataError, match=r"none\.csv does not exist"):
        bayeslr("check", "none.csv")


def test_the_verbs_load_nothing_heavy() -> None:
    code = (
        "import sys, bayeslr.cli.data; "
        "print([n for n in ('numpy', 'pandas', 'pyarrow', 'jax') if n in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"
