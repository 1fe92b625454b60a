"""Foreign formats: what each reader makes of real headers, and what it refuses."""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bayeslr import importers
from bayeslr.errors import DataError, SpecError, StorageError
from bayeslr.importers import csv, mlflow, optuna, optuna_storages, steplaw, tensorboard, wandb
from bayeslr.importers.mapping import Source, guess, look_names, parse_constants, parse_mapping


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def column(table: importers.RunTable, name: str) -> list[object]:
    return [None if pd.isna(value) else value for value in table.frame[name]]


def test_registry() -> None:
    for name in importers.FORMATS:
        assert callable(importlib.import_module(f"bayeslr.importers.{name}").read)
    with pytest.raises(SpecError, match="no importer named 'excel'; there are steplaw, csv"):
        importers.read("excel", "runs.xlsx")


# Step Law

DENSE = "h,ffnh,numh,numl,lr,bs,ti,loss,smooth loss,exp_name,D,N,D/N\n"
MOE = "seq_len,topk,nume,moeh,sed,h,ffnh,numh,numl,lr,bs,ti,loss,smooth loss,exp_name,N,Na,D\n"


def dense_row(lr: float, loss: float, bs: int = 64, tokens: int = 4_000_000_000) -> str:
    name = f"run_lr{lr}_bs{bs}"
    return f"960,9368,15,7,{lr},{bs},30517,9.9,{loss},{name},{tokens},214663680,18.6\n"


def test_steplaw_dense(tmp_path: Path) -> None:
    valley = ((5e-4, 2.66), (1e-3, 2.64), (2e-3, 2.62), (4e-3, 2.65), (8e-3, 2.9), (1.6e-2, 6.6))
    text = DENSE + "".join(dense_row(lr, loss) for lr, loss in valley)
    table = steplaw.read(write(tmp_path / "dense.csv", text))
    frame = table.frame
    assert table.families == ("steplaw_dense",)
    assert list(frame["status"]) == ["ok"] * 5 + ["diverged"]
    assert "above its slice's best" in frame["status_reason"].iloc[-1]
    assert frame["loss"].iloc[-1] == 6.6
    row = frame.iloc[0]
    assert (row["n_active"], row["n_total"], row["arch"]) == (214663680, 214663680, "dense")
    assert (row["batch_tokens"], row["tokens"], row["seq_len"]) == (64 * 2048, 4e9, 2048)
    assert (row["loss"], row["loss_kind"]) == (2.66, "train_smoothed")
    assert row["lr"] * row["final_lr_fraction"] == pytest.approx(1e-5)
    assert row["warmup_tokens"] == 2000 * 64 * 2048
    assert row["run_id"] == "run_lr0.0005_bs64"
    assert steplaw.read(tmp_path / "dense.csv", family="mine").families == ("mine",)


def test_steplaw_moe(tmp_path: Path) -> None:
    text = MOE + "".join(
        f"2048,1,89,352,352,1408,3904,11,16,{lr},64,15258,2.6,2.68,e{lr},2150612992,187973632,2e9\n"
        for lr in (1.726e-4, 3.453e-4)
    )
    table = steplaw.read(write(tmp_path / "moe.csv", text))
    row_0 = table.frame.iloc[0]
    assert table.families == ("steplaw_moe",)
    assert (row_0["n_active"], row_0["n_total"], row_0["arch"]) == (187973632, 2150612992, "moe")
    assert (row_0["n_experts"], row_0["top_k"]) == (89, 1)


def test_steplaw_without_divergence_marks_none(tmp_path: Path) -> None:
    # 0.5 nats above the best is a poor run, far below the excess of any that diverged.
    text = DENSE + dense_row(1e-3, 2.6) + dense_row(8e-3, 3.1) + dense_row(1e-4, 4.2)
    table = steplaw.read(write(tmp_path / "runs.csv", text))
    assert list(table.frame["status"]) == ["ok"] * 3


def test_steplaw_slice_of_which_all_diverged(tmp_path: Path) -> None:
    text = DENSE + dense_row(1e-3, 2.6) + dense_row(8e-3, 6.6, bs=32) + dense_row(1e-2, 6.7, bs=32)
    table = steplaw.read(write(tmp_path / "runs.csv", text))
    assert list(table.frame["status"]) == ["ok", "diverged", "diverged"]


