"""The run table: its columns, its checks, its quarantine, its files.

One row is one training run, or one checkpoint or decay branch of it. Rows that break a rule are set
aside with the file, line, column, value, rule and advice; they are never dropped or mended.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bayeslr.errors import DataError, SpecError, StorageError
from bayeslr.specs import PARAM_CONVENTIONS, SCHEDULES, WEIGHT_DECAY_KINDS
from bayeslr.units import format_quantity, train_flops

STATUSES = ("ok", "partial", "diverged", "failed", "lost", "pruned")
SUFFIXES = (".csv", ".parquet", ".jsonl")
QUARANTINE_COLUMNS = ("file", "line", "run_id", "column", "value", "rule", "advice")

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of the run table.

    kind: ``number`` (float64, NaN when missing) or ``text`` (object, None when missing).
    ``above`` and ``at_least`` are lower bounds, ``at_most`` an upper one. ``choices`` is a
    vocabulary; a value outside it is quarantined, or only warned of where ``open_choices``.
    ``aliases`` are names that other tools give the same thing.
    """

    name: str
    kind: str = "number"
    required: bool = False
    unit: str = ""
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    open_choices: bool = False
    aliases: tuple[str, ...] = ()


def _text(name: str, **settings: Any) -> Column:
    return Column(name=name, kind="text", **settings)


def _number(name: str, **settings: Any) -> Column:
    return Column(name=name, **settings)


COLUMNS: tuple[Column, ...] = (
    _text("run_id", required=True, aliases=("run", "name", "run_name", "exp_name", "id", "trial")),
    _text("family", required=True, aliases=("group", "series", "experiment", "sweep")),
    _text("arch", choices=("dense", "moe"), aliases=("architecture", "model_type")),
    _text("parametrization", aliases=("parameterization", "param")),
    _text("optimizer", aliases=("optim", "optimizer_name", "optimizer.name", "optimizer.type")),
    _text(
        "schedule",
        choices=SCHEDULES,
        open_choices=True,
        aliases=("lr_schedule", "scheduler", "lr_scheduler_type"),
    ),
    _number("warmup_tokens", unit="tokens", at_least=0),
    _number("decay_fraction", unit="share of the tokens", at_least=0, at_most=1),
    _number("final_lr_fraction", unit="share of the peak LR", at_least=0, at_most=1),
    _number(
        "lr",
        required=True,
        unit="peak LR",
        above=0,
        aliases=(
            "learning_rate",
            "peak_lr",
            "max_lr",
            "base_lr",
            "learning_rate_peak",
            "optimizer.learning_rate",
            "optimizer.lr",
            "eta",
        ),
    ),
    _number("weight_decay", at_least=0, aliases=("wd", "optimizer.weight_decay")),
    _text("weight_decay_kind", choices=WEIGHT_DECAY_KINDS, open_choices=True),
    _number(
        "n_active",
        required=True,
        unit="parameters",
        above=0,
        aliases=(
            "active_params",
            "active_parameters",
            "num_active_params",
            "n_params",
            "num_params",
            "params",
            "parameters",
            "parameter_count",
            "model_size",
        ),
    ),
    _number(
        "n_total",
        required=True,
        unit="parameters",
        above=0,
        aliases=("total_params", "total_parameters", "num_total_params", "parameter_count"),
    ),
    _text("param_convention", required=True, choices=PARAM_CONVENTIONS),
    _number("d_model", above=0, aliases=("hidden_size", "hidden_dim", "width", "n_embd")),
    _number("n_layers", above=0, aliases=("num_layers", "depth", "n_layer", "layers")),
    _number("n_experts", at_least=0, aliases=("num_experts", "experts")),
    _number("top_k", at_least=0, aliases=("num_experts_per_tok", "topk", "moe_top_k")),
    _number(
        "tokens",
        required=True,
        unit="tokens",
        above=0,
        aliases=(
            "total_tokens",
            "train_tokens",
            "tokens_seen",
            "num_tokens",
            "n_tokens",
            "throughput/total_tokens",
        ),
    ),
    _number("planned_tokens", unit="tokens", above=0, aliases=("max_tokens", "target_tokens")),
    _number(
        "batch_tokens",
        required=True,
        unit="tokens a step",
        above=0,
        aliases=(
            "batch_size_in_tokens",
            "tokens_per_batch",
            "global_batch_tokens",
            "batch_size_tokens",
            "tokens_per_step",
        ),
    ),
    _number("seq_len", unit="tokens", above=0, aliases=("sequence_length", "context_length")),
    _number(
        "loss",
        required=True,
        unit="nats a token",
        above=0,
        aliases=(
            "final_loss",
            "val_loss",
            "eval_loss",
            "train_loss",
            "eval/loss",
            "train/loss",
            "val/loss",
            "validation_loss",
            "cross_entropy",
        ),
    ),
    _text("loss_kind"),
    _number("loss_se", unit="nats a token", at_least=0, aliases=("loss_sd", "loss_std")),
    _text("status", required=True, choices=STATUSES, aliases=("state",)),
    _text("status_reason"),
    _number("seed"),
    _number("flops", unit="FLOPs", at_least=0, aliases=("total_flops", "train_flops", "compute")),
    _number("wall_s", unit="seconds", at_least=0, aliases=("runtime", "duration", "wall_time")),
    _text("device"),
    _text("source"),
    _text("created_at", aliases=("created", "start_time", "timestamp")),
)
COLUMN_NAMES = tuple(column.name for column in COLUMNS)
NUMBER_NAMES = tuple(column.name for column in COLUMNS if column.kind == "number")
REQUIRED_NAMES = tuple(column.name for column in COLUMNS if column.required)

