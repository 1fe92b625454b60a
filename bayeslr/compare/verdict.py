"""One sentence: which paradigm served better here and why, or that the runs cannot tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bayeslr.compare.arms import FITTING, MODULES, TRANSFER, TWO_STAGE, Arm
from bayeslr.compare.scores import Difference, Estimate, Outcome
from bayeslr.units import format_quantity

PARADIGM = {FITTING: "Fitting", TRANSFER: "Transfer"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """winner: ``fitting``, ``transfer`` or None where the runs cannot tell."""

    winner: str | None
    sentence: str


def baseline(arm: str) -> str | None:
    """Arm that an arm is judged against; None for the one that all lead back to."""
    if arm == FITTING:
        return None
    return FITTING if arm in (TWO_STAGE, TRANSFER) else TRANSFER


def verdict(
    arms: Sequence[Arm], outcomes: Sequence[Outcome], differences: Mapping[str, Difference | None]
) -> Verdict:
    """Judge Transfer (one global LR) against Fitting (the Bayesian law).

    differences: by arm, that arm minus the one it is judged against: ``transfer`` minus
    ``fitting``, ``transfer, modules`` minus ``transfer``. A paradigm wins if runs at the other's
    choices diverged and all at its own ended well, else if the 90 % interval of the difference
    excludes zero; where there is no difference, that happens in 1 of 10 comparisons.
    """
    lost = {name: _diverged(outcomes, name) for name in (FITTING, TRANSFER)}
    compute = _compute(arms)
    winner, loser = (FITTING, TRANSFER) if lost[TRANSFER] else (TRANSFER, FITTING)
    if lost[loser] and _all_ended(outcomes, winner):
        text = (
            f"{PARADIGM[winner]} served better here ({compute}): {lost[loser]} of the held-out "
            f"runs at the LRs that {loser} chose diverged, none at those that {winner} chose"
        )
        return Verdict(winner=winner, sentence=f"{text}{_modules(differences, outcomes)}.")
    found = differences.get(TRANSFER)
    if found is None:
        text = (
            f"These runs cannot tell which paradigm served better ({compute}): at no target did "
            "the choices of both end well with every seed"
        )
        return Verdict(winner=None, sentence=f"{text}.")
    over = "" if len(found.targets) == 1 else f", mean over {len(found.targets)} targets"
    if not found.total.settled:
        interval = f" ({_interval(found.total)}{over})" if found.total.low is not None else ""
        seeds = "" if interval else "; one seed has no interval"
        text = (
            f"These runs cannot tell which paradigm served better ({compute}): at the chosen LRs "
            f"Transfer ended {_apart(found.total.value)} Fitting{interval}{seeds}"
        )
        return Verdict(winner=None, sentence=f"{text}{_modules(differences, outcomes)}.")
    winner = FITTING if found.total.value > 0 else TRANSFER
    text = (
        f"{PARADIGM[winner]} served better here ({compute}): its LRs ended "
        f"{abs(found.total.value):.4f} nats lower ({_interval(found.total, absolute=True)}{over}), "
        f"{_why(found, outcomes)}"
    )
    return Verdict(winner=winner, sentence=f"{text}{_modules(differences, outcomes)}.")


def _compute(arms: Sequence[Arm]) -> str:
    """What the proxies of both paradigms cost: either may end with some of its budget left."""
    spent = {arm.name: format_quantity(arm.proxy_flops) for arm in arms}
    fitting, transfer = spent[FITTING], spent[TRANSFER]
    if fitting == transfer:
        return f"with {fitting} FLOPs of proxies each"
    return f"with {fitting} FLOPs of proxies for Fitting and {transfer} for Transfer"


def _why(found: Difference, outcomes: Sequence[Outcome]) -> str:
    """Whether the LRs or the valleys made the difference, if that can be told.

    Where a valley's lowest loss is at the end of its LRs, its bottom lies lower still: that of the
    worse arm may be no higher than the other's, that of the better one no nearer to its choice.
    """
    sign = 1.0 if found.total.value > 0 else -1.0
    by_lr, by_valley = sign * found.by_regret.value, sign * found.by_valley.value
    parts = f"{_signed(by_lr)} through the LR, {_signed(by_valley)} through the valley"
    unsure = "whether by its LRs or by its valleys these runs do not say"
    if not (found.by_regret if by_lr >= by_valley else found.by_valley).settled:
        return f"{unsure} ({parts})"
    better, worse = (
        (found.second, found.first) if found.total.value > 0 else (found.first, found.second)
    )
    doubtful = better if by_lr >= by_valley else worse
    at_edge = [o for o in outcomes if o.arm == doubtful and o.target_id in found.targets]
    if any(outcome.beyond_edge for outcome in at_edge):
        return f"{unsure}: the best LR for {doubtful} may lie beyond those trained ({parts})"
    if by_lr >= by_valley:
        return f"because its LRs lay nearer to the bottom of their valleys ({parts})"
    return (
        "because networks under its parametrisation train better at their best LR, whatever was "
        f"chosen ({parts})"
    )


def _modules(differences: Mapping[str, Difference | None], outcomes: Sequence[Outcome]) -> str:
    if not any(outcome.arm == MODULES for outcome in outcomes):
        return ""
    found = differences.get(MODULES)
    if found is None:
        return "; with LRs module by module no target has runs of both that ended well"
    if found.total.value == 0:  # the runs of one valley at one LR
        return "; tuning the LR module by module on the base shape found nothing to change"
    if not found.total.settled:
        interval = f" ({_interval(found.total)})" if found.total.low is not None else ""
        return (
            "; whether tuning the LR module by module helps, they cannot tell: "
            f"{_apart(found.total.value)} one LR for all{interval}"
        )
    did = "made it worse by" if found.total.value > 0 else "gained"
    return (
        f"; tuning the LR module by module {did} {abs(found.total.value):.4f} nats against one "
        f"LR for all ({_interval(found.total, absolute=True)})"
    )


def _diverged(outcomes: Sequence[Outcome], arm: str) -> int:
    """Runs at an arm's choices that diverged."""
    return sum(state == "diverged" for o in outcomes if o.arm == arm for state in o.states)


def _all_ended(outcomes: Sequence[Outcome], arm: str) -> bool:
    """Whether every run at an arm's choices ended well."""
    return all(state == "ok" for o in outcomes if o.arm == arm for state in o.states)


def _interval(estimate: Estimate, *, absolute: bool = False) -> str:
    assert estimate.low is not None
    assert estimate.high is not None
    low, high = estimate.low, estimate.high
    if absolute:
        low, high = sorted((abs(low), abs(high)))
        return f"90 % interval {low:.4f} to {high:.4f}"
    return f"90 % interval {_signed(low)} to {_signed(high)}"


def _apart(difference: float) -> str:
    return f"{abs(difference):.4f} nats {'above' if difference > 0 else 'below'}"


def _signed(number: float) -> str:
    return f"{number:+.4f}".replace("-", "−")