def test_steplaw_nan_diverged_and_bad_rows_are_set_aside(tmp_path: Path) -> None:
    bad = dense_row(2e-3, 2.6).replace("0.002,", "-0.002,").replace("lr0.002", "lrneg")
    text = DENSE + dense_row(1e-3, 2.6) + dense_row(8e-3, math.nan) + bad + "960,1\n"
    table = steplaw.read(write(tmp_path / "runs.csv", text))
    assert list(table.frame["status"]) == ["ok", "diverged"]
    assert list(table.quarantine["line"]) == [4, 5]
    assert table.quarantine["column"].iloc[0] == "lr"


def test_steplaw_of_torn_lines_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row is left"):
        steplaw.read(write(tmp_path / "torn.csv", DENSE + dense_row(1e-3, 2.6)[:30]))


def test_steplaw_refuses_another_header(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Step Law table: column 'h' is missing"):
        steplaw.read(write(tmp_path / "runs.csv", "a,b\n1,2\n"))


@pytest.fixture
def steplaw_folder() -> Path:
    folder = os.environ.get("BAYESLR_DATA")
    if not folder:
        pytest.skip("needs the Step Law tables: set BAYESLR_DATA to the folder that has steplaw/")
    return Path(folder) / "steplaw"


@pytest.mark.parametrize(
    ("name", "family", "num_rows", "num_diverged"),
    [
        ("dense_lr_bs_loss.csv", "steplaw_dense", 1404, 135),
        ("moe_lr_bs_loss.csv", "steplaw_moe", 354, 0),
    ],
)
def test_steplaw_tables_as_published(
    steplaw_folder: Path, name: str, family: str, num_rows: int, num_diverged: int
) -> None:
    table = steplaw.read(steplaw_folder / name)
    frame = table.frame
    assert len(table.quarantine) == 0
    assert (len(table), table.families) == (num_rows, (family,))
    diverged = frame["status"] == "diverged"
    assert int(diverged.sum()) == num_diverged
    best = frame.groupby(["n_active", "tokens", "batch_tokens"])["loss"].transform("min")
    excess = frame["loss"] - best
    assert excess[~diverged].max() < 0.3
    assert not diverged.any() or excess[diverged].min() > 1.5
    raw = pd.read_csv(steplaw_folder / name)
    assert list(frame["lr"]) == list(raw["lr"])  # never snapped to a grid


# CSV with a mapping

SHEET = (
    "name,learning_rate,params_m,tokens_b,bs,seq,val_loss,loss\n"
    "a,0.001,125,2.5,256,2048,3.2,x\n"
    "b,0.002,125,2.5,256,2048,3.1,y\n"
    "c,0.004,125,two,256,2048,3.3,z\n"
)
MAPPING = (
    "run_id=name",
    "lr=learning_rate",
    "n_active=params_m*1e6",
    "n_total=1e6*params_m",
    "tokens=tokens_b*1B",
    "batch_tokens=bs*seq",
    "loss=val_loss",
)


def test_csv_mapping(tmp_path: Path) -> None:
    path = write(tmp_path / "sheet.csv", SHEET)
    table = csv.read(
        path, family="f", mapping=MAPPING, constants=["param_convention=total", "weight_decay=0"]
    )
    assert column(table, "n_active") == [125e6, 125e6]
    assert column(table, "tokens") == [2.5e9, 2.5e9]
    assert column(table, "batch_tokens") == [524288, 524288]
    assert column(table, "loss") == [3.2, 3.1]
    assert column(table, "weight_decay") == [0, 0]
    assert column(table, "theirs.loss") == ["x", "y"]
    assert "no column status" in table.warnings[0]
    entry = table.quarantine.iloc[0]
    assert (entry["line"], entry["column"], entry["value"]) == (4, "tokens", "two")


def test_csv_one_of_our_columns_may_serve_twice(tmp_path: Path) -> None:
    text = "run_id,lr,n_total,tokens,batch_tokens,loss\na,1e-3,1e8,2e9,262144,3\n"
    table = csv.read(
        write(tmp_path / "a.csv", text),
        family="f",
        mapping=["n_active=n_total"],
        constants=["param_convention=total"],
    )
    assert column(table, "n_active") == column(table, "n_total") == [1e8]


@pytest.mark.parametrize(
    ("source", "reason"), [("val_bpb", "in bits"), ("eval/ppl", "a perplexity"), ("l_8bit", None)]
)
def test_csv_the_name_of_a_losss_column_tells_its_unit(
    source: str, reason: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.csv", f"run_id,lr,{source}\na,1e-3,2.9\n")
    constants = ["param_convention=total", "n_active=1B", "n_total=1B", "tokens=20B",
                 "batch_tokens=1M"]  # fmt: skip
    if reason:
        with pytest.raises(DataError, match=f"must be in nats a token, this is {reason}"):
            csv.read(path, family="f", mapping=[f"loss={source}"], constants=constants)
        source += "*0.9"
    table = csv.read(path, family="f", mapping=[f"loss={source}"], constants=constants)
    assert len(table) == 1


def test_csv_proposes_a_mapping(tmp_path: Path) -> None:
    path = write(tmp_path / "sheet.csv", SHEET)
    with pytest.raises(DataError) as caught:
        csv.read(path, family="f")
    message = str(caught.value)
    assert "gives no run_id, lr, n_active" in message
    assert "--map run_id=name --map lr=learning_rate" in message
    assert "--set ours=value" in message


def test_csv_preview_checks_nothing(tmp_path: Path) -> None:
    seen = csv.preview(write(tmp_path / "sheet.csv", SHEET), mapping=["lr=learning_rate"])
    assert seen.mapped == {"lr": "learning_rate", "loss": "loss"}
    assert "batch_tokens" in seen.missing
    assert "run_id=name" in seen.proposals
    assert len(seen.head) == 3


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("lr", "--map takes ours=theirs, got 'lr'"),
        ("learningrate=x", "'learningrate' is no column of the run table"),
        ("n_actve=params_m", "did you mean n_active?"),
        ("lr=learning_rat", "has no column 'learning_rat'; did you mean 'learning_rate'?"),
        ("tokens=2e9", "names no column"),
        ("family=name*2", "family is text and cannot be multiplied"),
        ("tokens=__import__('os')", "has no column"),
    ],
)
def test_bad_mappings_are_told(mapping: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_mapping([mapping], ["name", "params_m", "learning_rate"], "sheet.csv")
    assert message in str(caught.value)


def test_mapping_texts() -> None:
    headers = ["a", "b", "a*b"]
    sources = parse_mapping(["tokens=a*b*1e3", "lr=a*b"], headers, "x")
    assert sources["tokens"] == Source(headers=("a", "b"), factor=1000.0)
    assert sources["lr"] == Source(headers=("a*b",))  # a header may hold a star
    assert str(sources["tokens"]) == "a*b*1000"


def test_constants() -> None:
    values = parse_constants(["n_active=1.3B", "family=x=y", "weight_decay=0.0", "seed=0"])
    assert values == {"n_active": 1.3e9, "family": "x=y", "weight_decay": 0.0, "seed": 0.0}
    with pytest.raises(SpecError, match="--set n_active must be a number"):
        parse_constants(["n_active=many"])


def test_one_count_of_an_moe_model_is_not_taken_for_both() -> None:
    frame = pd.DataFrame({"num_params": ["1e8"], "num_experts": ["8"]})
    names = look_names(list(frame))
    found, _ = guess(frame, names, names, [])
    assert "n_total" in found
    assert "n_active" not in found
    names = look_names(["num_params"])
    assert "n_active" in guess(frame, names, names, [])[0]


def test_a_dense_model_tells_no_experts_and_transformers_tell_their_sampling() -> None:
    """Megatron logs num_experts=None of a dense model, transformers top_k=50 of any model."""
    for cells in ({"num_experts": ["None"]}, {"num_experts": ["1"]}, {"top_k": ["50"]}):
        frame = pd.DataFrame({"num_params": ["1e8"], **cells})
        names = look_names(list(frame))
        found, doubts = guess(frame, names, names, [])
        assert "n_active" in found
        assert "top_k" not in found
        assert ("--map top_k=top_k" in doubts.get("top_k", "")) == ("top_k" in cells)
    assert "top_k" in guess(frame, names, names, ["n_experts"])[0]


def test_a_column_of_another_kind_only_bears_our_name(tmp_path: Path) -> None:
    """As Weights & Biases has them of a model of transformers."""
    text = (
        "Name,State,Runtime,architecture,top_k,seed,lr,num_params,tokens,batch_tokens,loss\n"
        "a,finished,1h 2m,llama,50,,1e-3,1.24e8,2.5e9,491520,3.2\n"
        "b,finished,,llama,50,x,2e-3,1.24e8,2.5e9,491520,3.3\n"
    )
    path = write(tmp_path / "w.csv", text)
    table = wandb.read(path, constants=["param_convention=total"])
    assert column(table, "arch") == ["dense", "dense"]
    assert column(table, "wall_s") == column(table, "top_k") == column(table, "seed") == [None] * 2
    assert column(table, "architecture") == ["llama", "llama"]
    assert column(table, "theirs.top_k") == [50, 50]
    told = " ".join(table.warnings)
    assert "wall_s is not taken from 'Runtime': '1h 2m' is no number" in told
    assert "arch is not taken from 'architecture': 'llama' is none of dense, moe" in told
    assert "seed is not taken from 'seed': 'x' is no number" in told
    table = wandb.read(path, mapping=["wall_s=Runtime"], constants=["param_convention=total"])
    assert list(table.quarantine["column"]) == ["wall_s"]  # the user's word is taken as it is


def test_a_column_of_numbers_goes_before_one_of_text(tmp_path: Path) -> None:
    """The name of a loss function stands under loss in many a config."""
    text = "Name,State,loss,final_loss,lr,num_params,tokens,batch_tokens\n"
    text += "a,finished,cross_entropy,3.2,1e-3,1.24e8,2.5e9,491520\n"
    path = write(tmp_path / "w.csv", text)
    assert column(wandb.read(path, constants=["param_convention=total"]), "loss") == [3.2]
    write(path, text.replace("final_loss", "other"))
    with pytest.raises(DataError, match="loss must be a number, got 'cross_entropy'"):
        wandb.read(path, constants=["param_convention=total"])


def test_the_peak_lr_is_taken_not_that_of_the_last_step(tmp_path: Path) -> None:
    """As nanoGPT logs to Weights & Biases, and the Trainer of transformers to MLflow."""
    head, tail = "num_params,tokens,batch_tokens", "1.24e8,2.5e9,491520"
    constants = ["param_convention=total"]
    for settings, logged in (("learning_rate", "lr"), ("optimizer.learning_rate", "train/lr")):
        text = f"Name,State,{settings},{logged},{head},train/loss,val/loss\n"
        text += "".join(f"r{i},finished,{lr},6e-05,{tail},3.2,3.3\n"
                        for i, lr in enumerate((3e-4, 6e-5)))  # fmt: skip
        table = wandb.read(write(tmp_path / "w.csv", text), constants=constants)
        assert column(table, "lr") == [3e-4, 6e-5]
        assert column(table, "loss") == [3.3, 3.3]
        (told,) = [w for w in table.warnings if "as the peak LR" in w]
        assert f"--map lr={logged}" in told
    logged = "metrics.loss,metrics.eval_loss,metrics.learning_rate"
    header = f"run_id,status,{logged},params.learning_rate,{head}"
    path = write(tmp_path / "m.csv", f"{header}\na,FINISHED,2.9,3.3,3e-05,3e-4,{tail}\n")
    table = mlflow.read(path, constants=constants)
    assert (column(table, "lr"), column(table, "loss")) == ([3e-4], [3.3])
    nested = path.read_text(encoding="utf-8").replace("params.l", "params.optimizer.l")
    table = mlflow.read(write(path, nested), constants=constants)
    assert column(table, "lr") == [3e-4]
    assert any("as the peak LR" in warning for warning in table.warnings)


# Weights & Biases

WANDB = (
    '"Name","State","Created","optimizer.learning_rate","parameter_count",'
    '"throughput/total_tokens","eval/loss","train/loss","batch_size_in_tokens"\n'
    '"a","finished","2024-01-01","0.001","130000000","2600000000","3.2","3.1","524288"\n'
    '"b","finished","2024-01-02","0.008","130000000","2600000000","NaN","NaN","524288"\n'
    '"b","crashed","2024-01-03","0.002","130000000","26000000","4.2","3.1","524288"\n'
    '"d","running","2024-01-04","0.002","130000000","26000000","4.2","3.1","524288"\n'
    '"e","failed","2024-01-05","0.016","130000000","26000000","Infinity","","524288"\n'
    '"f","failed","2024-01-06","0.004","130000000","26000000","","","524288"\n'
    '"g","finished","2024-01-07","0.004","130000000","2600000000","","3.1","524288"\n'
)


def test_wandb(tmp_path: Path) -> None:
    path = write(tmp_path / "wandb.csv", WANDB)
    table = wandb.read(path, constants=["param_convention=total"])
    assert column(table, "status") == ["ok", "diverged", "lost", "partial", "diverged", "failed"]
    assert column(table, "status_reason")[1] == "loss NaN, state finished"
    assert column(table, "loss") == [3.2, None, 4.2, 4.2, None, None]
    assert column(table, "run_id")[:3] == ["a", "b @ 2024-01-02", "b @ 2024-01-03"]
    assert column(table, "lr")[0] == 0.001
    assert column(table, "train/loss")[0] == 3.1
    assert table.families == ("wandb",)
    assert list(table.quarantine["line"]) == [8]
    assert any("lr from 'optimizer.learning_rate'" in w for w in table.warnings)
    assert any("all runs are of family 'wandb'" in w for w in table.warnings)


def test_wandb_a_scaled_loss_of_nan_diverged(tmp_path: Path) -> None:
    path = write(tmp_path / "wandb.csv", WANDB)
    scaled, constants = ["loss=eval/loss*0.5"], ["param_convention=total"]
    table = wandb.read(path, mapping=scaled, constants=constants)
    assert column(table, "status") == ["ok", "diverged", "lost", "partial", "diverged", "failed"]
    assert column(table, "loss") == [1.6, None, 2.1, 2.1, None, None]
    assert list(table.quarantine["line"]) == [8]


def test_wandb_the_users_word_goes_first(tmp_path: Path) -> None:
    path = write(tmp_path / "wandb.csv", WANDB)
    table = wandb.read(
        path,
        family="f",
        mapping=["loss=train/loss", "created_at=Created"],
        constants=["param_convention=total", "n_total=1B"],
    )
    assert column(table, "loss")[0] == 3.1
    assert column(table, "n_total")[0] == 1e9
    assert column(table, "created_at")[0] == "2024-01-01"


def test_wandb_says_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "wandb.csv", WANDB.replace("batch_size_in_tokens", "train_batch_size"))
    with pytest.raises(DataError) as caught:
        wandb.read(path)
    assert "gives no param_convention, batch_tokens" in str(caught.value)
    assert "batch_tokens=batch_size*seq_len multiplies" in str(caught.value)