# What rows of one run_id must share: they are checkpoints or decay branches of one training run.
RUN_KEYS = ("family", "lr", "n_active", "n_total", "batch_tokens")
# What makes two rows of one (run_id, tokens) the same measurement; a resumed run repeats its last.
_MEASURED = (*RUN_KEYS, "param_convention", "planned_tokens", "loss", "status")
SHAPE_KEYS = ("family", "n_active", "n_total", "d_model", "n_layers", "n_experts", "top_k")

_MISSING = frozenset({"", "na", "n/a", "null", "none", "<na>"})
_LN_2 = math.log(2.0)
# 1.2 ln(vocabulary) for a vocabulary of about 118,000: a loss above it is worse than guessing.
MAX_LOSS = 14.0
MIN_LOSS = 0.05


@dataclass(frozen=True)
class RunTable:
    """Accepted runs, with what was set aside and why.

    Attributes
    ----------
    frame
        Accepted rows. All columns of `COLUMNS` are there, numbers as float64 (NaN when missing),
        text as object (None when missing); columns that bayeslr does not know follow, as they were.
    quarantine
        One row for each rejected one: `QUARANTINE_COLUMNS`. ``line`` is 1-based; in Parquet and
        in memory it counts rows.
    warnings
        What was assumed or looks odd, in sentences.
    source
        Where the rows came from.
    """

    frame: pd.DataFrame
    quarantine: pd.DataFrame = field(default_factory=lambda: _empty_quarantine())
    warnings: tuple[str, ...] = ()
    source: str = ""

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def families(self) -> tuple[str, ...]:
        """Families in order of appearance."""
        return tuple(str(name) for name in self.frame["family"].unique())

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 of the canonical columns, whatever the order of the rows."""
        lines = sorted(_json_lines(self.frame[list(COLUMN_NAMES)]))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def write(self, path: str | Path) -> None:
        """Write the accepted rows as CSV, Parquet or JSON lines, by suffix, all or nothing.

        Raises: SpecError on another suffix; StorageError if the disk is full or not writable, in
        which case a file that was there before is as it was.
        """
        path = Path(path)
        write_atomically(path, _encode(self.frame, path))


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside ``path``, then rename. Raises: StorageError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; nothing was changed there. Free some "
            f"space or name another place, and repeat ({format_quantity(len(content))} bytes)"
        ) from error


def read_runs(*paths: str | Path) -> RunTable:
    """Read run tables (CSV, Parquet or JSON lines, by suffix) into one checked table.

    Raises: DataError if a file cannot be read, a required column is missing, parameter conventions
    are mixed, or no row is left.
    """
    if not paths:
        raise SpecError("read_runs needs at least one path")
    return _build([_read_raw(Path(path)) for path in paths], ", ".join(str(p) for p in paths))


def make_table(
    data: pd.DataFrame | Iterable[Mapping[str, Any]],
    *,
    source: str = "records",
    lines: Sequence[int] | NDArray[np.int64] | None = None,
    warnings: Sequence[str] = (),
) -> RunTable:
    """Check rows that are in memory already, exactly as `read_runs` does.

    source: what messages call the place. lines: 1-based place of each row in it (default: counted).
    """
    frame = data if isinstance(data, pd.DataFrame) else pd.DataFrame.from_records(list(data))
    numbers = np.arange(1, len(frame) + 1) if lines is None else np.asarray(lines, dtype=np.int64)
    raw = _Raw(frame=frame.reset_index(drop=True), file=source, lines=numbers)
    return _build([raw], source, warnings)


def concat(tables: Sequence[RunTable]) -> RunTable:
    """One table of several; runs that contradict each other across them are quarantined."""
    if not tables:
        raise SpecError("concat needs at least one table")
    parts = [
        _Raw(t.frame.reset_index(drop=True), t.source, np.arange(1, len(t) + 1)) for t in tables
    ]
    joined = _build(
        parts, ", ".join(t.source for t in tables), [w for t in tables for w in t.warnings]
    )
    earlier = [t.quarantine for t in tables if len(t.quarantine)]
    if not earlier:
        return joined
    quarantine = pd.concat([*earlier, joined.quarantine], ignore_index=True)
    return RunTable(joined.frame, quarantine, joined.warnings, joined.source)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


@dataclass
class _Raw:
    """Rows as they stand in one place, before any check. lines: 1-based, one a row."""

    frame: pd.DataFrame
    file: str
    lines: NDArray[np.int64]
    broken: list[dict[str, Any]] = field(default_factory=list)


def _read_raw(path: Path) -> _Raw:
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the run table in it (.csv, .parquet or .jsonl)")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: not even a header. Was the export interrupted?")
    readers: dict[str, Callable[[Path], _Raw]] = {
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: a run table ends in {', '.join(SUFFIXES)}, not {path.suffix or 'nothing'!r}"
        )
    raw = reader(path)
    if raw.frame.empty and not raw.broken:
        raise DataError(f"{path} has a header but no rows")
    return raw


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, with or without a byte order mark. Raises: DataError."""
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16 text; save it as UTF-8 (CSV UTF-8) and try again")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 text (byte 0x{content[error.start]:02x}); "
            "save it as UTF-8 and try again"
        ) from error


