"""From foreign columns to ours: ``ours=theirs``, ``ours=theirs*1e9``, constants, and guesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from bayeslr.errors import DataError, SpecError
from bayeslr.runs import (
    ALIASES,
    COLUMN_NAMES,
    COLUMNS,
    REQUIRED_NAMES,
    Rows,
    RunTable,
    likely_headers,
    make_table,
    numbers,
)
from bayeslr.units import parse_quantity

# Columns that rules look at without their being part of the run table.
KNOWN_EXTRAS = ("vocab_size",)
_COLUMNS = {column.name: column for column in COLUMNS}
_KINDS = {name: column.kind for name, column in _COLUMNS.items()} | dict.fromkeys(
    KNOWN_EXTRAS, "number"
)


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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where every column comes from: what the user said, then what the tool's names suggest.

    guessed: columns found by their names alone. doubts: what is doubtful of them, and why a column
    that bears such a name was refused, in sentences by column. place: the file.
    """

    sources: dict[str, Source]
    constants: dict[str, str | float]
    guessed: dict[str, Source]
    place: str
    doubts: dict[str, str]
    warnings: tuple[str, ...] = ()

    def values(self, name: str, frame: pd.DataFrame) -> pd.Series[Any]:
        """A column as it will be imported; all missing if it has no source."""
        if name in self.constants:
            return pd.Series([self.constants[name]] * len(frame), index=frame.index, dtype=object)
        source = self.sources.get(name) or self.guessed.get(name)
        if source is None:
            return pd.Series(np.full(len(frame), None, dtype=object), index=frame.index)
        return _product(frame, source)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What an import would do, without any check of the rows.

    mapped: our column to their text, as ``--map`` takes it. missing: required columns that have no
    source yet. proposals: ``ours=theirs`` for some of those.
    """

    head: pd.DataFrame
    mapped: dict[str, str]
    missing: tuple[str, ...]
    proposals: tuple[str, ...]


class MissingColumns(DataError):
    """Required columns have no source; ``preview`` shows what has one."""

    def __init__(self, message: str, preview: Preview) -> None:
        super().__init__(message)
        self.preview = preview


def plan(
    rows: Rows,
    *,
    names: Mapping[str, str],
    measured: Mapping[str, str] | None = None,
    family: str | None,
    mapping: Sequence[str],
    constants: Sequence[str],
) -> Plan:
    """Plan of an import from a tracker, whose column names depend on its user.

    names: header by the name to look at, as from `look_names`. measured: the same for what a run
    measures, where the tool keeps that apart from what was set.
    """
    headers = [str(name) for name in rows.frame.columns]
    sources = parse_mapping(mapping, headers, rows.place)
    fixed = parse_constants(constants)
    warnings = []
    if family is not None:
        fixed["family"] = family
    elif "family" not in sources and "family" not in fixed:
        fixed["family"] = Path(rows.place).stem
        warnings.append(f"no --family was given: all runs are of family {fixed['family']!r}")
    known = [*sources, *fixed]
    guessed, doubts = guess(rows.frame, names, measured or names, known)
    return Plan(
        sources={name: source for name, source in sources.items() if name not in fixed},
        constants=fixed,
        guessed=guessed,
        place=rows.place,
        doubts=doubts,
        warnings=tuple(warnings),
    )


def finish(rows: Rows, made: Plan, given: Mapping[str, pd.Series[Any] | str]) -> RunTable:
    """Checked table. given: columns that the importer made itself; the user's word goes first.

    Raises: MissingColumns that names the required columns without a source.
    """
    own = {n: v for n, v in given.items() if n not in made.sources and n not in made.constants}
    guessed = {name: source for name, source in made.guessed.items() if name not in own}
    sources = {**guessed, **made.sources}
    doubts = {name: text for name, text in made.doubts.items() if name not in own}
    foreign = [name for name in doubts if name not in sources]
    mapped = apply(rows, sources, made.constants, own, foreign)
    known = [*own, *sources, *made.constants]
    missing = [name for name in REQUIRED_NAMES if name not in known]
    if missing:
        headers = [str(name) for name in rows.frame.columns]
        likely = propose(headers, known)
        flags = " ".join(f"--map {text}" for text in likely)
        told = f"Perhaps {flags}. " if flags else ""
        ours = [n for n in COLUMN_NAMES if n in known]
        told_by = {**dict.fromkeys(own, "as the export tells it"), **sources, **made.constants}
        seen = Preview(
            head=mapped.frame[ours].head(5), mapped={n: str(told_by[n]) for n in ours},
            missing=tuple(missing), proposals=tuple(likely),
        )  # fmt: skip
        raise MissingColumns(
            f"{made.place} gives no {', '.join(missing)}. {told}Name a column with --map "
            "ours=theirs (batch_tokens=batch_size*seq_len multiplies), or a value that all runs "
            f"share with --set ours=value. Its columns: {', '.join(headers)}",
            seen,
        )
    warnings = [*made.warnings, *doubts.values()]
    if guessed:
        pairs = ", ".join(f"{name} from {str(source)!r}" for name, source in guessed.items())
        warnings.append(f"taken by name: {pairs}; --map overrules")
    return make_table(mapped, warnings=warnings)


def look_names(headers: Sequence[str], prefixes: Sequence[str] = ()) -> dict[str, str]:
    """Header by the name to look at: without the prefix, and its last part where that is unique.

    ``optimizer.learning_rate`` is also looked at as ``learning_rate``. Of two headers that become
    one name, the one whose prefix comes first in ``prefixes`` is meant.
    """
    names: dict[str, str] = {}
    for prefix in (*prefixes, ""):
        for header in headers:
            if header.startswith(prefix):
                names.setdefault(header.removeprefix(prefix), header)
    last = [(name.replace("/", ".").rpartition(".")[2], header) for name, header in names.items()]
    parts = [part for part, _ in last]
    for part, header in last:
        if parts.count(part) == 1:
            names.setdefault(part, header)
    return names


def statuses(
    states: pd.Series[Any], words: Mapping[str, str], loss: pd.Series[Any]
) -> tuple[pd.Series[Any], pd.Series[Any]]:
    """Status and reason of each run from the tool's state and the loss.

    A loss written as NaN or infinity is divergence, whatever the state; a state that is not among
    ``words`` stays as it is, for the checks.
    """
    told = states.astype(object).where(states.notna(), "").astype(str).str.strip()
    status = told.str.lower().map(dict(words)).astype(object)
    status = status.where(status.notna(), told)
    cells = loss.astype(object).where(loss.notna(), "").astype(str).str.strip()
    blown = cells.str.lower().str.fullmatch(r"[+-]?(nan|inf|infinity)").astype(bool)
    reason = "state " + told
    return status.mask(blown, "diverged"), reason.mask(blown, "loss " + cells + ", state " + told)


# Measured by a run; all else was set before it.
_MEASURED = ("loss", "loss_se", "tokens", "flops", "wall_s")

# Names that go before our own: trackers call the loss of a training step just loss.
_BEFORE = {"loss": ("val_loss", "eval_loss", "validation_loss", "eval.loss", "val.loss")}


def guess(
    frame: pd.DataFrame, settings: Mapping[str, str], measured: Mapping[str, str],
    known: Sequence[str],
) -> tuple[dict[str, Source], dict[str, str]]:  # fmt: skip
    """Sources of our columns by the names that tools commonly use, and what is doubtful of them.

    Nothing is guessed by likeness. settings, measured: header by the name to look at, for what was
    set and for what a run measures. known: columns that need no source. Trackers log the LR of the
    step as well: of several LRs the largest is the peak, for schedules only lower it. An optional
    column whose cells are of another kind means something else. Returns: sources, and sentences, by
    column; a column with a sentence and no source was refused one.
    """
    found: dict[str, Source] = {}
    doubts: dict[str, str] = {}
    for name in _KINDS:
        if name in known:
            continue
        names = measured if name in _MEASURED else settings
        folded = {key.lower().replace("/", ".").replace("-", "_"): h for key, h in names.items()}
        aliases = (*_BEFORE.get(name, ()), name, *ALIASES.get(name, ()))
        headers = list(dict.fromkeys(folded[alias] for alias in aliases if alias in folded))
        if name == "lr" and len(headers) > 1:
            headers, doubt = _peak_first(frame, headers)
            doubts |= {name: doubt} if doubt else {}
        faults = {header: _fault(frame[header], name) for header in headers}
        fitting = [header for header, fault in faults.items() if not fault]
        if headers and (fitting or name in REQUIRED_NAMES):  # of which the checks tell all faults
            found[name] = Source(headers=((fitting or headers)[0],))
        elif headers:
            doubts[name] = f"{name} is not taken from {headers[0]!r}: {faults[headers[0]]}"
    if "top_k" in found and "n_experts" not in {*found, *known}:
        header = found.pop("top_k").headers[0]  # transformers tell that of their sampling
        doubts["top_k"] = (
            f"top_k is not taken from {header!r}: no column tells a number of experts. "
            f"--map top_k={header} if it is that of a router"
        )
    counts = [found.get(name) for name in ("n_active", "n_total")]
    if counts[0] is not None and counts[0] == counts[1] and _has_experts(frame, found, known):
        del found["n_active"]  # one count of an MoE model is its total; the active one is not told
    return found, doubts


def _fault(cells: pd.Series[Any], name: str) -> str:
    """Why no cell of a column that was found by its name can be ours; empty if one can."""
    column = _COLUMNS.get(name)
    if column is None:
        return ""
    if column.kind == "number":
        values, bad = numbers(cells)
        return (
            f"{cells[bad].iloc[0]!r} is no number" if bad.any() and np.isnan(values).all() else ""
        )
    told = cells[cells.notna() & (cells != "")]
    if not column.choices or column.open_choices or told.empty or told.isin(column.choices).any():
        return ""
    return f"{told.iloc[0]!r} is none of {', '.join(column.choices)}"


def _has_experts(frame: pd.DataFrame, found: Mapping[str, Source], known: Sequence[str]) -> bool:
    if {"n_experts", "top_k"} & set(known):
        return True
    source = found.get("n_experts")
    return source is not None and bool((numbers(frame[source.headers[0]])[0] > 1).any())


def _peak_first(frame: pd.DataFrame, headers: Sequence[str]) -> tuple[list[str], str]:
    """Columns of LRs, the largest first, and a sentence where they are not the same."""
    lrs = {header: numbers(frame[header])[0] for header in headers}
    median = {h: float(np.nanmedian(v)) if np.isfinite(v).any() else 0.0 for h, v in lrs.items()}
    ordered = sorted(headers, key=lambda header: -median[header])
    peak = lrs[ordered[0]]
    others = [h for h in ordered[1:] if not np.allclose(lrs[h], peak, rtol=1e-6, equal_nan=True)]
    if not others:
        return list(headers), ""
    differ = ", ".join(map(repr, others))
    return ordered, (
        f"lr is taken from {ordered[0]!r}, the largest, as the peak LR; {differ} "
        f"{'differs' if len(others) == 1 else 'differ'} from it, as the LR of a step does. "
        f"--map lr={others[0]} if that was the peak"
    )


def propose(headers: Sequence[str], known: Sequence[str]) -> list[str]:
    """``ours=theirs`` for required columns without a source, where a header looks like it."""
    wanted = [name for name in REQUIRED_NAMES if name not in known]
    return [f"{name}={header}" for name, header in likely_headers(wanted, headers).items()]


def apply(
    rows: Rows,
    sources: Mapping[str, Source],
    constants: Mapping[str, str | float],
    given: Mapping[str, pd.Series[Any] | str] = MappingProxyType({}),
    foreign: Sequence[str] = (),
) -> Rows:
    """Rows with our columns first; their other columns follow, ``theirs.`` before a taken name.

    foreign: names of ours that their columns bear and that are not ours.
    """
    columns: dict[str, Any] = dict(given)
    for name, source in sources.items():
        columns[name] = _product(rows.frame, source)
    for name, value in constants.items():
        columns[name] = pd.Series([value] * len(rows), index=rows.frame.index, dtype=object)
    taken = set(columns)
    copied = {
        source.headers[0] for name, source in sources.items()
        if len(source.headers) == 1 and source.factor == 1
        and name != "loss"  # the name of its column may tell its unit, which is checked
    }  # fmt: skip
    for header in rows.frame.columns:
        if header in taken or header in foreign:
            if sources.get(header) != Source(headers=(header,)):
                columns[f"theirs.{header}"] = rows.frame[header]
        elif header in _KINDS or header not in copied:  # n_active=n_total leaves n_total there
            columns[header] = rows.frame[header]
    return Rows(pd.DataFrame(columns), rows.place, rows.lines, rows.broken)


def _product(frame: pd.DataFrame, source: Source) -> pd.Series[Any]:
    """Product of the columns; a cell that is no finite number stays as it is, for the checks."""
    if len(source.headers) == 1 and source.factor == 1:
        return frame[source.headers[0]]
    product = np.full(len(frame), source.factor)
    text = pd.Series(np.full(len(frame), None, dtype=object), index=frame.index)
    for header in source.headers:
        values, bad = numbers(frame[header])
        product = product * values
        kept = bad | (~np.isfinite(values) & text.isna().to_numpy())  # NaN is no empty cell
        text = text.where(~kept, frame[header])
    result = pd.Series(product, index=frame.index).astype(object)
    return result.where(text.isna(), text)