def test_wandb_chart_is_refused(tmp_path: Path) -> None:
    chart = '"Step","a - train/loss","a - train/loss__MIN","a - train/loss__MAX"\n"1","3","3","3"\n'
    with pytest.raises(DataError, match=r"CSV of a W&B chart.*about 500 points"):
        wandb.read(write(tmp_path / "chart.csv", chart))


# MLflow

MLFLOW_PAGE = (
    "Start Time,Duration,Run ID,Name,Source Type,Source Name,User,Status,lr,n_params,tokens,"
    "batch_tokens,loss,loss\n"
    "2024-01-01 10:00:00,2.5min,id0,a,LOCAL,t.py,me,FINISHED,0.001,1e8,2e9,262144,3.2,9\n"
    "2024-01-01 11:00:00,1.2h,id1,b,LOCAL,t.py,me,KILLED,0.002,1e8,1e9,262144,3.4,9\n"
)
MLFLOW_SEARCH = (
    "run_id,experiment_id,status,artifact_uri,start_time,end_time,metrics.loss,metrics.tokens,"
    "params.learning_rate,params.num_params,params.batch_tokens,params.tokens,tags.mlflow.user\n"
    "id0,0,FINISHED,x,2024-01-01 10:00:00+00:00,2024-01-01 10:02:30+00:00,3.2,2e9,0.001,1e8,"
    "262144,5,me\n"
    "id1,0,RUNNING,x,2024-01-01 10:00:00+00:00,,3.4,1e9,0.002,1e8,262144,5,me\n"
)


