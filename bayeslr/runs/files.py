"""Run tables on disk: read as they stand, written all or nothing."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bayeslr.errors import DataError, SpecError, StorageError
from bayeslr.runs.cells import Rows, broken_line
from bayeslr.runs.columns import COLUMN_NAMES, NUMBER_NAMES, REQUIRED_NAMES
from bayeslr.units import format_quantity

# A line before the header that tells Excel at which separator it is to split the rows.
_SEPARATOR_LINE = re.compile(r'"?sep=[,;\t]"?\r?')


def read_rows(path: Path) -> Rows:
    """Rows of a CSV, Parquet or JSON lines file, by suffix. Raises: DataError."""
    _require_file(path)
    readers: dict[str, Callable[[Path], Rows]] = {
        ".csv": read_csv,
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: a table ends in {', '.join(readers)}, not in {path.suffix or 'nothing'}"
        )
    return reader(path)


def quarantine_path(table: str | Path) -> Path:
    """Where the rows that were set aside from a table lie: beside it, under its name."""
    table = Path(table)
    return table.with_name(f"{table.name}.quarantine.csv")


def read_quarantine(table: str | Path) -> pd.DataFrame | None:
    """Rows that were set aside when a table was written, all as text; None if there are none.

    Raises: DataError where they cannot be read.
    """
    path = quarantine_path(table)
    if not path.exists():
        return None
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; remove it, or import again") from error


def read_csv(path: Path) -> Rows:
    """Cells of a comma-separated file, all as text.

    Raises: DataError if there is no header, no row, or another separator is used.
    """
    text = _read_text(path)
    first, _, rest = text.partition("\n")
    told = _SEPARATOR_LINE.fullmatch(first)
    header_line = rest.partition("\n")[0] if told else first
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if separator in header_line and "," not in header_line:
            raise DataError(
                f"{path} is separated by {name}; save it with commas between cells and points, "
                "not commas, in decimal numbers"
            )
    # Strict: a quote that is not closed would swallow the rows that follow.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    if told:
        next(reader)
    rows: list[list[str]] = []
    lines: list[int] = []
    broken: list[dict[str, Any]] = []
    start = 1
    try:
        header = _header(next(reader, []), path)
        start = reader.line_num + 1
        for row in reader:
            if len(row) == len(header):
                rows.append(row)
                lines.append(start)
            elif row:
                rule = f"a row has as many cells as the header, {len(header)}, this has {len(row)}"
                advice = "mend the line: a comma inside a number or a text needs quotes"
                broken.append(broken_line(str(path), start, ",".join(row), rule, advice))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, the row that begins in line {start}: not valid CSV: {error}. A quote opens a "
            "cell and closes it, and one within a cell stands twice"
        ) from error
    frame = pd.DataFrame(rows, columns=pd.Index(header), dtype=object)
    return _not_empty(Rows(frame, str(path), np.asarray(lines, dtype=np.int64), broken))


def _header(cells: list[str], path: Path) -> list[str]:
    """Column names; a repeated one that is not ours becomes ``name (2)``, none ``column 1``."""
    names = [name.strip() or f"column {i}" for i, name in enumerate(cells, start=1)]
    if not any(name.strip() for name in cells):
        raise DataError(f"{path} has no header in its first line")
    header: list[str] = []
    for name in names:
        if name in header and name in COLUMN_NAMES:
            raise DataError(f"{path}: the header has {name!r} twice; rename or remove one")
        header.append(
            f"{name} ({names[: len(header) + 1].count(name)})" if name in header else name
        )
    return header


def _read_jsonl(path: Path) -> Rows:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    broken: list[dict[str, Any]] = []
    # Not splitlines(): JSON text may hold U+2028 and others that it would take for line ends.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found = f"a JSON {type(record).__name__}"
            if "\\ud" in line.lower():  # half of a pair, as cutting a text leaves it, is no text
                json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            record, found = None, "no text: half of a surrogate pair, \\ud..., stands alone"
        except (ValueError, RecursionError) as error:  # too long a number, too deep a nesting
            record, found = None, f"no valid JSON ({getattr(error, 'msg', error)})"
        if isinstance(record, dict):
            records.append(record)
            lines.append(number)
        else:
            rule = f"a line is one JSON object, this is {found}"
            advice = "a killed writer leaves a torn last line: write the record again"
            broken.append(broken_line(str(path), number, line, rule, advice))
    frame = pd.DataFrame.from_records(records)
    return _not_empty(Rows(frame, str(path), np.asarray(lines, dtype=np.int64), broken))


def _read_parquet(path: Path) -> Rows:
    import pyarrow  # slow to load, and the other formats do without

    try:
        frame = pd.read_parquet(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); was its writer "
            "interrupted? Write it again, or give CSV or JSON lines"
        ) from error
    for name in frame.index.names:  # run_id, say, of a frame that was indexed by it
        if isinstance(name, str) and name not in frame:
            frame[name] = frame.index.get_level_values(name)
    frame = frame.reset_index(drop=True)
    return _not_empty(Rows(frame, str(path), np.arange(1, len(frame) + 1)))


def _not_empty(rows: Rows) -> Rows:
    if not len(rows) and not rows.broken:
        raise DataError(f"{rows.place} has a header but no rows; was the export interrupted?")
    return rows


def _require_file(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the file in it")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty, without even a header; was the export interrupted?")


def _read_text(path: Path) -> str:
    """Text of a UTF-8 file, with or without a byte order mark. Raises: DataError."""
    _require_file(path)
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16 text; save it as UTF-8 and try again")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8 text; save the "
            "file as UTF-8 and try again"
        ) from error


def encode(frame: pd.DataFrame, path: Path) -> bytes:
    """Content of a file for these rows, by its suffix. Raises: SpecError on another suffix."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        whole = {name: _whole(frame[name]) for name in NUMBER_NAMES if name in frame}
        return frame.assign(**whole).to_csv(index=False, lineterminator="\n").encode()
    if suffix == ".parquet":
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        return buffer.getvalue()
    if suffix == ".jsonl":
        return "".join(line + "\n" for line in json_lines(frame, keep=REQUIRED_NAMES)).encode()
    raise SpecError(f"{path}: a run table is written as .csv, .parquet or .jsonl, by suffix")


