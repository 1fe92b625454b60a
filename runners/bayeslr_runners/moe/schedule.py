"""Learning-rate schedules as pure functions of tokens; the plan of a run's trunk and branches.

Under WSD one trunk is trained at the peak LR, and each horizon D of ``spec.decay_at`` branches off
it at (1 - decay_fraction) D and decays to ``final_lr_fraction`` at D. ``constant`` reads its
horizons off the trunk itself; ``cosine`` and ``linear`` decay over their one horizon from the end
of warmup.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bayeslr.errors import SpecError
from bayeslr.specs import RunSpec


@dataclass(frozen=True, slots=True)
class Horizon:
    """A token count at which the loss is measured.

    ``tokens`` is the count asked for, ``num_steps`` the optimizer steps nearest to it, and
    ``branch_step`` the step at which the run leaves the trunk (``num_steps`` if it never does).
    """

    tokens: int
    num_steps: int
    branch_step: int


def horizons(spec: RunSpec) -> tuple[Horizon, ...]:
    """Horizons of a run, shortest first.

    Raises: SpecError if the schedule has a single horizon and the spec names several, or if a
    horizon is shorter than a step.
    """
    if spec.batch_tokens % spec.seq_len:
        raise SpecError(
            f"run {spec.run_id}: batch_tokens ({spec.batch_tokens}) must be a multiple of seq_len "
            f"({spec.seq_len})"
        )
    if spec.schedule in ("cosine", "linear") and len(spec.decay_at) > 1:
        raise SpecError(
            f"run {spec.run_id}: schedule {spec.schedule!r} has one horizon, but decay_at is "
            f"{list(spec.decay_at)}; use 'wsd', or one run a token count"
        )
    found = []
    for tokens in spec.decay_at:
        num_steps = max(1, round(tokens / spec.batch_tokens))
        stable = (1.0 - spec.decay_fraction) * tokens
        branch = math.floor(stable / spec.batch_tokens) if spec.schedule == "wsd" else num_steps
        found.append(Horizon(tokens, num_steps, min(branch, num_steps)))
    steps = [h.num_steps for h in found]
    if len(set(steps)) < len(steps):
        raise SpecError(
            f"run {spec.run_id}: two of decay_at {list(spec.decay_at)} are less than one batch of "
            f"{spec.batch_tokens} tokens apart"
        )
    return tuple(found)


def trained_tokens(spec: RunSpec) -> int:
    """Tokens that a run passes through the network: its trunk and every decay branch."""
    plan = horizons(spec)
    branches = sum(h.num_steps - h.branch_step for h in plan)
    return (plan[-1].branch_step + branches) * spec.batch_tokens - spec.continues_at


def lr_factor(
    spec: RunSpec, tokens: float, horizon_tokens: float, *, decay_shape: str = "linear"
) -> float:
    """LR at a token count, as a share of the peak.

    Warmup rises linearly from 0 to 1 over ``warmup_tokens``. A training step takes the value at
    the middle of its tokens, so that the sum over steps is the integral over tokens.
    """
    warmup = min(1.0, tokens / spec.warmup_tokens) if spec.warmup_tokens else 1.0
    low = spec.final_lr_fraction
    if spec.schedule == "constant":
        return warmup
    if spec.schedule == "wsd":
        start = (1.0 - spec.decay_fraction) * horizon_tokens
        done = _share(tokens, start, horizon_tokens)
        left = 1.0 - math.sqrt(done) if decay_shape == "one_minus_sqrt" else 1.0 - done
    else:
        done = _share(tokens, spec.warmup_tokens, horizon_tokens)
        left = 0.5 * (1.0 + math.cos(math.pi * done)) if spec.schedule == "cosine" else 1.0 - done
    return warmup * (low + (1.0 - low) * left)


def _share(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def schedule_state(spec: RunSpec, tokens: float, horizon_tokens: float) -> str:
    """Where a token count lies: ``warmup``, ``stable``, ``decay`` or ``decayed`` (at its end)."""
    if tokens < spec.warmup_tokens:
        return "warmup"
    start = spec.warmup_tokens
    if spec.schedule == "wsd":
        start = math.floor((1.0 - spec.decay_fraction) * horizon_tokens)
    if spec.schedule == "constant" or tokens <= start:
        return "stable"
    return "decay" if tokens < horizon_tokens - spec.batch_tokens / 2 else "decayed"
