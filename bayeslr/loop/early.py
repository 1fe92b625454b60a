"""Early ends: runs whose end no longer pays are stopped, their curve kept and used.

The likelihood gives a run less weight the farther it lies above its slice's floor, so one far above
it has less left to tell. What a run's end is worth at each excess, and what its FLOPs would buy
elsewhere, was worked out where the run was chosen (`Finishing`); as its losses come in, its excess
is read off the lowest of the runs of its shape and batch at the same tokens. It is stopped where
the end is worth less than its remaining FLOPs, and two of those runs surround the lowest, one of
them between it and this run in LR. So the lowest run and its neighbours always finish.
Only runs of earlier batches count: what a run is compared with does not depend on who is faster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bayeslr.finishing import Finishing
from bayeslr.runner_protocol import Trial
from bayeslr.specs import RunSpec
from bayeslr.units import counted_past, format_flops, format_quantity

if TYPE_CHECKING:
    from bayeslr.posterior import Posterior

EXCESS = 0.15
"""Nats above the slice's lowest loss where a run without a `Finishing` is stopped: one that no
posterior chose or could price, or that is asked for again. In the quickstart's proxies what is
stopped here ends at 0.13 or more (docs/log.md, early ends on the quickstart's curves)."""

GAIN_PER_OCTAVE = 0.0275
"""Nats that an LR an octave higher gains more by its decay: in those proxies 0.03 to 0.055 over two
octaves. The end of a run above the best LR is judged with all of it taken off."""

LEAST_SHARE = 0.2
"""Share of its tokens that a run is always given: before it, warm-up is not over."""


def hopeless(
    spec: RunSpec,
    rows: Sequence[Mapping[str, Any]],
    others: Sequence[Trial],
    finishing: Finishing | None = None,
) -> str:
    """Why a run with these records should be stopped; empty if it should go on."""
    own = _curve(spec, rows)
    if not own or own[-1][0] < LEAST_SHARE * spec.tokens:
        return ""
    tokens, loss = own[-1]
    seen: dict[float, float] = {}
    for trial in others:
        if trial.void or trial.spec.run_id == spec.run_id or not _comparable(spec, trial.spec):
            continue
        other = _loss_at(_curve(trial.spec, trial.records), tokens)
        if other is not None:
            seen[trial.spec.lr] = min(other, seen.get(trial.spec.lr, math.inf))
    if not seen:
        return ""
    best = min(seen, key=lambda lr: seen[lr])
    between = [lr for lr in seen if best < lr < spec.lr or spec.lr < lr < best]
    beyond = [lr for lr in seen if (lr - best) * (spec.lr - best) < 0]
    if not between or not beyond:
        return ""
    gap = loss - seen[best]
    why = f"{gap:.2f} nats above the run at LR {best:.3g} at {format_quantity(tokens)} tokens"
    if finishing is None:
        return why if gap > EXCESS else ""
    excess, share = final_excess(spec, gap, best, tokens), spec.share_at(tokens)
    if gap <= 0 or finishing.pays(excess, share):
        return ""
    left = finishing.remaining(share)
    elsewhere = f"; those save at least {format_quantity(finishing.rate * left)} elsewhere"
    return (
        f"{why}; finishing it would save {format_quantity(finishing.saves(excess))} FLOPs at the "
        f"targets and costs {format_quantity(left)}{elsewhere if finishing.rate != 1 else ''}"
    )


def final_excess(spec: RunSpec, gap: float, best_lr: float, tokens: float) -> float:
    """Least excess in nats that a run so far above the best LR's at so many tokens will end with.

    Too low an LR is late and catches up: of its gap at least about the share of the tokens that are
    done stays. Too high a one gains by its decay.
    """
    if spec.lr < best_lr:
        return gap * min(1.0, tokens / spec.tokens)
    return max(0.0, gap - GAIN_PER_OCTAVE * math.log2(spec.lr / best_lr))


def _comparable(spec: RunSpec, other: RunSpec) -> bool:
    """Whether two runs are of one slice; under WSD, of one trunk, whatever their horizons."""
    names = [
        "family", "n_active", "n_total", "batch_tokens", "schedule", "parametrization",
        "covariates",
    ]  # fmt: skip
    if spec.schedule != "wsd":
        names.append("tokens")
    return all(getattr(spec, name) == getattr(other, name) for name in names)


def _curve(spec: RunSpec, rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(tokens, loss) of a run's checkpoints; decayed losses only where all LRs decay alike."""
    kept = ("partial", "pruned") if spec.schedule == "wsd" else ("partial", "pruned", "ok")
    return sorted(
        (float(row["tokens"]), float(row["loss"]))
        for row in rows
        if row["status"] in kept and row.get("loss") is not None
    )


def _loss_at(curve: Sequence[tuple[float, float]], tokens: float) -> float | None:
    """Loss at a token count, linear in ln tokens; None outside the curve."""
    for (left, high), (right, low) in pairwise(curve):
        if left <= tokens <= right and left > 0:
            share = math.log(tokens / left) / math.log(right / left) if right > left else 0.0
            return high + share * (low - high)
    return curve[-1][1] if curve and curve[-1][0] == tokens else None


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyEnds:
    """Runs that were stopped early. FLOPs saved and spent by them; ``wrongful``: ids of those whose
    LR lies in the 90 % interval of their slice's optimum at their covariates, by the last fit.
    """

    runs: tuple[str, ...]
    saved_flops: float
    spent_flops: float
    wrongful: tuple[str, ...] = ()

    def line(self, flops_per_second: float | None = None) -> str:
        """For people; with GPU-hours where a rate is known."""
        text = (
            f"{counted_past(len(self.runs), 'run')} stopped early: "
            f"{format_flops(self.saved_flops, flops_per_second)} saved, "
            f"{format_flops(self.spent_flops, flops_per_second)} spent on them"
        )
        if self.wrongful:
            text += f"; by the last fit wrongly so: {', '.join(self.wrongful)}"
        return text


def early_ends(trials: Sequence[Trial], posterior: Posterior | None = None) -> EarlyEnds:
    """Savings of the runs that were stopped early; with a posterior, which stops were wrong."""
    stopped = [t for t in trials if t.state == "pruned" and not t.void and t.records]
    saved = spent = 0.0
    for trial in stopped:
        share = trial.spec.share_at(max(float(row["tokens"]) for row in trial.records))
        spent += trial.flops
        saved += trial.flops * (1.0 / share - 1.0)
    wrongful = () if posterior is None or not stopped else _wrongful(stopped, posterior)
    return EarlyEnds(
        runs=tuple(t.spec.run_id for t in stopped), saved_flops=saved, spent_flops=spent,
        wrongful=wrongful,
    )  # fmt: skip


def _wrongful(stopped: Sequence[Trial], posterior: Posterior) -> tuple[str, ...]:
    import numpy as np

    from bayeslr.covariates import lr_shifts
    from bayeslr.predict import target_draws
    from bayeslr.specs import Target

    slices = [
        Target(
            target_id=t.spec.run_id, family=t.spec.family, n_active=t.spec.n_active,
            n_total=t.spec.n_total, tokens=t.spec.tokens, batch_tokens=t.spec.batch_tokens,
            param_convention=t.spec.param_convention,
        )
        for t in stopped
    ]  # fmt: skip
    best = target_draws(posterior, slices).log_lr
    best = best - lr_shifts(posterior, slices, [t.spec.covariates for t in stopped], len(best))
    low, high = np.quantile(best, [0.05, 0.95], axis=0)
    log_lr = np.log([t.spec.lr for t in stopped])
    inside = (low <= log_lr) & (log_lr <= high)
    return tuple(t.spec.run_id for t, wrong in zip(stopped, inside, strict=True) if wrong)