def _whole(values: pd.Series[float]) -> pd.Series[Any]:
    """The column as integers if every number in it is one: 512, not 512.0."""
    known = values.dropna()
    if len(known) and bool(((known % 1 == 0) & (known.abs() < 2**53)).all()):
        return values.astype("Int64")
    return values


def json_lines(frame: pd.DataFrame, keep: Sequence[str] = ()) -> list[str]:
    """Rows as JSON objects without the missing values; floats in their shortest exact form.

    keep: columns whose missing values stand as null, so that the column is there all the same.
    """
    names = list(frame.columns)
    columns = [_json_values(frame[name]) for name in names]
    return [
        json.dumps(
            {n: v for n, v in zip(names, row, strict=True) if v is not None or n in keep},
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


def json_text(document: Any, *, indent: int | None = None) -> str:
    """Valid JSON of a document that may hold tables (as lists of rows) and NumPy's numbers.

    Numbers keep all their digits; NaN, infinities and missing values are null; anything else is
    its text.
    """
    return json.dumps(_json_safe(document), indent=indent, allow_nan=False)


def _json_safe(value: Any) -> Any:
    if isinstance(value, pd.DataFrame):
        value = value.to_dict("records")
    elif isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _json_safe(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(entry) for entry in value]
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) else str(value)


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside ``path``, then rename; to a device or a pipe, as it is.

    Raises: StorageError if that fails; what was at ``path`` before is then as it was.
    """
    if path.is_dir():
        raise StorageError(f"cannot write {path}: it is a folder; name a file in it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():  # a device or a pipe must not be replaced
            path.write_bytes(content)
            return
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path} ({format_quantity(len(content))} bytes): "
            f"{error.strerror or error}. What was there before is as it was; make room or name "
            "another place, and repeat"
        ) from error
