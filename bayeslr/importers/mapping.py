"""From foreign columns to ours: ``ours=theirs``, ``ours=theirs*1e9``, constants, and guesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import pandas as pd

from bayeslr.errors import SpecError
from bayeslr.runs import ALIASES, COLUMNS, REQUIRED_NAMES, Rows, nearest, numbers
from bayeslr.units import parse_quantity

# Columns that rules look at without their being part of the run table.
KNOWN_EXTRAS = ("vocab_size",)
_KINDS = {column.name: column.kind for column in COLUMNS} | dict.fromkeys(KNOWN_EXTRAS, "number")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where one of our columns comes from: the product of their columns and of a factor."""

    headers: tuple[str, ...]
    factor: float = 1.0

    def __str__(self) -> str:
        factor = () if self.factor == 1 else (f"{self.factor:g}",)
        return "*".join((*self.headers, *factor))


def parse_mapping(texts: Sequence[str], headers: Sequence[str], place: str) -> dict[str, Source]:
    """Sources by column from texts such as ``tokens=tokens_b*1e9`` or ``batch_tokens=bs*seq``.

    Raises: SpecError if a text is no assignment, or names a column that does not exist.
    """
    sources: dict[str, Source] = {}
    for text in texts:
        ours, theirs = _split(text, "--map")
        if theirs in headers:
            sources[ours] = Source(headers=(theirs,))
            continue
        factors = [_factor(part.strip(), headers, place) for part in theirs.split("*")]
        names = tuple(part for part in factors if isinstance(part, str))
        scale = float(np.prod([part for part in factors if isinstance(part, float)]))
        if not names:
            raise SpecError(f"--map {text}: names no column of {place}; a constant is --set {text}")
        if _KINDS[ours] == "text" and len(factors) > 1:
            raise SpecError(f"--map {text}: {ours} is text and cannot be multiplied")
        sources[ours] = Source(headers=names, factor=scale)
    return sources


def _split(text: str, flag: str) -> tuple[str, str]:
    ours, equals, theirs = (part.strip() for part in text.partition("="))
    if not equals or not ours or not theirs:
        raise SpecError(f"{flag} takes ours=theirs, got {text!r}")
    if ours not in _KINDS:
        close = get_close_matches(ours, _KINDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SpecError(
            f"{flag} {text}: {ours!r} is no column of the run table; {hint}"
            f"Columns are {', '.join(_KINDS)}"
        )
    return ours, theirs


def _factor(part: str, headers: Sequence[str], place: str) -> str | float:
    if part in headers:
        return part
    try:
        return parse_quantity(part)
    except SpecError:
        close = get_close_matches(part, headers, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"Columns are {', '.join(headers)}"
        raise SpecError(f"{place} has no column {part!r}; {hint}") from None


def parse_constants(texts: Sequence[str]) -> dict[str, str | float]:
    """Values by column from texts such as ``n_active=1.3B`` or ``param_convention=total``."""
    constants: dict[str, str | float] = {}
    for text in texts:
        ours, value = _split(text, "--set")
        if _KINDS[ours] == "text":
            constants[ours] = value
        else:
            zero = value.replace(".", "").strip("0") == ""  # weight_decay=0
            constants[ours] = 0.0 if zero else parse_quantity(value, name=f"--set {ours}")
    return constants


def guess(headers: Mapping[str, str], known: Sequence[str]) -> dict[str, Source]:
    """Sources of our columns by the names that tools commonly use; nothing is guessed by likeness.

    headers: their name in the file by the name to look at. known: columns that need no source.
    """
    folded = {name.lower().replace("/", ".").replace("-", "_"): h for name, h in headers.items()}
    found: dict[str, Source] = {}
    for name in _KINDS:
        if name in known:
            continue
        for alias in (name, *ALIASES.get(name, ())):
            if alias in folded:
                found[name] = Source(headers=(folded[alias],))
                break
    experts = {"n_experts", "top_k"} & (found.keys() | set(known))
    counts = [found.get(name) for name in ("n_active", "n_total")]
    if experts and counts[0] is not None and counts[0] == counts[1]:
        del found["n_active"]  # one count of an MoE model is its total; the active one is not told
    return found


def propose(headers: Sequence[str], known: Sequence[str]) -> list[str]:
    """``ours=theirs`` for required columns without a source, where a header looks like it."""
    likely = {n: nearest(n, headers) for n in REQUIRED_NAMES if n not in known}
    return [f"{name}={header}" for name, header in likely.items() if header is not None]


def apply(rows: Rows, sources: Mapping[str, Source], constants: Mapping[str, str | float]) -> Rows:
    """Rows with our columns first; their other columns follow, ``theirs.`` before a taken name."""
    columns: dict[str, Any] = {}
    for name, source in sources.items():
        columns[name] = _product(rows.frame, source)
    for name, value in constants.items():
        columns[name] = pd.Series([value] * len(rows), index=rows.frame.index, dtype=object)
    used = {s.headers[0] for s in sources.values() if len(s.headers) == 1 and s.factor == 1}
    for header in rows.frame.columns:
        if header in columns:
            if header not in used or sources.get(header) != Source(headers=(header,)):
                columns[f"theirs.{header}"] = rows.frame[header]
        elif header not in used:
            columns[header] = rows.frame[header]
    return Rows(pd.DataFrame(columns), rows.place, rows.lines, rows.broken)


def _product(frame: pd.DataFrame, source: Source) -> pd.Series[Any]:
    """Product of the columns; a cell that is no number stays as it stands, for the checks."""
    if len(source.headers) == 1 and source.factor == 1:
        return frame[source.headers[0]]
    product = np.full(len(frame), source.factor)
    text = pd.Series(np.full(len(frame), None, dtype=object), index=frame.index)
    for header in source.headers:
        values, bad = numbers(frame[header])
        product = product * values
        text = text.where(~bad, frame[header])
    result = pd.Series(product, index=frame.index).astype(object)
    return result.where(text.isna(), text)
