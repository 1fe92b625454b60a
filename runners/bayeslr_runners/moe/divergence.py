"""When a run counts as diverged, and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# Nats above the best smoothed loss that count as a blow-up. At the usual noise of a batch
# (0.1 nats and less) no healthy run comes near it.
SPIKE_NATS = 1.0
# Nats below the first step's loss that put a validation loss below that of the start, too, whatever
# the luck of the first batch.
CLEAR_NATS = 0.5
# Steps over which the training loss is smoothed.
SMOOTHING_STEPS = 10
# Smallest excess of the effective number of experts over top_k that is not a collapse.
COLLAPSE_RATIO = 1.1


@dataclass(slots=True)
class Watch:
    """Follows the training loss of a run, step by step.

    patience: steps that the smoothed loss must stay blown up; a spike that recovers in that time
    is no divergence.
    """

    patience: int
    first: float | None = None
    smoothed: float | None = None
    best: float = math.inf
    steps_blown_up: int = 0

    def see(self, loss: float, grad_norm: float) -> str | None:
        """Take a step's loss (nats) and gradient norm; the reason if the run has diverged."""
        if not math.isfinite(loss):
            return "non-finite loss"
        if not math.isfinite(grad_norm):
            return "non-finite gradient"
        if self.first is None or self.smoothed is None:
            self.first = self.smoothed = loss
        self.smoothed += (loss - self.smoothed) / SMOOTHING_STEPS
        self.best = min(self.best, self.smoothed)
        above = self.smoothed > self.best + SPIKE_NATS
        self.steps_blown_up = self.steps_blown_up + 1 if above else 0
        return "loss spike without recovery" if self.steps_blown_up >= self.patience else None

    def judge(self, val_loss: float, initial_loss: Callable[[], float]) -> str | None:
        """The reason if a loss measured at the end of a horizon is worse than at the start.

        initial_loss: measures the latter on the same windows, so that an LR too low to move the
        loss is not taken for one that is too high. Asked only where the first step's loss is near.
        """
        if not math.isfinite(val_loss):
            return "non-finite loss"
        if self.first is None or val_loss < self.first - CLEAR_NATS:
            return None
        return "final loss above the loss at initialisation" if val_loss > initial_loss() else None


def cause(reason: str, *, effective_experts: float | None, top_k: int, num_experts: int) -> str:
    """The reason, or ``expert collapse`` where one layer sends all its tokens to the same experts.

    effective_experts: least exp(entropy of the load) over layers; None without a router.
    """
    collapsed = (
        effective_experts is not None
        and top_k * COLLAPSE_RATIO < num_experts
        and effective_experts < top_k * COLLAPSE_RATIO
    )
    return f"expert collapse ({reason})" if collapsed else reason
