"""The rules that the rows of a run table keep; a row that breaks one is set aside."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd

from bayeslr.errors import DataError
from bayeslr.runs.cells import Floats, Mask, Rejects, TypedRows, numbers
from bayeslr.runs.columns import COLUMNS, REQUIRED_NAMES, RUN_KEYS, Column
from bayeslr.specs import MAX_COUNT, too_few
from bayeslr.units import counted

# 1.2 ln(vocabulary) for a vocabulary of 118,000: a higher loss is worse than guessing.
MAX_LOSS = 14.0
MIN_LOSS = 0.05
# Our own trainer counts in the right units, and its proxies can be smaller than any rule of thumb.
TRUSTED_SOURCE = "bayeslr_runners"

_BITS = r"(?:^|[^a-z0-9])(?:bits?|bpb|bpc)(?:[^a-z]|$)"
_PERPLEXITY = r"(?:^|[^a-z])(?:ppl|perplexity)(?:[^a-z]|$)"


def apply_rules(typed: TypedRows, warnings: list[str]) -> None:
    """Set aside every row that breaks a rule.

    Raises: DataError if the rows that are left mix parameter conventions.
    """
    frame, rejects = typed.frame, typed.rejects
    _check_presence(frame, rejects)
    for column in COLUMNS:
        if column.kind == "text":
            _check_choices(frame, column, rejects, warnings)
        elif column.name != "loss":
            _check_bounds(frame, column, rejects)
    _check_loss(frame, rejects)
    _check_loss_unit(frame, rejects)
    _check_sizes(frame, rejects)
    _check_tokens(frame, rejects)
    _check_lr(frame, rejects)
    _check_units(frame, rejects)
    _check_runs(frame, rejects, warnings)
    _refuse_mixed_conventions(typed)


def _status_is(frame: pd.DataFrame, *names: str) -> Mask:
    return frame["status"].isin(names).to_numpy()


def _floats(frame: pd.DataFrame, *names: str) -> list[Floats]:
    return [frame[name].to_numpy(dtype=np.float64) for name in names]


def _folded(frame: pd.DataFrame, name: str) -> pd.Series[str]:
    return frame[name].fillna("").astype(str).str.lower()


def _check_presence(frame: pd.DataFrame, rejects: Rejects) -> None:
    gone = _status_is(frame, "failed", "lost")
    for name in REQUIRED_NAMES:
        if name == "loss":
            continue
        missing = frame[name].isna().to_numpy()
        if name == "tokens":  # a lost node may never have taken a step
            missing = missing & ~gone
        rejects.add(missing, name, f"{name} is required", "fill the cell")


def _check_choices(
    frame: pd.DataFrame, column: Column, rejects: Rejects, warnings: list[str]
) -> None:
    values = frame[column.name]
    foreign = values.notna().to_numpy() & ~values.isin(column.choices).to_numpy()
    if not column.choices or not foreign.any():
        return
    allowed = ", ".join(column.choices)
    if column.open_choices:
        names = sorted(set(values[foreign]))
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        warnings.append(
            f"{column.name} {names[0]!r}{more}: none of {allowed}; kept as text in "
            f"{int(foreign.sum())} rows"
        )
        return
    advice = {
        "status": "finished is ok, still running is partial, crashed is failed or lost, a loss "
        "that is NaN or blew up is diverged",
        "param_convention": "non_embedding leaves out the embedding and output matrices, total "
        "counts all; convert the counts if they are neither",
    }
    rejects.add(
        foreign,
        column.name,
        f"{column.name} must be one of {allowed}",
        advice.get(column.name, "use one of these words"),
    )


def _check_bounds(frame: pd.DataFrame, column: Column, rejects: Rejects) -> None:
    (values,) = _floats(frame, column.name)
    outside = np.isinf(values)
    if column.above is not None:
        outside |= values <= column.above
    if column.at_least is not None:
        outside |= values < column.at_least
    if column.at_most is not None:
        outside |= values > column.at_most
    if column.name == "tokens":
        outside &= ~(_status_is(frame, "failed", "lost") & (values == 0))
    advice = f"give {column.unit or 'the value itself'}"
    if column.name == "lr":
        advice = "give the peak LR itself, not its logarithm"
    rejects.add(outside, column.name, f"{column.name} must be {column.bounds}", advice)


def _check_loss(frame: pd.DataFrame, rejects: Rejects) -> None:
    (loss,) = _floats(frame, "loss")
    measured = _status_is(frame, "ok", "partial")
    rejects.add(
        measured & ~np.isfinite(loss),
        "loss",
        "loss must be finite for status ok or partial",
        "a run that blew up has status=diverged, one that died status=failed or lost",
    )
    rejects.add(
        np.isfinite(loss) & (loss <= 0),
        "loss",
        "loss must be > 0",
        "loss is a cross-entropy in nats a token: not its logarithm, and not the 0 that some "
        "tools write for a missing value",
    )
    rejects.add(
        measured & (loss < MIN_LOSS),
        "loss",
        f"a loss below {MIN_LOSS} nats a token is below any language's entropy",
        "is it another metric, or the 0 that some tools write for infinity? A run that blew up "
        "has status=diverged",
    )
    vocabulary = (
        numbers(frame["vocab_size"])[0] if "vocab_size" in frame else np.full(len(frame), math.nan)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        worst = np.where(vocabulary > 1, 1.2 * np.log(vocabulary), MAX_LOSS)
    rejects.add(
        _status_is(frame, "ok") & (loss > worst),
        "loss",
        "the loss of an ok run is not far above ln(vocabulary), which is what guessing costs",
        "if it blew up it has status=diverged; or is this a sum over tokens, or a perplexity?",
    )
    frame.loc[~np.isfinite(loss), "loss"] = math.nan


def _check_loss_unit(frame: pd.DataFrame, rejects: Rejects) -> None:
    """Not in nats: by the kind of loss, or by a column beside it that gives it away."""
    (loss,) = _floats(frame, "loss")
    kinds = _folded(frame, "loss_kind")
    in_bits = kinds.str.contains(_BITS).to_numpy()
    perplexity = kinds.str.contains(_PERPLEXITY).to_numpy()
    for name in frame.columns:
        if frame[name].dtype.kind not in "fiu":
            continue
        values = frame[name].to_numpy(dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            if re.search(_BITS, name.lower()):
                in_bits = in_bits | np.isclose(values, loss, rtol=1e-6, atol=0)
            elif re.search(_PERPLEXITY, name.lower()):
                in_bits = in_bits | np.isclose(np.log2(values), loss, rtol=2e-3, atol=0)
                perplexity = perplexity | np.isclose(values, loss, rtol=1e-6, atol=0)
    rejects.add(
        in_bits & np.isfinite(loss),
        "loss",
        "loss must be in nats a token, this is in bits",
        f"multiply bits a token by ln 2 = {math.log(2):.4f}, bits a byte also by bytes a token",
    )
    rejects.add(
        perplexity & np.isfinite(loss),
        "loss",
        "loss must be in nats a token, this is a perplexity",
        "take its natural logarithm",
    )


def _check_sizes(frame: pd.DataFrame, rejects: Rejects) -> None:
    for name in ("n_active", "n_total", "tokens", "planned_tokens", "batch_tokens"):
        rejects.add(
            frame[name].to_numpy() > MAX_COUNT,
            name,
            f"{name} must not exceed {MAX_COUNT:g}",
            "no model and no corpus is so large: was a factor of 1e9 applied twice?",
        )
    n_active, n_total = _floats(frame, "n_active", "n_total")
    rejects.add(
        n_active > n_total,
        "n_active",
        "n_active must not exceed n_total",
        "are the two swapped, or counted in different ways? A dense model has both equal",
    )
    rejects.add(
        (frame["arch"] == "dense").to_numpy() & (n_active != n_total),
        "arch",
        "arch=dense has n_active equal to n_total",
        "give arch=moe, or the same count twice",
    )


def _check_tokens(frame: pd.DataFrame, rejects: Rejects) -> None:
    tokens, planned, batch, seq_len = _floats(
        frame, "tokens", "planned_tokens", "batch_tokens", "seq_len"
    )
    gone = _status_is(frame, "failed", "lost")
    reached = np.where(_status_is(frame, "ok", "partial"), tokens, _horizon(frame))
    rejects.add(
        (reached < batch) & ~gone,
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
        "did you mean sequences? Multiply them by seq_len",
    )


def _horizon(frame: pd.DataFrame) -> Floats:
    tokens, planned = _floats(frame, "tokens", "planned_tokens")
    return np.where(np.isnan(planned), tokens, planned)


def _check_lr(frame: pd.DataFrame, rejects: Rejects) -> None:
    (lr,) = _floats(frame, "lr")
    optimizer = _folded(frame, "optimizer")
    rejects.add(
        (lr > 1) & ~optimizer.str.contains("sgd").to_numpy(),
        "lr",
        "a peak LR above 1 is not plausible",
        "is it a multiplier of a base LR, or a percentage? Give the peak LR itself",
    )
    rejects.add(
        (lr < 1e-7) & (optimizer.str.contains("adam") | (optimizer == "")).to_numpy(),
        "lr",
        "a peak LR below 1e-7 is not plausible with Adam",
        "is it the LR at the end of the schedule? Give the peak LR",
    )


def _check_units(frame: pd.DataFrame, rejects: Rejects) -> None:
    """Counts in thousands, millions or billions, judged against each other."""
    n_active, batch = _floats(frame, "n_active", "batch_tokens")
    few = too_few(n_active, _horizon(frame), batch)
    doubted = ~_folded(frame, "source").str.startswith(TRUSTED_SOURCE).to_numpy()
    # A run that stopped early has seen few tokens, which only planned_tokens would explain.
    whole = _status_is(frame, "ok") | frame["planned_tokens"].notna().to_numpy()
    rejects.add(
        few["tokens"] & whole & doubted,
        "tokens",
        "tokens counts tokens, and these are too few for the model",
        "did you mean billions? Give 4000000000, not 4",
    )
    rejects.add(
        few["n_active"] & doubted,
        "n_active",
        "n_active counts parameters, and these are too few for the tokens",
        "did you mean millions or billions? Give 1300000000, not 1.3",
    )
    rejects.add(
        few["batch_tokens"] & doubted,
        "batch_tokens",
        "batch_tokens counts tokens a step, and these are too few for the model",
        "did you mean sequences? Multiply them by seq_len",
    )


def _check_runs(frame: pd.DataFrame, rejects: Rejects, warnings: list[str]) -> None:
    """Rows of one run_id: checkpoints and decay branches of one run, each at its token count.

    A checkpoint (status partial) and the end of a decay branch may share a token count, and so may
    the end of one branch and the divergence of a longer one, told apart by planned_tokens.
    """
    good = frame.loc[~rejects.hit]
    if not good["run_id"].duplicated().any():
        return
    distinct = good.groupby("run_id", sort=False)[list(RUN_KEYS)].nunique(dropna=False)
    torn = distinct.index[(distinct > 1).any(axis=1)]
    rejects.add(
        _rows(frame, good.index[good["run_id"].isin(torn)]),
        "run_id",
        f"duplicated run_id: rows of one run agree in {', '.join(RUN_KEYS)}",
        "give each run its own run_id",
    )
    place = frame.loc[~rejects.hit, ["run_id", "tokens", "planned_tokens"]]
    place = place.assign(checkpoint=frame["status"] == "partial")
    # A resumed run reports its last measurement again, at another time and on another machine.
    result = ["loss", "status", "param_convention"]
    repeats = place.index[place.join(frame[result]).duplicated(keep="first")]
    rejects.add(
        _rows(frame, repeats),
        "run_id",
        "a result stands once: this row repeats an earlier one of its run, which is kept",
        "nothing to mend; remove the repetition if you like",
    )
    if len(repeats):
        verb = "repeats" if len(repeats) == 1 else "repeat"
        warnings.append(
            f"{counted(len(repeats), 'row')} {verb} an earlier one (the first "
            f"is of run_id {frame['run_id'].loc[repeats[0]]!r}); the earlier ones are kept"
        )
    left = place.drop(index=repeats)
    rejects.add(
        _rows(frame, left.index[left.duplicated(keep=False)]),
        "run_id",
        "duplicated run_id: one run has one result at one token count",
        "they contradict each other: keep the right one, or give each run its own run_id",
    )


def _rows(frame: pd.DataFrame, index: pd.Index) -> Mask:
    mask = np.zeros(len(frame), dtype=bool)
    mask[index.to_numpy(dtype=np.int64)] = True
    return mask


def _refuse_mixed_conventions(typed: TypedRows) -> None:
    used = typed.frame["param_convention"].where(~typed.rejects.hit)
    kinds = list(dict.fromkeys(used.dropna()))
    if len(kinds) < 2:
        return
    counts = [int((used == kind).sum()) for kind in kinds]
    part, position = typed.where(int(np.flatnonzero((used == kinds[1]).to_numpy())[0]))
    raise DataError(
        f"parameter conventions are mixed: {counts[0]} rows are {kinds[0]}, {counts[1]} are "
        f"{kinds[1]} (the first in {part.place}, line {part.lines[position]}). A law in the number "
        "of parameters holds for one way of counting them: convert n_active and n_total of the one "
        "(add or subtract the embedding and output matrices), or fit them apart"
    )