def read_csv_text(path: Path) -> tuple[pd.DataFrame, NDArray[np.int64], list[dict[str, Any]]]:
    """Cells of a comma-separated file as text, the 1-based line of each row, and broken lines.

    Raises: DataError if there is no header, or another separator is used.
    """
    text = read_text(path)
    header_line = text.split("\n", 1)[0]
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if separator in header_line and "," not in header_line:
            raise DataError(
                f"{path} is separated by {name}; save it with commas (and decimal points, "
                "not decimal commas)"
            )
    reader = csv.reader(io.StringIO(text, newline=""))
    rows: list[list[str]] = []
    lines: list[int] = []
    broken: list[dict[str, Any]] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        if not any(header):
            raise DataError(f"{path} has no header in its first line")
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DataError(f"{path}: the column {repeated[0]!r} is in the header more than once")
        start = reader.line_num + 1
        for row in reader:
            if len(row) == len(header):
                rows.append(row)
                lines.append(start)
            elif row:
                broken.append(
                    _broken_line(
                        path,
                        start,
                        ",".join(row),
                        f"a row has as many cells as the header ({len(header)}), got {len(row)}",
                        "mend the line: a comma inside a number or text needs quotes",
                    )
                )
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error
    frame = pd.DataFrame(rows, columns=pd.Index(header), dtype=object)
    return frame, np.asarray(lines, dtype=np.int64), broken


def _broken_line(path: Path, line: int, value: str, rule: str, advice: str) -> dict[str, Any]:
    shown = value if len(value) <= 80 else value[:77] + "..."
    return {
        "file": str(path),
        "line": line,
        "run_id": None,
        "column": None,
        "value": shown,
        "rule": rule,
        "advice": advice,
    }


def _read_csv(path: Path) -> _Raw:
    frame, lines, broken = read_csv_text(path)
    return _Raw(frame, str(path), lines, broken)


def _read_jsonl(path: Path) -> _Raw:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    broken: list[dict[str, Any]] = []
    # Not splitlines(): JSON text may hold U+2028 and others that it would take for line ends.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            record = None
            reason = f"not valid JSON ({error.msg})"
        else:
            reason = f"a JSON {type(record).__name__}"
        if isinstance(record, dict):
            records.append(record)
            lines.append(number)
        else:
            broken.append(
                _broken_line(
                    path,
                    number,
                    line,
                    f"a line is one JSON object, got {reason}",
                    "a torn last line is what a killed writer leaves: write the record again",
                )
            )
    frame = pd.DataFrame.from_records(records)
    return _Raw(frame, str(path), np.asarray(lines, dtype=np.int64), broken)


def _read_parquet(path: Path) -> _Raw:
    import pyarrow

    try:
        frame = pd.read_parquet(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); "
            "was the writer interrupted? Write it again, or give CSV or JSON lines"
        ) from error
    frame = frame.reset_index(drop=True)
    return _Raw(frame, str(path), np.arange(1, len(frame) + 1))


def _encode(frame: pd.DataFrame, path: Path) -> bytes:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        shown = frame.copy()
        for name in NUMBER_NAMES:  # 512, not 512.0
            shown[name] = _whole(shown[name])
        return shown.to_csv(index=False, lineterminator="\n").encode()
    if suffix == ".parquet":
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        return buffer.getvalue()
    if suffix == ".jsonl":
        return "".join(line + "\n" for line in _json_lines(frame)).encode()
    raise SpecError(f"{path}: a run table is written as {', '.join(SUFFIXES)}, by suffix")


def _whole(values: pd.Series[float]) -> pd.Series[Any]:
    """The column as integers if every number in it is whole and exact as such."""
    known = values.dropna()
    if len(known) and bool(((known % 1 == 0) & (known.abs() < 2**53)).all()):
        return values.astype("Int64")
    return values


def _json_lines(frame: pd.DataFrame) -> list[str]:
    """Rows as JSON objects without the missing values; floats in their shortest exact form."""
    names = list(frame.columns)
    columns = [_json_values(frame[name]) for name in names]
    return [
        json.dumps(
            {name: value for name, value in zip(names, row, strict=True) if value is not None},
            allow_nan=False,
            ensure_ascii=False,
        )
        for row in zip(*columns, strict=True)
    ]


def _json_values(values: pd.Series[Any]) -> list[Any]:
    if values.dtype.kind == "f":
        return [
            None if not math.isfinite(v) else int(v) if v.is_integer() and abs(v) < 2**53 else v
            for v in values.tolist()
        ]
    missing = values.isna()
    plain = [v if isinstance(v, bool | int | float | str) else str(v) for v in values.tolist()]
    return [None if gone else value for value, gone in zip(plain, missing, strict=True)]


# ---------------------------------------------------------------------------------------------
# From raw cells to typed columns
# ---------------------------------------------------------------------------------------------


class _Rejects:
    """The first broken rule of each row. mask arguments: (num_rows,)."""

    def __init__(self, num_rows: int) -> None:
        self.hit: Mask = np.zeros(num_rows, dtype=bool)
        self.column = np.full(num_rows, None, dtype=object)
        self.rule = np.full(num_rows, None, dtype=object)
        self.advice = np.full(num_rows, None, dtype=object)

    def add(self, mask: Mask, column: str, rule: str, advice: str) -> None:
        new = mask & ~self.hit
        if new.any():
            self.column[new], self.rule[new], self.advice[new] = column, rule, advice
            self.hit |= new


def _numbers(values: pd.Series[Any]) -> tuple[Floats, Mask]:
    """Numbers of a column and where text stands instead, both (num_rows,). Missing is NaN."""
    if values.dtype.kind in "fiu" and not pd.api.types.is_extension_array_dtype(values.dtype):
        return values.to_numpy(dtype=np.float64, copy=True), np.zeros(len(values), dtype=bool)
    known: dict[Any, float | None] = {}
    parsed = np.empty(len(values), dtype=np.float64)
    bad = np.zeros(len(values), dtype=bool)
    for i, value in enumerate(values.tolist()):
        key = (type(value), value) if isinstance(value, bool | int | float | str) else None
        number = known.get(key, _UNKNOWN) if key is not None else _UNKNOWN
        if number is _UNKNOWN:
            number = _parse_number(value)
            if key is not None:
                known[key] = number
        bad[i] = number is None
        parsed[i] = math.nan if number is None else number
    return parsed, bad


