"""The run table: what is accepted, what is set aside, and what the user is told."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayeslr.errors import DataError, SpecError, StorageError
from bayeslr.runs import (
    COLUMN_NAMES,
    COLUMNS,
    QUARANTINE_COLUMNS,
    RunTable,
    concat,
    describe,
    identifiability,
    likely_headers,
    lr_group,
    make_table,
    nearest,
    read_runs,
)


def run(**changes: Any) -> dict[str, Any]:
    """A sound row of a dense 100M run on 2B tokens."""
    row = {
        "run_id": "r0",
        "family": "f",
        "lr": 1e-3,
        "n_active": 1e8,
        "n_total": 1e8,
        "param_convention": "non_embedding",
        "tokens": 2e9,
        "batch_tokens": 262144,
        "loss": 3.0,
        "status": "ok",
    }
    return row | changes


def sweep(**changes: Any) -> list[dict[str, Any]]:
    """Two sizes at two token counts each and two batches, five LRs in every slice."""
    rows: list[dict[str, Any]] = []
    for n in (1e8, 2e8):
        for tokens in (2e9, 4e9):
            for batch in (2**17, 2**19):
                for i, lr in enumerate((5e-4, 1e-3, 2e-3, 4e-3, 8e-3)):
                    rows.append(
                        run(
                            run_id=f"r{len(rows)}",
                            n_active=n,
                            n_total=n,
                            tokens=tokens,
                            batch_tokens=batch,
                            lr=lr,
                            loss=3.0 + 0.02 * (i - 2) ** 2,
                        )
                        | changes
                    )
    return rows


def only_reason(bad: dict[str, Any]) -> pd.Series[Any]:
    """The quarantine entry of a bad row beside a sound one; the sound one must be kept."""
    table = make_table([run(run_id="sound"), run(run_id="bad") | bad])
    assert list(table.frame["run_id"]) == ["sound"]
    assert len(table.quarantine) == 1
    entry = table.quarantine.iloc[0]
    assert entry["line"] == 2
    assert entry["run_id"] == "bad"
    return entry


# What is accepted


def test_canonical_frame() -> None:
    frame = make_table([run(n_total=8e8, vocab_size=50000, note="x")]).frame
    assert list(frame.columns) == [*COLUMN_NAMES, "vocab_size", "note"]
    for column in COLUMNS:
        assert frame[column.name].dtype == (np.float64 if column.kind == "number" else object)
    row = frame.iloc[0]
    assert row["arch"] == "moe"
    assert row["flops"] == 6 * 1e8 * 2e9
    assert row["optimizer"] is None
    assert math.isnan(row["loss_se"])
    assert make_table([run()]).frame["arch"].iloc[0] == "dense"


def test_the_callers_frame_is_left_alone() -> None:
    frame = pd.DataFrame([run(), run(run_id="b", loss=math.inf, status="diverged", note=[1])])
    before = frame.copy(deep=True)
    make_table(frame)
    pd.testing.assert_frame_equal(frame, before)


def test_given_flops_are_kept() -> None:
    assert make_table([run(flops=1e17)]).frame["flops"].iloc[0] == 1e17


def test_diverged_failed_and_lost_need_no_loss() -> None:
    table = make_table(
        [
            run(run_id="a"),
            run(run_id="b", status="diverged", loss=math.nan),
            run(run_id="c", status="diverged", loss=math.inf),
            run(run_id="d", status="diverged", loss=7.5),
            run(run_id="e", status="failed", loss=None),
            run(run_id="f", status="lost", loss=None, tokens=None),
            run(run_id="g", status="pruned", loss=None),
        ]
    )
    assert len(table.quarantine) == 0
    losses = dict(zip(table.frame["run_id"], table.frame["loss"], strict=True))
    assert losses.pop("a") == 3.0
    assert losses.pop("d") == 7.5
    assert all(math.isnan(loss) for loss in losses.values())
    assert list(table.frame["status"][1:4]) == ["diverged"] * 3


def test_a_diverged_run_may_have_seen_few_tokens() -> None:
    early = run(run_id="b", status="diverged", loss=None, tokens=3 * 262144, planned_tokens=2e9)
    assert len(make_table([run(), early]).quarantine) == 0


def test_checkpoints_and_decay_branches_share_a_run_id() -> None:
    rows = [
        run(tokens=1e9, status="partial", loss=3.3, planned_tokens=2e9),
        run(tokens=1e9, status="ok", loss=3.1),
        run(tokens=2e9, status="ok", loss=3.0),
        run(tokens=2e9, status="diverged", loss=None, planned_tokens=8e9),
    ]
    assert len(make_table(rows)) == 4


def test_tiny_proxies_are_real() -> None:
    tiny = run(n_active=9.3e4, n_total=3e5, tokens=2e5, batch_tokens=2048, seq_len=128, lr=1.6e-2)
    table = make_table([tiny, tiny | {"run_id": "b", "n_active": 1e4, "tokens": 1e5}])
    assert len(table.quarantine) == 0


def test_our_own_trainer_is_trusted_with_counts() -> None:
    smoke = run(n_active=2e7, n_total=2e7, tokens=4096, batch_tokens=256)
    assert len(make_table([smoke | {"source": "bayeslr_runners"}])) == 1
    with pytest.raises(DataError, match="did you mean billions"):
        make_table([smoke])


# What is set aside, and what the user is told


@pytest.mark.parametrize(
    ("bad", "column", "rule", "advice"),
    [
        ({"lr": math.nan}, "lr", "lr is required", "fill the cell"),
        ({"lr": math.inf}, "lr", "finite and > 0", "not its logarithm"),
        ({"lr": 0.0}, "lr", "finite and > 0", "not its logarithm"),
        ({"lr": -3.0}, "lr", "finite and > 0", "not its logarithm"),
        ({"lr": 2.0}, "lr", "above 1", "multiplier"),
        ({"lr": 1e-8}, "lr", "below 1e-7", "peak LR"),
        ({"loss": math.nan}, "loss", "finite for status ok", "status=diverged"),
        ({"loss": math.inf}, "loss", "finite for status ok", "status=diverged"),
        ({"loss": None}, "loss", "finite for status ok", "status=failed or lost"),
        ({"loss": 0.0}, "loss", "loss must be > 0", "the 0 that some tools write"),
        ({"loss": -1.2}, "loss", "loss must be > 0", "not its logarithm"),
        ({"loss": 0.01}, "loss", "below any language's entropy", "another metric"),
        ({"loss": 20.1}, "loss", "far above ln(vocabulary)", "status=diverged"),
        ({"loss": 7.0, "vocab_size": 256}, "loss", "far above ln(vocabulary)", "diverged"),
        ({"loss": 3.0, "status": "partial", "tokens": None}, "tokens", "is required", "fill"),
        ({"lr": "fast"}, "lr", "lr must be a number", "give the number"),
        ({"loss": True}, "loss", "loss must be a number", "give the number"),
        ({"d_model": "wide"}, "d_model", "must be a number", "leave the cell empty"),
        ({"n_total": "1.3B"}, "n_total", "must be a number", "1300000000"),
        ({"tokens": "2,000,000,000"}, "tokens", "must be a number", "thousands separators"),
        ({"lr": "0,001"}, "lr", "must be a number", "decimal point"),
        ({"status": "finished"}, "status", "must be one of ok", "crashed is failed or lost"),
        ({"status": None}, "status", "status is required", "fill"),
        ({"param_convention": "all"}, "param_convention", "must be one of", "output matrices"),
        ({"arch": "mixture"}, "arch", "must be one of dense, moe", "these words"),
        ({"arch": "dense", "n_total": 2e8}, "arch", "n_active equal to n_total", "arch=moe"),
        ({"n_total": 1e17}, "n_total", "must not exceed 1e+16", "1e9 applied twice"),
        ({"tokens": 2e18}, "tokens", "must not exceed 1e+16", "1e9 applied twice"),
        ({"n_active": 2e8}, "n_active", "must not exceed n_total", "swapped"),
        ({"tokens": 2.0}, "tokens", "below batch_tokens", "did you mean billions"),
        ({"tokens": 2000.0, "batch_tokens": 512}, "tokens", "too few", "did you mean billions"),
        ({"n_active": 0.1, "n_total": 0.1}, "n_active", "too few", "millions or billions"),
        ({"n_active": 1300.0, "n_total": 1300.0}, "n_active", "too few", "1300000000"),
        ({"batch_tokens": 128}, "batch_tokens", "too few", "Multiply them by seq_len"),
        ({"batch_tokens": 512, "seq_len": 2048}, "batch_tokens", "below seq_len", "sequences"),
        ({"planned_tokens": 1e9}, "planned_tokens", "not be below tokens", "the whole run"),
        ({"loss_kind": "c4_en_bpb"}, "loss", "this is in bits", "ln 2 = 0.6931"),
        ({"loss_kind": "val bits"}, "loss", "this is in bits", "bytes a token"),
        ({"loss": 4.328, "perplexity": 20.09}, "loss", "this is in bits", "ln 2"),
        ({"loss": 1.19, "eval/bpb": 1.19}, "loss", "this is in bits", "ln 2"),
        ({"loss_kind": "perplexity"}, "loss", "this is a perplexity", "natural logarithm"),
        ({"loss": 9.5, "eval/ppl": 9.5}, "loss", "this is a perplexity", "natural logarithm"),
        ({"weight_decay": -0.1}, "weight_decay", "finite and >= 0", "the value itself"),
        ({"decay_fraction": 20}, "decay_fraction", "<= 1", "share of the tokens"),
    ],
)
def test_bad_rows_are_told(bad: dict[str, Any], column: str, rule: str, advice: str) -> None:
    entry = only_reason(bad)
    assert entry["column"] == column
    assert rule in entry["rule"]
    assert advice in entry["advice"]
    if column in bad and bad[column] is not None:
        assert entry["value"].removesuffix(".0") == str(bad[column]).removesuffix(".0")


def test_a_perplexity_in_agreement_is_no_reason() -> None:
    assert len(make_table([run(perplexity=math.exp(3.0))]).quarantine) == 0


def test_no_row_left_says_why() -> None:
    with pytest.raises(
        DataError, match=r"(?s)no row is left, all 2.*did you mean billions"
    ) as caught:
        make_table([run(tokens=2), run(run_id="b", tokens=3)], source="sheet")
    assert "2 rows: tokens must not be below batch_tokens, got '2' (sheet, line 1)" in str(
        caught.value
    )
    assert caught.value.exit_code == 3


def test_a_frame_with_a_column_twice() -> None:
    frame = pd.DataFrame([run(note="x")])
    for name in ("lr", "note"):
        with pytest.raises(DataError, match=f"the column '{name}' is there twice"):
            make_table(pd.concat([frame, frame[[name]]], axis=1))


def test_no_rows() -> None:
    with pytest.raises(DataError, match="there are no rows"):
        make_table([])


def test_repeated_rows_count_once_and_are_told() -> None:
    table = make_table([run(wall_s=1.0), run(wall_s=2.0), run(run_id="b")])
    assert list(table.frame["wall_s"].fillna(0)) == [1.0, 0.0]
    assert "repeats an earlier one" in table.quarantine["rule"].iloc[0]
    assert table.quarantine["line"].iloc[0] == 2
    assert any("1 row repeat" in warning for warning in table.warnings)


def test_contradicting_rows_of_one_run_are_all_set_aside() -> None:
    table = make_table([run(loss=3.0), run(loss=3.1), run(run_id="b")])
    assert list(table.frame["run_id"]) == ["b"]
    assert list(table.quarantine["line"]) == [1, 2]
    assert table.quarantine["rule"].str.contains("one result at one token count").all()


def test_duplicated_run_id() -> None:
    table = make_table([run(lr=1e-3), run(lr=2e-3, tokens=3e9), run(run_id="b")])
    assert list(table.frame["run_id"]) == ["b"]
    assert table.quarantine["rule"].str.startswith("duplicated run_id").all()
    assert table.quarantine["advice"].str.contains("its own run_id").all()


def test_mixed_parameter_conventions_are_refused() -> None:
    rows = [run(), run(run_id="b", param_convention="total")]
    with pytest.raises(DataError, match=r"conventions are mixed: 1 rows are non_embedding.*line 2"):
        make_table(rows)


def test_missing_status_is_told() -> None:
    rows = [{k: v for k, v in run().items() if k != "status"}]
    table = make_table(rows)
    assert table.frame["status"].iloc[0] == "ok"
    assert "no column status" in table.warnings[0]


def test_unknown_schedule_is_kept_and_told() -> None:
    table = make_table([run(schedule="linear to 0, no warmup")])
    assert table.frame["schedule"].iloc[0] == "linear to 0, no warmup"
    assert "none of wsd, cosine" in table.warnings[0]


def test_low_losses_are_asked_about() -> None:
    assert any("bits a byte" in w for w in make_table([run(loss=1.1)]).warnings)


def test_mixed_kinds_of_loss_are_told() -> None:
    rows = [run(loss_kind="val"), run(run_id="b", loss_kind="train_smoothed")]
    assert any("mixes kinds of loss" in w for w in make_table(rows).warnings)


# Files


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


HEADER = "run_id,family,lr,n_active,n_total,param_convention,tokens,batch_tokens,loss,status\n"
GOOD = "a,f,1e-3,1e8,1e8,total,2e9,262144,3.0,ok\n"


def test_empty_file(tmp_path: Path) -> None:
    for suffix in (".csv", ".parquet", ".jsonl"):
        with pytest.raises(DataError, match="is empty"):
            read_runs(write(tmp_path / f"runs{suffix}", ""))
    with pytest.raises(DataError, match="a header but no rows"):
        read_runs(write(tmp_path / "runs.csv", HEADER))


def test_missing_file_and_other_suffix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_runs(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"ends in \.csv, \.parquet, \.jsonl, not in \.xlsx"):
        read_runs(write(tmp_path / "runs.xlsx", "x"))
    for name in ("dir.csv", "sweep"):
        (tmp_path / name).mkdir()
        with pytest.raises(DataError, match="is a folder"):
            read_runs(tmp_path / name)
    with pytest.raises(DataError, match="does not exist"):
        read_runs(tmp_path / "none")


def test_missing_column_suggests_a_mapping(tmp_path: Path) -> None:
    text = HEADER.replace("lr", "optimizer.learning_rate").replace("batch_tokens", "bs") + GOOD
    with pytest.raises(DataError) as caught:
        read_runs(write(tmp_path / "runs.csv", text))
    message = str(caught.value)
    assert "required columns lr, batch_tokens missing" in message
    assert "lr is perhaps 'optimizer.learning_rate'" in message
    assert "bayeslr import csv FILE --map ours=theirs" in message


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    bad = GOOD.replace("a,", '"b\nb",').replace("3.0", "nan")
    text = HEADER + GOOD + "\n" + bad + GOOD.replace("a,", "c,").replace("1e-3", "x")
    entries = read_runs(write(tmp_path / "runs.csv", text)).quarantine
    assert list(entries["line"]) == [4, 6]
    assert list(entries["column"]) == ["loss", "lr"]
    assert list(entries["value"]) == ["nan", "x"]
    assert entries["file"].iloc[0].endswith("runs.csv")


def test_ragged_lines_are_set_aside(tmp_path: Path) -> None:
    text = HEADER + GOOD + "b,f,1e-3\n" + GOOD.replace("a,", "c,").replace("2e9", "2,000,000,000")
    entries = read_runs(write(tmp_path / "runs.csv", text)).quarantine
    assert list(entries["line"]) == [3, 4]
    assert "as many cells as the header, 10, this has 3" in entries["rule"].iloc[0]
    assert "needs quotes" in entries["advice"].iloc[1]


@pytest.mark.parametrize("after", [b"", b'g,"f"'])
def test_a_quote_that_is_not_closed_swallows_no_rows(after: bytes, tmp_path: Path) -> None:
    """Whether the file ends within it, or another quote ends it by chance."""
    header, good = HEADER.replace("\n", ",note\n"), GOOD.replace("\n", ",\n")
    rows = [good, good.replace("a,", "b,").replace(",\n", ',"6 inch\n'), good.replace("a,", "c,")]
    path = write(tmp_path / "runs.csv", header + "".join(rows) + after.decode())
    with pytest.raises(DataError, match="row that begins in line 3: not valid CSV"):
        read_runs(path)


def test_separators_and_encodings(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    assert len(read_runs(write(path, HEADER + GOOD, "utf-8-sig"))) == 1
    assert len(read_runs(write(path, (HEADER + GOOD).replace("\n", "\r\n")))) == 1
    with pytest.raises(DataError, match="separated by semicolons"):
        read_runs(write(path, (HEADER + GOOD).replace(",", ";")))
    with pytest.raises(DataError, match="separated by tabs"):
        read_runs(write(path, (HEADER + GOOD).replace(",", "\t")))
    with pytest.raises(DataError, match="UTF-16"):
        read_runs(write(path, HEADER + GOOD, "utf-16"))
    with pytest.raises(DataError, match="line 2: byte 0xe9 is not UTF-8"):
        read_runs(write(path, HEADER + GOOD.replace("f", "é"), "latin-1"))
    with pytest.raises(DataError, match="has 'loss' twice"):
        read_runs(write(path, HEADER.replace("status", "loss") + GOOD))


@pytest.mark.parametrize("first", ["sep=,\n", "sep=,\r\n", '"sep=,"\n'])
def test_the_line_that_tells_excel_the_separator_is_no_header(first: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    table = read_runs(write(path, first + HEADER + GOOD + GOOD.replace("a,", "b,")[:-2] + ",,\n"))
    assert list(table.frame["run_id"]) == ["a"]
    assert list(table.quarantine["line"]) == [4]
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        with pytest.raises(DataError, match=f"separated by {name}"):
            read_runs(write(path, (first + HEADER + GOOD).replace(",", separator)))
    with pytest.raises(DataError, match="no header"):
        read_runs(write(path, first))


def test_torn_json_line_is_set_aside(tmp_path: Path) -> None:
    text = json.dumps(run()) + "\n\n" + "[1]\n" + json.dumps(run(run_id="b"))[:40]
    entries = read_runs(write(tmp_path / "runs.jsonl", text)).quarantine
    assert list(entries["line"]) == [3, 4]
    assert "this is a JSON list" in entries["rule"].iloc[0]
    assert "killed writer" in entries["advice"].iloc[1]


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (r'"\ud83d"', "half of a surrogate pair"),
        ("1" * 5000, "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
    ],
)
def test_json_that_is_no_text_or_too_large_is_set_aside(
    value: str, rule: str, tmp_path: Path
) -> None:
    text = json.dumps(run(status_reason="\U0001f4a5")) + f'\n{{"status_reason": {value}}}\n'
    table = read_runs(write(tmp_path / "runs.jsonl", text))
    assert list(table.frame["status_reason"]) == ["\U0001f4a5"]
    assert list(table.quarantine["line"]) == [2]
    assert rule in table.quarantine["rule"].iloc[0]


def test_a_parquet_file_that_is_indexed_by_a_column(tmp_path: Path) -> None:
    path = tmp_path / "runs.parquet"
    pd.DataFrame([run(), run(run_id="b")]).set_index(["run_id", "family"]).to_parquet(path)
    assert list(read_runs(path).frame["run_id"]) == [run()["run_id"], "b"]


def test_broken_parquet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_runs(write(tmp_path / "runs.parquet", "PAR1 no more"))


def test_several_files_are_checked_as_one(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", HEADER + GOOD)
    second = write(tmp_path / "b.jsonl", json.dumps(run(run_id="b", param_convention="total")))
    assert len(read_runs(first, second)) == 2
    clash = write(tmp_path / "c.csv", HEADER + GOOD.replace("3.0", "3.5"))
    table = read_runs(first, second, clash)
    assert list(table.quarantine["file"]) == [str(first), str(clash)]
    with pytest.raises(SpecError, match="one or more paths, got none"):
        read_runs()


def test_concat_keeps_quarantines_and_finds_contradictions() -> None:
    first = make_table([run(), run(run_id="x", lr=-1)], source="first")
    second = make_table([run(run_id="b"), run(loss=3.5)], source="second")
    both = concat([first, second])
    assert list(both.frame["run_id"]) == ["b"]
    assert list(both.quarantine["file"]) == ["first", "first", "second"]
    mixed = make_table([run(run_id="c", param_convention="total")])
    with pytest.raises(DataError, match="mixed"):
        concat([first, mixed])


TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8
).filter(lambda text: text.strip() == text)
ROWS = st.lists(
    st.builds(
        run,
        lr=st.floats(1e-6, 0.5),
        loss=st.floats(1.5, 12.0),
        n_total=st.floats(1e8, 1e12),
        tokens=st.floats(1e8, 1e13),
        loss_se=st.none() | st.floats(0, 1),
        device=st.none() | TEXT,
        seed=st.none() | st.integers(0, 2**40),
        family=TEXT,
        vocab_size=st.integers(2**20, 2**30),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, suffix=st.sampled_from([".csv", ".parquet", ".jsonl"]))
def test_round_trip(rows: list[dict[str, Any]], suffix: str, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("trip") / f"runs{suffix}"
    table = make_table([row | {"run_id": f"r{i}"} for i, row in enumerate(rows)])
    table.write(path)
    again = read_runs(path)
    names = list(COLUMN_NAMES)
    pd.testing.assert_frame_equal(again.frame[names], table.frame[names], check_exact=True)
    assert again.data_hash == table.data_hash
    assert len(again.quarantine) == 0


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_round_trip_without_any_loss(suffix: str, tmp_path: Path) -> None:
    table = make_table([run(status="diverged", loss=None)])
    table.write(tmp_path / f"runs{suffix}")
    assert read_runs(tmp_path / f"runs{suffix}").data_hash == table.data_hash


def test_data_hash_sees_content_alone() -> None:
    rows = sweep()
    table = make_table(rows)
    assert make_table(rows[::-1]).data_hash == table.data_hash
    assert make_table([row | {"note": 1} for row in rows]).data_hash == table.data_hash
    rows[0]["loss"] += 1e-12
    assert make_table(rows).data_hash != table.data_hash


def test_unknown_suffix_to_write(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="by suffix"):
        make_table([run()]).write(tmp_path / "runs.xlsx")


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.csv"
    make_table([run()]).write(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left on device.*is as it was; make room"):
        make_table(sweep()).write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_for_real(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        make_table([run()]).write(place / "runs.csv")
        before = (place / "runs.csv").read_bytes()
        with pytest.raises(StorageError, match="No space left on device"):
            make_table(sweep()).write(place / "runs.csv")
        assert (place / "runs.csv").read_bytes() == before
        assert [p.name for p in place.iterdir()] == ["runs.csv"]
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        make_table([run()]).write(tmp_path / "none" / "runs.csv")


# What the runs can tell


def told(rows: list[dict[str, Any]]) -> str:
    return "\n".join(identifiability(make_table(rows)))


def test_a_full_sweep_lacks_only_divergence() -> None:
    diverged = run(run_id="d", lr=3e-2, status="diverged", loss=None)
    assert told([*sweep(), diverged]) == ""
    assert told(sweep()) == "no run diverged: where divergence begins is the prior's"


def test_one_size_only() -> None:
    rows = [row for row in sweep() if row["n_active"] == 1e8]
    assert "one model size only (n_active 100M): the size exponent is the prior's" in told(rows)


def test_one_token_count_and_one_batch_only() -> None:
    rows = [row for row in sweep() if row["tokens"] == 2e9 and row["batch_tokens"] == 2**17]
    text = told(rows)
    assert "one token count only (2B): the token exponent is the prior's" in text
    assert "one batch size only (131.1K tokens): the batch exponent is the prior's" in text


def test_a_name_loses_the_nul_that_no_saved_fit_could_hold() -> None:
    assert make_table([run(family="a\0b\0")]).frame["family"].tolist() == ["ab"]


def test_values_that_differ_by_rounding_alone_are_one() -> None:
    """Token counts of whole batches, and widths that nearly keep a sparsity, tell no exponent."""
    rows = [
        run(run_id=f"r{n}{lr}", n_active=n, n_total=round(8.02 * n), lr=lr, batch_tokens=b,
            tokens=math.ceil(5e9 / b) * b)
        for n, b in ((1e8, 2**17), (2e8, 2**18), (4e8, 2**22)) for lr in (1e-3, 2e-3, 4e-3)
    ]  # fmt: skip
    rows.append(run(run_id="more", n_active=8e8, n_total=6.4e9, tokens=5e9, batch_tokens=2**17))
    text = told(rows)
    assert "one token count only (5B): the token exponent is the prior's" in text
    assert "one sparsity only (n_active / n_total = 0.125)" in text
    assert "token count and" not in text


def test_more_experts_alone_tell_no_exponent_of_size() -> None:
    rows = [row | {"n_active": 1e8, "n_total": 8 * row["n_active"]} for row in sweep()]
    assert "one model size only (n_active 100M): the size exponent is the prior's" in told(rows)


def test_pruned_runs_tell_what_they_tell_a_fit() -> None:
    text = told([row | {"status": "pruned"} for row in sweep()])
    assert "no run has a loss" not in text
    assert text == told([row | {"status": "partial"} for row in sweep()])


def test_size_and_tokens_move_together() -> None:
    rows = [
        run(run_id=f"r{i}{lr}", n_active=n, n_total=n, tokens=20 * n, lr=lr, batch_tokens=b)
        for i, (n, b) in enumerate([(1e8, 2**17), (2e8, 2**18), (4e8, 2**17), (8e8, 2**17)])
        for lr in (1e-3, 2e-3, 4e-3)
    ]
    assert "size and token count move together (correlation 1.000)" in told(rows)


def test_one_sparsity_only() -> None:
    rows = [row | {"n_total": 8 * row["n_active"]} for row in sweep()]
    assert "one sparsity only (n_active / n_total = 0.125)" in told(rows)


def test_one_lr_only_in_every_slice() -> None:
    rows = [row for row in sweep() if row["lr"] == 1e-3]
    assert "one LR only in every slice: nothing is known of the best LR but the prior" in told(rows)


def test_one_lr_below_those_that_diverged_is_bounded() -> None:
    rows = [row for row in sweep() if row["lr"] == 1e-3]
    hot = [
        row | {"run_id": f"hot{i}", "lr": 1e-2, "loss": None, "status": "diverged"}
        for i, row in enumerate(rows)
    ]
    bound = "nothing is known of the best LR but the prior and the bound by diverged runs"
    assert bound in told(rows + hot)
    assert bound not in told(rows)


def test_two_lrs_in_every_slice() -> None:
    rows = [row for row in sweep() if row["lr"] <= 1e-3]
    assert "fewer than 3 LRs in every slice: the curvature of the valley is the prior's" in told(
        rows
    )


def test_optimum_at_an_edge() -> None:
    rows = [row for row in sweep() if row["lr"] <= 2e-3]
    text = told(rows)
    assert "in 8 of 8 slices the best LR is the highest that was tried" in text
    assert "try higher LRs there" in text
    diverged = [r | {"lr": 4e-3, "status": "diverged", "run_id": r["run_id"] + "d"} for r in rows]
    assert "highest" not in told(rows + diverged)  # the side is closed by divergence


def test_checkpoints_of_ended_runs_count_once_and_show_no_blind_spot() -> None:
    rows = sweep()
    early = [
        row | {"tokens": row["tokens"] / 10, "status": "partial", "loss": 3.0 - row["lr"]}
        for row in rows
    ]
    assert "the best LR is the highest" not in told(rows + early)
    counted, alone = describe(make_table(rows + early)), describe(make_table(rows))
    assert counted["flops"] == alone["flops"]
    assert counted["families"][0]["slices"] == alone["families"][0]["slices"]


def test_all_runs_diverged() -> None:
    rows = [row | {"status": "diverged", "loss": None} for row in sweep()]
    assert told(rows).startswith("all runs diverged: they bound the LR from above")


def test_no_run_with_a_loss() -> None:
    assert "no run has a loss" in told([run(status="lost", loss=None)])


def test_several_families_are_told_apart() -> None:
    rows = [*sweep(), *(r | {"family": "g", "run_id": r["run_id"] + "g"} for r in sweep()[:5])]
    text = told(rows)
    assert "family g: one model size only" in text
    assert "family f: one model size only" not in text


def test_lr_group_forgives_rounding() -> None:
    lr = np.array([0.000345, 0.0003453, 0.000488, 0.0221, 0.0220971])
    assert list(lr_group(lr)) == [0, 0, 1, 2, 2]
    rows = [run(run_id=str(i), lr=v, loss=3 + i / 10) for i, v in enumerate(lr)]
    table = make_table(rows)
    assert list(table.frame["lr"]) == list(lr)
    assert describe(table)["families"][0]["lrs_per_slice"] == [3.0, 3.0]


def test_a_diverged_run_belongs_to_the_slice_it_was_planned_for() -> None:
    early = run(run_id="d", status="diverged", loss=None, tokens=1e6, planned_tokens=2e9, lr=1e-2)
    facts = describe(make_table([run(), early]))["families"][0]
    assert (facts["slices"], facts["lrs_per_slice"]) == (1, [2.0, 2.0])


def decayed(*pairs: tuple[float, float], **changes: Any) -> list[dict[str, Any]]:
    """Runs of one slice by LR and weight decay."""
    return [
        run(run_id=f"w{i}{changes}", lr=lr, weight_decay=w, **changes)
        for i, (lr, w) in enumerate(pairs)
    ]


def test_what_differs_beside_the_lr_is_described_and_what_it_cannot_tell() -> None:
    usual = [(lr, 0.1) for lr in (5e-4, 1e-3, 2e-3)]
    one_lr = decayed(*usual, (1e-3, 0.3), (1e-3, 0.03))
    family = describe(make_table(one_lr))["families"][0]
    assert family["covariates"] == {"weight_decay": [0.03, 0.1, 0.3]}
    assert "weight_decay differs (0.03 to 0.3) within slices, with one LR at each" in told(one_lr)
    assert "weight_decay" not in told(decayed(*usual, (1e-3, 0.3), (5e-4, 0.3)))

    between = decayed(*usual) + decayed(*((lr, 0.2) for lr, _ in usual), tokens=4e9)
    assert describe(make_table(between))["families"][0]["covariates"] == {}
    assert "weight_decay differs (0.1 to 0.2) between slices and within none" in told(between)

    stated = [run(run_id="m", lr_multiplier_router=4.0), run(run_id="n", lr=2e-3)]
    family = describe(make_table(stated))["families"][0]
    assert family["covariates"] == {"lr_multiplier_router": [1.0, 4.0]}


def test_describe_is_json() -> None:
    facts = describe(make_table([*sweep(), run(run_id="l", status="lost", loss=None)]))
    json.dumps(facts, allow_nan=False)
    family = facts["families"][0]
    assert (family["shapes"], family["cells"], family["slices"]) == (2, 4, 8)
    assert family["status"] == {"ok": 40, "lost": 1}
    assert facts["flops"] == pytest.approx(
        sum(6 * r["n_active"] * r["tokens"] for r in sweep()) + 1.2e18
    )


def test_one_count_of_an_moe_model_is_not_proposed_for_its_active_parameters() -> None:
    """Whoever followed it would have a table of dense models."""
    counts = ["n_active", "n_total"]
    assert likely_headers(counts, ["n_params"]) == dict.fromkeys(counts, "n_params")
    assert likely_headers(counts, ["n_params", "num_experts"]) == {"n_total": "n_params"}
    assert likely_headers(["n_active"], ["n_params", "topk"]) == {}
    told = {"n_active": "active_params", "n_total": "total_params"}
    assert likely_headers(counts, [*told.values(), "num_experts"]) == told


def test_nearest_header() -> None:
    headers = ["Name", "config.optimizer.learning_rate", "Val Loss", "n_actve"]
    assert nearest("lr", headers) == "config.optimizer.learning_rate"
    assert nearest("loss", headers) == "Val Loss"
    assert nearest("n_active", headers) == "n_actve"
    assert nearest("tokens", headers) is None


def test_empty_table_has_the_quarantine_columns() -> None:
    assert tuple(RunTable(pd.DataFrame()).quarantine.columns) == QUARANTINE_COLUMNS


@pytest.mark.parametrize("broken", ["half", "none"])
def test_a_hundred_thousand_rows_in_a_few_seconds(broken: str) -> None:
    import time

    num = 100_000
    frame = pd.DataFrame(run(), index=range(num)).assign(run_id=[f"r{i}" for i in range(num)])
    frame["lr"] = np.geomspace(1e-4, 1e-2, num)
    if broken == "half":
        frame["loss"] = frame["loss"].astype(object)
        frame.loc[frame.index[::2], "loss"] = "n/k"
    start = time.perf_counter()
    table = make_table(frame)
    # Measured 0.6 to 1 s on one core; the bound allows for a busy machine.
    assert time.perf_counter() - start < 10
    assert len(table) == (num // 2 if broken == "half" else num)


def test_every_column_is_documented(root: Path) -> None:
    text = (root / "docs" / "run-table.md").read_text()
    missing = [c.name for c in COLUMNS if not re.search(rf"\b{c.name}\b", text)]
    assert missing == []
    required = re.findall(r"^\| \*\*(\w+)\*\*", text, flags=re.MULTILINE)
    assert required == [column.name for column in COLUMNS if column.required]
