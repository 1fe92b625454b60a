"""Any table of comma-separated values with one run a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bayeslr.errors import DataError
from bayeslr.importers.mapping import Preview, apply, parse_constants, parse_mapping, propose
from bayeslr.runs import COLUMN_NAMES, REQUIRED_NAMES, Rows, RunTable, make_table, read_csv


def read(
    path: str | Path,
    *,
    family: str | None = None,
    mapping: Sequence[str] = (),
    constants: Sequence[str] = (),
) -> RunTable:
    """Run table of a CSV.

    mapping: texts such as ``lr=learning_rate`` or ``tokens=tokens_b*1e9``; columns that bear our
    names need none. constants: texts such as ``param_convention=total``.
    Raises: DataError that proposes a mapping if a required column has no source.
    """
    rows, seen = _mapped(Path(path), family, mapping, constants)
    if seen.missing:
        flags = " ".join(f"--map {text}" for text in seen.proposals)
        told = f"Perhaps: {flags}. " if flags else ""
        raise DataError(
            f"{path} gives no {', '.join(seen.missing)}. {told}Name a column with --map "
            "ours=theirs, or a value that all runs share with --set ours=value"
        )
    return make_table(rows)


def preview(
    path: str | Path,
    *,
    family: str | None = None,
    mapping: Sequence[str] = (),
    constants: Sequence[str] = (),
    num_rows: int = 5,
) -> Preview:
    """First rows as they would be imported, and what is missing."""
    return _mapped(Path(path), family, mapping, constants, num_rows)[1]


def _mapped(
    path: Path,
    family: str | None,
    mapping: Sequence[str],
    constants: Sequence[str],
    num_rows: int = 0,
) -> tuple[Rows, Preview]:
    raw = read_csv(path)
    headers = [str(name) for name in raw.frame.columns]
    sources = parse_mapping(mapping, headers, str(path))
    fixed = parse_constants(constants) | ({} if family is None else {"family": family})
    sources = {name: source for name, source in sources.items() if name not in fixed}
    rows = apply(raw, sources, fixed)
    missing = [n for n in REQUIRED_NAMES if n not in rows.frame and n != "status"]
    free = [h for h in headers if h not in COLUMN_NAMES]
    known = [n for n in REQUIRED_NAMES if n not in missing]
    ours = [n for n in COLUMN_NAMES if n in rows.frame]
    mapped = {n: str(sources.get(n, fixed.get(n, n))) for n in ours}
    return rows, Preview(
        head=rows.frame[ours].head(num_rows),
        mapped=mapped,
        missing=tuple(missing),
        proposals=tuple(propose(free, known)),
    )