_UNKNOWN: Any = object()


def _parse_number(value: Any) -> float | None:
    """NaN if the cell is empty, None if it holds no number."""
    if isinstance(value, str):
        if value.strip().lower() in _MISSING:
            return math.nan
        try:
            return None if "_" in value else float(value)
        except ValueError:
            return None
    if isinstance(value, bool | np.bool_):
        return None
    if value is None or value is pd.NA or value is pd.NaT:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _texts(values: pd.Series[Any]) -> NDArray[np.object_]:
    """Text of a column, stripped; None where missing."""
    out = np.full(len(values), None, dtype=object)
    missing = values.isna().to_numpy()
    for i, value in enumerate(values.tolist()):
        if missing[i]:
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = str(value).strip()
        out[i] = text or None
    return out


def _extra(values: pd.Series[Any]) -> pd.Series[Any]:
    """A column that is not ours: numbers if all of it are, else text, JSON for nested values."""
    if values.dtype.kind in "fiub":
        return values
    parsed, bad = _numbers(values)
    if not bad.any() and not np.isnan(parsed).all():
        return pd.Series(parsed, index=values.index)
    nested = [json.dumps(v) if isinstance(v, dict | list) else v for v in values.tolist()]
    return pd.Series(_texts(pd.Series(nested, dtype=object)), index=values.index, dtype=object)


@dataclass
class _Typed:
    frame: pd.DataFrame
    rejects: _Rejects
    raws: list[_Raw]

    def place(self) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
        files = np.concatenate([np.full(len(r.frame), r.file, dtype=object) for r in self.raws])
        return files, np.concatenate([r.lines for r in self.raws])

    def raw_value(self, row: int, column: str) -> str:
        for raw in self.raws:
            if row < len(raw.frame):
                value = raw.frame[column].iloc[row] if column in raw.frame else None
                return "" if value is None or value is pd.NA else str(value)
            row -= len(raw.frame)
        raise IndexError(row)


def _type_columns(raws: list[_Raw], warnings: list[str]) -> _Typed:
    frames = []
    bad_numbers: dict[str, list[Mask]] = {name: [] for name in NUMBER_NAMES}
    for raw in raws:
        _require_columns(raw, warnings)
        columns: dict[str, Any] = {}
        for column in COLUMNS:
            num_rows = len(raw.frame)
            if column.name not in raw.frame:
                empty = math.nan if column.kind == "number" else None
                dtype = np.float64 if column.kind == "number" else object
                columns[column.name] = np.full(num_rows, empty, dtype=dtype)
                bad = np.zeros(num_rows, dtype=bool)
            elif column.kind == "number":
                columns[column.name], bad = _numbers(raw.frame[column.name])
            else:
                columns[column.name] = _texts(raw.frame[column.name])
            if column.kind == "number":
                bad_numbers[column.name].append(bad)
        if "status" not in raw.frame:
            columns["status"] = np.full(len(raw.frame), "ok", dtype=object)
        for name in raw.frame.columns:
            if name not in columns:
                columns[str(name)] = _extra(raw.frame[name])
        frames.append(pd.DataFrame(columns))
    frame = frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)
    for column in COLUMNS:
        if column.kind == "text":
            values = frame[column.name].astype(object)
            frame[column.name] = values.where(values.notna(), None)
    typed = _Typed(frame, _Rejects(len(frame)), raws)
    for name, masks in bad_numbers.items():
        _reject_text(typed, name, np.concatenate(masks))
    return typed


def _require_columns(raw: _Raw, warnings: list[str]) -> None:
    have = [str(name) for name in raw.frame.columns]
    missing = [name for name in REQUIRED_NAMES if name not in have]
    if "status" in missing:
        missing.remove("status")
        warnings.append(
            f"{raw.file} has no column status: every run is taken as ok. Runs that blew up belong "
            "in the table with status=diverged"
        )
    if not missing or (raw.frame.empty and raw.broken):
        return
    hints = [f"{name} is perhaps {near!r}" for name in missing if (near := nearest(name, have))]
    told = "; ".join(hints) + ". " if hints else ""
    raise DataError(
        f"{raw.file}: required column{'s' if len(missing) > 1 else ''} {', '.join(missing)} "
        f"missing. {told}Rename columns, or map them: bayeslr import csv FILE --map ours=theirs "
        "(--set column=value for constants). Exports of other tools: bayeslr import --help"
    )


def nearest(name: str, headers: Sequence[str]) -> str | None:
    """The header most likely to hold our column ``name``: an alias, or a near miss."""
    folded = {_fold(header): header for header in reversed(headers)}
    aliases = next(column.aliases for column in COLUMNS if column.name == name)
    for alias in (name, *aliases):
        if _fold(alias) in folded:
            return folded[_fold(alias)]
    for alias in (name, *aliases):  # config.optimizer.lr, summary/val/loss
        for header in headers:
            if _fold(header).endswith("." + _fold(alias)):
                return header
    close = get_close_matches(_fold(name), list(folded), n=1, cutoff=0.8)
    return folded[close[0]] if close else None


def _fold(name: str) -> str:
    return name.strip().lower().replace("/", ".").replace("-", "_").replace(" ", "_")


def _reject_text(typed: _Typed, name: str, bad: Mask) -> None:
    for row in np.flatnonzero(bad):
        value = typed.raw_value(int(row), name).strip()
        if "," in value:
            advice = "write it without thousands separators and with a decimal point"
        elif value[:1].isdigit() and value[-1:].upper() in tuple("KMBGT"):
            advice = "write the number itself, such as 1300000000 for 1.3B"
        else:
            advice = "give the number, or leave the cell empty if it is optional"
        mask = np.zeros(len(bad), dtype=bool)
        mask[row] = True
        typed.rejects.add(mask, name, f"{name} must be a number", advice)