MLFLOW_RECORDS = MLFLOW_SEARCH.replace("2024-01-01 10:00:00+00:00", "1704103200000").replace(
    "2024-01-01 10:02:30+00:00", "1704103350000"
)


@pytest.mark.parametrize("text", [MLFLOW_SEARCH, MLFLOW_RECORDS])
def test_mlflow_search_runs(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", text)
    table = mlflow.read(path, family="f", constants=["param_convention=total"])
    assert column(table, "run_id") == ["id0", "id1"]
    assert column(table, "status") == ["ok", "partial"]
    assert column(table, "lr") == [0.001, 0.002]
    assert column(table, "tokens") == [2e9, 1e9]  # the metric, not the parameter of that name
    assert column(table, "wall_s") == [150, None]
    assert column(table, "created_at") == ["2024-01-01 10:00:00+00:00"] * 2


def test_mlflow_page(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", MLFLOW_PAGE.replace(",loss,loss", ",val_loss,loss (x)"))
    table = mlflow.read(path, family="f", constants=["param_convention=total"])
    assert column(table, "status") == ["ok", "lost"]
    assert column(table, "wall_s") == [150, 4320]
    assert column(table, "created_at")[0] == "2024-01-01 10:00:00"
    assert not any("wall_s" in warning for warning in table.warnings)  # read from the Duration


def test_mlflow_a_parameter_and_a_metric_of_one_name(tmp_path: Path) -> None:
    """The peak LR beside that of the last step; the tokens that were planned beside those seen."""
    head = "Run ID,Status,learning_rate,total_tokens,n_params,batch_tokens,val_loss"
    page = f"{head},learning_rate,total_tokens\nid0,RUNNING,1e-3,2e9,1e8,262144,3.2,1e-5,1e9\n"
    names = ["run_id", "status", *(f"params.{n}" for n in head.split(",")[2:6]), "metrics.loss"]
    search = ",".join([*names, "metrics.learning_rate", "metrics.total_tokens"])
    for text, lr, tokens in (
        (page, "learning_rate (2)", "total_tokens"),
        (page.replace(page.split("\n")[0], search), "metrics.learning_rate", "params.total_tokens"),
    ):
        path = write(tmp_path / "runs.csv", text)
        table = mlflow.read(path, family="f", constants=["param_convention=total"])
        assert (column(table, "lr"), column(table, "tokens")) == ([1e-3], [1e9])
        told = " ".join(table.warnings)
        assert f"{lr!r} has the same name and differs. --map 'lr={lr}'" in told
        assert f"{tokens!r} has the same name and differs. --map 'tokens={tokens}'" in told
        mapped = [f"lr={lr}", f"tokens={tokens}"]
        table = mlflow.read(path, family="f", mapping=mapped, constants=["param_convention=total"])
        assert (column(table, "lr"), column(table, "tokens")) == ([1e-5], [2e9])
        assert not any("same name" in warning for warning in table.warnings)


def test_mlflow_colliding_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 'loss' twice; rename or remove one"):
        mlflow.read(write(tmp_path / "runs.csv", MLFLOW_PAGE))


# Optuna

OPTUNA = (
    ",number,value,datetime_start,datetime_complete,duration,params_lr,user_attrs_tokens,"
    "user_attrs_status,state\n"
    "0,0,3.0,2024-01-01 10:00:00,2024-01-01 10:04:22,0 days 00:04:22.368701,0.001,2e9,,COMPLETE\n"
    "1,1,inf,2024-01-01 10:00:00,2024-01-01 10:04:22,0 days 00:04:22,0.009,2e9,,COMPLETE\n"
    "2,2,4.0,2024-01-01 10:00:00,2024-01-01 10:04:22,0 days 00:04:22,0.002,2e9,,PRUNED\n"
    "3,3,,2024-01-01 10:00:00,2024-01-01 10:04:22,0 days 00:04:22,0.02,2e9,diverged,FAIL\n"
    "4,4,,2024-01-01 10:00:00,2024-01-01 10:04:22,0 days 00:04:22,0.02,2e9,,FAIL\n"
    "5,5,,2024-01-01 10:00:00,,,0.02,2e9,,RUNNING\n"
    "6,6,,,,,,,,WAITING\n"
)
SETTINGS = ("param_convention=total", "n_active=100M", "n_total=100M", "batch_tokens=256K")


def test_optuna_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "study.csv", OPTUNA)
    table = optuna.read(path, family="f", constants=SETTINGS)
    assert column(table, "status") == ["ok", "diverged", "pruned", "diverged", "failed", "lost"]
    assert column(table, "run_id")[0] == "f-0"
    assert column(table, "loss") == [3.0, None, None, None, None, None]
    assert column(table, "wall_s")[0] == pytest.approx(262.368701)
    assert any("1 waiting trials" in warning for warning in table.warnings)
    assert any("no loss is taken of 1 pruned trials" in warning for warning in table.warnings)


def test_optuna_a_clock_that_was_put_back_costs_no_trial(tmp_path: Path) -> None:
    text = OPTUNA.replace("0 days 00:04:22.368701", "-1 days +23:10:00")
    table = optuna.read(write(tmp_path / "study.csv", text), constants=SETTINGS)
    assert column(table, "wall_s")[:2] == [None, 262]
    assert column(table, "run_id")[0] == "study-0"


def test_the_loss_of_a_pruned_trial_counts_if_its_tokens_were_seen(tmp_path: Path) -> None:
    """Optuna's value is the last report; ``tokens`` are as a rule those that were planned."""
    said = write(tmp_path / "study.csv", OPTUNA.replace("2e9,,PRUNED", "2e9,partial,PRUNED"))
    table = optuna.read(said, family="f", constants=SETTINGS)
    assert column(table, "loss")[2] == 4.0
    assert column(table, "status")[2] == "partial"
    path = write(tmp_path / "study.csv", OPTUNA)
    table = optuna.read(path, family="f", constants=SETTINGS, mapping=["loss=value"])
    assert column(table, "loss")[2] == 4.0


def test_optuna_several_objectives_need_a_choice(tmp_path: Path) -> None:
    text = OPTUNA.replace(",value,", ",values_loss,values_time,").replace(",3.0,", ",3.0,1,")
    text = "".join(line + "\n" for line in text.splitlines()[:2])
    path = write(tmp_path / "study.csv", text)
    with pytest.raises(DataError, match="gives no loss"):
        optuna.read(path, family="f", constants=SETTINGS)
    table = optuna.read(path, family="f", constants=SETTINGS, mapping=["loss=values_loss"])
    assert column(table, "loss") == [3.0]


def optuna_url(kind: str, path: Path) -> tuple[Any, str]:
    """A storage for Optuna at a path, and the URL of its file."""
    real = pytest.importorskip("optuna", reason="needs Optuna to make a storage")
    real.logging.set_verbosity(real.logging.ERROR)
    if kind == "sqlite":
        return f"sqlite:///{path}", f"sqlite:///{path}"
    backend = real.storages.journal.JournalFileBackend(str(path))
    return real.storages.JournalStorage(backend), f"journal://{path}"


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_optuna_storage(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    storage, url = optuna_url(kind, path)
    real = pytest.importorskip("optuna")
    study = real.create_study(storage=storage, study_name="one")
    space = {
        "lr": real.distributions.FloatDistribution(1e-4, 1e-1, log=True),
        "optimizer": real.distributions.CategoricalDistribution(["adamw", "muon"]),
    }
    for lr, value in ((1e-3, 3.0), (9e-3, math.inf)):
        params = {"lr": lr, "optimizer": "muon"}
        study.add_trial(
            real.trial.create_trial(
                params=params, distributions=space, value=value, user_attrs={"tokens": 2e9}
            )
        )
    table = optuna.read(url, family="f", constants=SETTINGS)
    assert column(table, "lr") == [1e-3, 9e-3]
    assert column(table, "loss") == [3.0, None]
    assert column(table, "optimizer") == ["muon", "muon"]
    assert column(table, "status") == ["ok", "diverged"]
    real.create_study(storage=storage, study_name="two")
    with pytest.raises(DataError, match="has 2 studies; name one with --study: 'one', 'two'"):
        optuna.read(path, constants=SETTINGS)
    assert len(optuna.read(path, constants=SETTINGS, study="one")) == 2
    with pytest.raises(DataError, match="a study without trials"):
        optuna.read(path, constants=SETTINGS, study="two")


def test_a_journal_is_read_as_optuna_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    storage, _ = optuna_url("journal", path)
    real = pytest.importorskip("optuna")
    real.create_study(storage=storage, study_name="gone").ask().suggest_float("lr", 1e-4, 1e-1)
    real.delete_study(storage=storage, study_name="gone")
    study = real.create_study(storage=storage, study_name="here", directions=["minimize"] * 2)
    study.enqueue_trial({"lr": 1e-3}, user_attrs={"tokens": 2e9})
    study.enqueue_trial({"lr": 2e-3})
    ended, open_ = study.ask(), study.ask()
    for trial in (ended, open_):
        trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        trial.suggest_categorical("optimizer", ["adamw", "muon"])
        trial.set_user_attr("shape", {"d_model": 64})
    study.tell(ended, [3.0, math.inf])
    study.enqueue_trial({"lr": 4e-3})
    late = json.dumps({"op_code": 8, "worker_id": "x", "trial_id": 1, "user_attr": {"late": 1}})
    with path.open("a", encoding="utf-8") as file:
        file.write(late + "\n")  # by another process, after the trial had ended
        file.write(late[:20])  # the line that is being written
    mine = optuna_storages.read_trials(path, None)
    path.write_bytes(path.read_bytes()[:-20])
    trials = study.get_trials()
    assert [t["state"] for t in mine] == [t.state.name for t in trials]
    assert [t["state"] for t in mine] == ["COMPLETE", "RUNNING", "WAITING"]
    for found, trial in zip(mine, trials, strict=True):
        told = {f"params_{name}": value for name, value in trial.params.items()}
        told |= {f"user_attrs_{name}": value for name, value in trial.user_attrs.items()}
        told |= {f"values_{i}": value for i, value in enumerate(trial.values or [])}
        told |= {"number": trial.number, "state": trial.state.name}
        if trial.datetime_complete:
            told["duration"] = trial.datetime_complete - trial.datetime_start
        assert found.pop("datetime_start") == (
            str(trial.datetime_start) if trial.datetime_start else None
        )
        assert found == told


def test_a_journal_that_was_cut_or_edited(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    storage, _ = optuna_url("journal", path)
    pytest.importorskip("optuna").create_study(storage=storage).ask()
    whole = path.read_text(encoding="utf-8")
    write(path, whole + '{"op_code": 4}\n')
    with pytest.raises(StorageError, match=r"line 3 is no entry .*KeyError: 'study_id'.*as CSV"):
        optuna.read(path)
    write(path, whole + '"op_code"\n')
    with pytest.raises(StorageError, match="line 3 is no entry"):
        optuna.read(path)


def test_optuna_storages_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not from postgresql; export") as told:
        optuna.read("postgresql://me:secret@host/db")
    assert "secret" not in str(told.value)
    with pytest.raises(DataError, match=r"is a folder without study\.journal"):
        optuna.read(tmp_path)


def test_optuna_another_database(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(StorageError, match="cannot be read as an Optuna storage: no such table"):
        optuna.read(path)


# TensorBoard

CURVE = "Wall time,Step,Value\n1,1000,5.0\n2,2000,4.0\n5,2000,3.9\n4,1000,5.1\n"
SCALAR = (*SETTINGS, "lr=3e-4", "family=f")


def test_tensorboard(tmp_path: Path) -> None:
    table = tensorboard.read(write(tmp_path / "run7.csv", CURVE), constants=SCALAR)
    assert column(table, "run_id") == ["run7"]
    assert column(table, "loss") == [3.9]  # the latest written of the last step
    assert column(table, "tokens") == [2000 * 256_000]
    assert column(table, "status") == ["ok"]
    assert any("2 points repeat a step" in warning for warning in table.warnings)


def test_tensorboard_nan_diverged(tmp_path: Path) -> None:
    text = CURVE + "6,3000,NaN\n"
    table = tensorboard.read(write(tmp_path / "a.csv", text), constants=[*SCALAR, "tokens=2B"])
    assert column(table, "status") == ["diverged"]
    assert column(table, "tokens") == [2e9]


def test_tensorboard_tags(tmp_path: Path) -> None:
    text = "step,tag,value\n1000,loss,3.5\n2000,loss,3.0\n3000,lr,0.1\n"
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(DataError, match="several scalars; name one with --tag: loss, lr"):
        tensorboard.read(path, constants=SCALAR)
    assert column(tensorboard.read(path, constants=SCALAR, tag="loss"), "loss") == [3.0]
    with pytest.raises(DataError, match="holds one scalar and does not tell which"):
        tensorboard.read(write(path, CURVE), constants=SCALAR, tag="eval/loss")


def test_tensorboard_needs_the_settings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"param_convention, batch_tokens\. Name"):
        tensorboard.read(write(tmp_path / "a.csv", CURVE))  # tokens follow from the batch


@pytest.mark.parametrize("module", [wandb, mlflow, optuna, tensorboard])
def test_another_table_is_told(module: object, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "x,y\n1,2\n")
    with pytest.raises(DataError, match="bayeslr import csv"):
        module.read(path)  # type: ignore[attr-defined]