# ---------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------


def _build(raws: list[_Raw], source: str, given_warnings: Sequence[str] = ()) -> RunTable:
    """Type, check and split the rows of several places."""
    warnings = list(dict.fromkeys(given_warnings))
    if not any(len(raw.frame) or raw.broken for raw in raws):
        raise DataError(f"{source}: no rows")
    typed = _type_columns(raws, warnings)
    frame, rejects = typed.frame, typed.rejects
    _check_presence(frame, rejects)
    _check_columns(frame, rejects, warnings)
    _check_loss(frame, rejects)
    _check_relations(frame, rejects)
    _check_units(frame, rejects)
    _check_duplicates(frame, rejects, warnings)
    _refuse_mixed_conventions(typed)
    quarantine = _quarantine(typed)
    accepted = frame.loc[~rejects.hit].reset_index(drop=True)
    if accepted.empty:
        raise DataError(
            f"{source}: no row is left, {len(quarantine)} rejected.\n{first_reasons(quarantine)}"
        )
    _derive(accepted)
    _warn_of_odd(accepted, warnings)
    return RunTable(accepted, quarantine, tuple(dict.fromkeys(warnings)), source)


def _status_is(frame: pd.DataFrame, *names: str) -> Mask:
    return frame["status"].isin(names).to_numpy()


def _missing(frame: pd.DataFrame, name: str) -> Mask:
    return frame[name].isna().to_numpy()


def _floats(frame: pd.DataFrame, name: str) -> Floats:
    return frame[name].to_numpy(dtype=np.float64)


def _check_presence(frame: pd.DataFrame, rejects: _Rejects) -> None:
    gone = _status_is(frame, "failed", "lost")  # a lost node may never have taken a step
    for name in REQUIRED_NAMES:
        if name == "loss":
            continue
        missing = _missing(frame, name)
        if name == "tokens":
            missing = missing & ~gone
        rejects.add(missing, name, f"{name} is required", "fill the cell")


def _check_columns(frame: pd.DataFrame, rejects: _Rejects, warnings: list[str]) -> None:
    gone = _status_is(frame, "failed", "lost")
    for column in COLUMNS:
        if column.kind == "text":
            _check_choices(frame, column, rejects, warnings)
            continue
        if column.name == "loss":
            continue
        values = _floats(frame, column.name)
        unusable = np.isinf(values)
        bounds = ["finite"]
        if column.above is not None:
            low = values <= column.above
            if column.name == "tokens":
                low &= ~(gone & (values == 0))
            unusable |= low
            bounds.append(f"> {column.above:g}")
        if column.at_least is not None:
            unusable |= values < column.at_least
            bounds.append(f">= {column.at_least:g}")
        if column.at_most is not None:
            unusable |= values > column.at_most
            bounds.append(f"<= {column.at_most:g}")
        advice = (
            "use the peak LR itself, not its logarithm"
            if column.name == "lr"
            else f"give {column.unit or 'the value itself'}"
        )
        rejects.add(unusable, column.name, f"{column.name} must be {' and '.join(bounds)}", advice)


def _check_choices(
    frame: pd.DataFrame, column: Column, rejects: _Rejects, warnings: list[str]
) -> None:
    if not column.choices:
        return
    values = frame[column.name]
    foreign = values.notna().to_numpy() & ~values.isin(column.choices).to_numpy()
    if not foreign.any():
        return
    allowed = ", ".join(column.choices)
    if column.open_choices:
        names = sorted({str(value) for value in values[foreign]})
        warnings.append(
            f"{column.name} {names[0]!r} is none of {allowed}; {int(foreign.sum())} rows keep it "
            "as text"
        )
        return
    advice = {
        "status": "finished is ok, crashed is failed or lost, still running is partial, "
        "NaN is diverged",
        "param_convention": "non_embedding leaves out the embedding and output matrices, "
        "total counts all; convert the counts if they are neither",
    }.get(column.name, "use one of these words")
    rejects.add(foreign, column.name, f"{column.name} must be one of {allowed}", advice)


def _check_loss(frame: pd.DataFrame, rejects: _Rejects) -> None:
    loss = _floats(frame, "loss")
    measured = _status_is(frame, "ok", "partial")
    unmeasured = ~np.isfinite(loss)
    rejects.add(
        measured & unmeasured,
        "loss",
        "loss must be finite for status ok or partial",
        "if the run blew up give it status=diverged, if it died status=failed or lost",
    )
    rejects.add(
        np.isfinite(loss) & (loss <= 0),
        "loss",
        "loss must be > 0",
        "loss is nats a token, a cross-entropy: not its logarithm, not a reward, "
        "and 0 is what some tools write for a missing value",
    )
    frame.loc[unmeasured, "loss"] = math.nan
    kinds = frame["loss_kind"].fillna("").astype(str).str.lower()
    bits = kinds.str.contains(r"bits|bpb|bpc|(?:^|_)bit(?:_|$)").to_numpy()
    advice = f"multiply bits a token by ln 2 = {_LN_2:.4f}, bits a byte also by bytes a token"
    rejects.add(bits, "loss_kind", "loss must be in nats a token, not bits", advice)
    perplexity = kinds.str.contains("ppl|perplexity").to_numpy()
    rejects.add(
        perplexity,
        "loss_kind",
        "loss must be in nats a token, not perplexity",
        "take its natural logarithm",
    )
    vocabulary = (
        _numbers(frame["vocab_size"])[0] if "vocab_size" in frame else np.full(len(frame), np.nan)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        worst = np.where(vocabulary > 1, 1.2 * np.log(vocabulary), MAX_LOSS)
    rejects.add(
        _status_is(frame, "ok") & (loss > worst),
        "loss",
        "loss of an ok run is not far above ln(vocabulary), what guessing costs",
        "did it diverge? Then status=diverged. Or is the loss a sum, or a perplexity?",
    )
    rejects.add(
        measured & (loss < MIN_LOSS),
        "loss",
        f"loss of a language model is not below {MIN_LOSS} nats a token",
        "is it another metric, or the 0 that some tools write for infinity? "
        "A run that blew up has status=diverged",
    )


def _check_relations(frame: pd.DataFrame, rejects: _Rejects) -> None:
    lr, n_active, n_total = (_floats(frame, c) for c in ("lr", "n_active", "n_total"))
    rejects.add(
        n_active > n_total,
        "n_active",
        "n_active must not exceed n_total",
        "are the two swapped, or counted by different conventions? Dense: both equal",
    )
    rejects.add(
        (frame["arch"] == "dense").to_numpy() & (n_active != n_total),
        "arch",
        "n_active equals n_total for arch=dense",
        "give arch=moe, or the same count twice",
    )
    tokens, planned, batch, seq_len = (
        _floats(frame, c) for c in ("tokens", "planned_tokens", "batch_tokens", "seq_len")
    )
    horizon = np.where(np.isnan(planned), tokens, planned)
    gone = _status_is(frame, "failed", "lost")
    measured = _status_is(frame, "ok", "partial")
    rejects.add(
        (np.where(measured, tokens, horizon) < batch) & ~(gone & np.isnan(planned)),
        "tokens",
        "tokens must not be below batch_tokens",
        "both count tokens: did you mean billions of tokens?",
    )
    rejects.add(
        tokens > planned + batch,
        "planned_tokens",
        "planned_tokens must not be below tokens",
        "planned_tokens is the whole run, tokens what was seen when loss was measured",
    )
    rejects.add(
        batch < seq_len,
        "batch_tokens",
        "batch_tokens must not be below seq_len",
        "batch_tokens counts tokens: multiply the number of sequences by seq_len",
    )
    optimizer = frame["optimizer"].fillna("").astype(str).str.lower()
    sgd = optimizer.str.contains("sgd").to_numpy()
    rejects.add(
        (lr > 1) & ~sgd,
        "lr",
        "a peak LR above 1 is suspicious",
        "is it a multiplier of a base LR, or a percentage? Give the peak LR itself",
    )
    adam = (optimizer.str.contains("adam") | (optimizer == "")).to_numpy()
    rejects.add(
        (lr < 1e-7) & adam,
        "lr",
        "a peak LR below 1e-7 is suspicious with Adam",
        "is it the final LR, or in other units? Give the peak LR itself",
    )


def _check_units(frame: pd.DataFrame, rejects: _Rejects) -> None:
    """Counts in millions or billions. Judged against each other: real proxies can be tiny."""
    n_active, tokens, planned, batch = (
        _floats(frame, c) for c in ("n_active", "tokens", "planned_tokens", "batch_tokens")
    )
    horizon = np.where(np.isnan(planned), tokens, planned)
    whole = _status_is(frame, "ok") | ~np.isnan(planned)
    few_tokens = (horizon < 1e6) & ((n_active >= 1e7) | (horizon < 2e-2 * n_active))
    rejects.add(
        (few_tokens | (horizon < 1e-3 * n_active)) & whole,
        "tokens",
        "tokens counts tokens, and these are too few for the model",
        "did you mean billions? Give 4000000000, not 4",
    )
    few_params = (n_active < 1e3) | ((n_active < 1e4) & (horizon >= 1e9))
    rejects.add(
        few_params | (horizon > 1e6 * n_active),
        "n_active",
        "n_active counts parameters, and these are too few for the tokens",
        "did you mean millions or billions? Give 1300000000, not 1.3",
    )
    rejects.add(
        (n_active >= 1e7) & ((batch < 512) | (horizon > 1e7 * batch)),
        "batch_tokens",
        "batch_tokens counts tokens a step, and these are too few for the model",
        "did you mean sequences? Multiply them by seq_len",
    )


def _check_duplicates(frame: pd.DataFrame, rejects: _Rejects, warnings: list[str]) -> None:
    """A row is known by run_id, tokens, and whether it is the end of the run or a checkpoint."""
    good = frame.loc[~rejects.hit]
    if not good["run_id"].duplicated().any():
        return
    mask = np.zeros(len(frame), dtype=bool)
    distinct = good.groupby("run_id", sort=False)[list(RUN_KEYS)].nunique(dropna=False)
    torn = distinct.index[(distinct > 1).any(axis=1)]
    mask[good.index[good["run_id"].isin(torn)]] = True
    rejects.add(
        mask,
        "run_id",
        f"duplicated run_id: rows of one run agree in {', '.join(RUN_KEYS)}",
        "give each run its own run_id",
    )
    good = frame.loc[~rejects.hit]
    key = good[["run_id", "tokens"]].assign(checkpoint=(good["status"] == "partial"))
    again = key.duplicated(keep=False)
    same = good.loc[again, ["run_id", "tokens", *_MEASURED]].duplicated(keep="first")
    repeats = same.index[same]
    if len(repeats):
        mask = np.zeros(len(frame), dtype=bool)
        mask[repeats] = True
        rejects.add(
            mask,
            "run_id",
            "a row stands once: this one repeats an earlier row of the run, which is kept",
            "nothing to do, or remove the repetition",
        )
        warnings.append(
            f"{len(repeats)} row{'s' if len(repeats) > 1 else ''} repeat an earlier one "
            f"(run_id {frame['run_id'].iloc[int(repeats[0])]!r}); the first of each is kept"
        )
    good = frame.loc[~rejects.hit]
    key = good[["run_id", "tokens"]].assign(checkpoint=(good["status"] == "partial"))
    clash = key.duplicated(keep=False)
    mask = np.zeros(len(frame), dtype=bool)
    mask[good.index[clash]] = True
    rejects.add(
        mask,
        "run_id",
        "duplicated run_id: one run has one result at one token count",
        "they contradict each other: keep the right one, or give each run its own run_id",
    )


def _refuse_mixed_conventions(typed: _Typed) -> None:
    used = typed.frame["param_convention"].where(~typed.rejects.hit)
    kinds = list(dict.fromkeys(used.dropna()))
    if len(kinds) < 2:
        return
    files, lines = typed.place()
    row = int(np.flatnonzero((used == kinds[1]).to_numpy())[0])
    counts = [int((used == kind).sum()) for kind in kinds[:2]]
    raise DataError(
        f"parameter conventions are mixed: {kinds[0]} in {counts[0]} rows, {kinds[1]} in "
        f"{counts[1]} (first in {files[row]}, line {lines[row]}). "
        "A law in N holds for one way of counting: convert n_active and n_total of the one to the "
        "other (add or subtract embedding and output matrices), or fit them apart"
    )


def _quarantine(typed: _Typed) -> pd.DataFrame:
    rejects = typed.rejects
    files, lines = typed.place()
    rows = [
        {
            "file": files[row],
            "line": int(lines[row]),
            "run_id": typed.frame["run_id"].iloc[row],
            "column": rejects.column[row],
            "value": typed.raw_value(int(row), rejects.column[row]),
            "rule": rejects.rule[row],
            "advice": rejects.advice[row],
        }
        for row in np.flatnonzero(rejects.hit)
    ]
    rows += [entry for raw in typed.raws for entry in raw.broken]
    if not rows:
        return _empty_quarantine()
    table = pd.DataFrame(rows, columns=pd.Index(QUARANTINE_COLUMNS))
    return table.sort_values(["file", "line"], kind="stable", ignore_index=True)


def _empty_quarantine() -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=object) for name in QUARANTINE_COLUMNS})


def first_reasons(quarantine: pd.DataFrame, limit: int = 3) -> str:
    """The most frequent reasons of a quarantine, one a line, each with its first place."""
    groups = quarantine.groupby(["column", "rule"], sort=False, dropna=False)
    reasons = sorted(groups, key=lambda item: -len(item[1]))
    shown = []
    for _, rows in reasons[:limit]:
        first = rows.iloc[0]
        shown.append(
            f"  {len(rows)} row{'s' if len(rows) > 1 else ''}: {first['rule']}, got "
            f"{first['value']!r} ({first['file']}, line {first['line']}); {first['advice']}"
        )
    if len(reasons) > limit:
        rest = sum(len(rows) for _, rows in reasons[limit:])
        shown.append(f"  {rest} more for {len(reasons) - limit} other reasons")
    return "\n".join(shown)


def _default_flops(frame: pd.DataFrame) -> pd.Series[float]:
    n_active, tokens = frame["n_active"].to_list(), frame["tokens"].to_list()
    flops = [train_flops(n, t) for n, t in zip(n_active, tokens, strict=True)]
    return pd.Series(flops, index=frame.index, dtype=np.float64)


def _derive(frame: pd.DataFrame) -> None:
    dense = (frame["n_active"] == frame["n_total"]).to_numpy()
    derived = pd.Series(np.where(dense, "dense", "moe"), index=frame.index, dtype=object)
    frame["arch"] = frame["arch"].where(frame["arch"].notna(), derived)
    frame["flops"] = frame["flops"].fillna(_default_flops(frame))


def _warn_of_odd(frame: pd.DataFrame, warnings: list[str]) -> None:
    done = frame[(frame["status"] == "ok") & (frame["n_active"] >= 1e7)]
    if len(done) and float(done["loss"].median()) < 1.3:
        warnings.append(
            f"the median loss is {done['loss'].median():.3g}: that is usual for bits a byte and "
            "low for nats a token. Losses must be in nats a token"
        )
    kinds = frame.groupby("family", sort=False)["loss_kind"].nunique()
    warnings.extend(
        f"family {family} mixes loss kinds; losses of different kinds are not comparable: "
        "give each its own family"
        for family in kinds.index[kinds > 1]
    )


# ---------------------------------------------------------------------------------------------
# What the runs can tell
# ---------------------------------------------------------------------------------------------


def lr_group(lr: Floats) -> NDArray[np.int64]:
    """Codes, from the lowest LR up, of the LRs that are one but for rounding (within 2 %).

    For grouping alone: tables write one LR as 0.000345 and as 0.0003453. lr: (num_runs,).
    """
    values, where = np.unique(np.asarray(lr, dtype=np.float64), return_inverse=True)
    codes = np.zeros(len(values), dtype=np.int64)
    start, code = -math.inf, -1
    for i, value in enumerate(values):
        if value > 1.02 * start:
            start, code = value, code + 1
        codes[i] = code
    return codes[where]


def _with_groups(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with integer columns shape, cell and slice; failed and lost runs left out.

    A diverged run belongs to the token count that it was meant to reach.
    """
    told = frame[~frame["status"].isin(["failed", "lost"])].copy()
    planned = (told["status"] == "diverged") & told["planned_tokens"].notna()
    told["horizon"] = told["tokens"].where(~planned, told["planned_tokens"])
    told["shape"] = told.groupby(list(SHAPE_KEYS), dropna=False, sort=False).ngroup()
    told["cell"] = told.groupby(["shape", "horizon"], dropna=False, sort=False).ngroup()
    told["slice"] = told.groupby(["cell", "batch_tokens"], sort=False).ngroup()
    told["lr_code"] = lr_group(told["lr"].to_numpy(dtype=np.float64))
    return told


def describe(table: RunTable) -> dict[str, Any]:
    """Counts of what is in the table, by family (JSON-safe)."""
    grouped = _with_groups(table.frame)
    families = []
    for family in table.families:
        rows = table.frame[table.frame["family"] == family]
        told = grouped[grouped["family"] == family]
        per_slice = told.groupby("slice")["lr_code"].nunique()
        families.append(
            {
                "family": family,
                "rows": len(rows),
                "runs": int(rows["run_id"].nunique()),
                "status": {s: int(n) for s, n in rows["status"].value_counts().items()},
                "arch": sorted(set(rows["arch"])),
                "shapes": int(told["shape"].nunique()),
                "cells": int(told["cell"].nunique()),
                "slices": int(told["slice"].nunique()),
                "lrs_per_slice": _span(per_slice),
                "n_active": _span(rows["n_active"]),
                "n_total": _span(rows["n_total"]),
                "tokens": _span(rows["tokens"]),
                "batch_tokens": _span(rows["batch_tokens"]),
                "lr": _span(rows["lr"]),
                "loss": _span(rows["loss"]),
                "flops": float(rows["flops"].sum()),
            }
        )
    return {
        "source": table.source,
        "rows": len(table),
        "param_convention": str(table.frame["param_convention"].iloc[0]),
        "flops": float(table.frame["flops"].sum()),
        "data_hash": table.data_hash,
        "families": families,
    }


def _span(values: pd.Series[Any]) -> list[float] | None:
    known = values.dropna()
    return [float(known.min()), float(known.max())] if len(known) else None


def identifiability(table: RunTable) -> list[str]:
    """What these runs cannot tell, in sentences; whatever is named stays as the prior has it."""
    grouped = _with_groups(table.frame)
    several = len(table.families) > 1
    told: list[str] = []
    for family in table.families:
        prefix = f"family {family}: " if several else ""
        told += [prefix + text for text in _blind_spots(grouped[grouped["family"] == family])]
    return told


def _blind_spots(rows: pd.DataFrame) -> list[str]:
    measured = rows[rows["status"].isin(["ok", "partial"]) & rows["loss"].notna()]
    if measured.empty:
        if (rows["status"] == "diverged").any():
            return [
                "all runs diverged: they bound the LR from above, and the rest is the prior's; "
                "add runs at lower LRs"
            ]
        return ["no run has a loss: the fit would only repeat the prior"]
    cells = measured.drop_duplicates(["cell", "batch_tokens"])
    told = [*_scale_blind_spots(cells), *_lr_blind_spots(rows, measured)]
    if not (rows["status"] == "diverged").any():
        told.append("no run diverged: where divergence begins is the prior's")
    return told


def _scale_blind_spots(cells: pd.DataFrame) -> list[str]:
    told = []
    num_values = {c: cells[c].nunique() for c in ("n_active", "n_total", "tokens", "batch_tokens")}
    if num_values["n_active"] == 1 and num_values["n_total"] == 1:
        told.append(
            f"one model size only (n_active {format_quantity(cells['n_active'].iloc[0])}): the "
            "size exponent is the prior's"
        )
    if num_values["tokens"] == 1:
        told.append(
            f"one token count only ({format_quantity(cells['tokens'].iloc[0])}): the token "
            "exponent is the prior's"
        )
    if num_values["batch_tokens"] == 1:
        told.append(
            f"one batch size only ({format_quantity(cells['batch_tokens'].iloc[0])} tokens): the "
            "batch exponent is the prior's"
        )
    sparsity = (cells["n_active"] / cells["n_total"]).round(6)
    if (sparsity < 1).any() and sparsity.nunique() == 1:
        told.append(
            f"one sparsity only (n_active / n_total = {sparsity.iloc[0]:.3g}): the sparsity "
            "exponent is the prior's"
        )
    pairs = (
        ("n_active", "tokens", "size and token count", "size and token exponents"),
        ("tokens", "batch_tokens", "token count and batch size", "token and batch exponents"),
        ("n_active", "batch_tokens", "size and batch size", "size and batch exponents"),
    )
    for first, second, words, exponents in pairs:
        if num_values[first] > 1 and num_values[second] > 1 and len(cells) > 2:
            correlation = float(
                np.corrcoef(np.log(_floats(cells, first)), np.log(_floats(cells, second)))[0, 1]
            )
            if abs(correlation) > 0.98:
                told.append(
                    f"{words} move together (correlation {correlation:.3f}): only a sum of the "
                    f"{exponents} is known, how it splits is the prior's"
                )
    return told


def _lr_blind_spots(rows: pd.DataFrame, measured: pd.DataFrame) -> list[str]:
    tried = measured.groupby("slice")["lr_code"].nunique()
    if int(tried.max()) == 1:
        return [
            "one LR only in every slice: nothing is known of the best LR but the prior; try at "
            "least 3 LRs in one slice"
        ]
    told = []
    if int(tried.max()) < 3:
        told.append(
            "fewer than 3 LRs in every slice: the curvature of the valley is the prior's; try at "
            "least 3 LRs in one slice"
        )
    best = measured.loc[measured.groupby("slice")["loss"].idxmin()].set_index("slice")["lr_code"]
    wide = tried.index[tried >= 3]
    if len(wide) == 0:
        return told
    lowest = rows.groupby("slice")["lr_code"].min()
    highest = rows.groupby("slice")["lr_code"].max()
    at_low = int((best.loc[wide] == lowest.loc[wide]).sum())
    at_high = int((best.loc[wide] == highest.loc[wide]).sum())
    for num, edge, side in ((at_low, "lowest", "lower"), (at_high, "highest", "higher")):
        if num:
            told.append(
                f"in {num} of {len(wide)} slices the best LR is the {edge} that was tried: the "
                f"optimum may lie {side}; try {side} LRs there"
            )
    return told
