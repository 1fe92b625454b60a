"""Spikes of the training loss: how many, how high, how long until it was back."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Standard deviations above the smoothed loss that make a spike: if steps scattered normally, one
# step in 10^9 would be called one. Below two it is over.
HIGH_SD, BACK_SD = 6.0, 2.0
# Steps over which level and scatter are smoothed; the first ones are not judged. The scatter is
# that of successive steps, which a falling loss hardly adds to.
LEVEL_STEPS, SCATTER_STEPS, FIRST_STEPS = 10, 50, 30


@dataclass(slots=True)
class Spikes:
    """Follows the training loss step by step.

    height: of the highest spike, nats above the level before it. longest: steps of the longest
    one. steps_in_spike: of the one that is not over; level and scatter stand still meanwhile.
    """

    count: int = 0
    height: float = 0.0
    longest: int = 0
    steps_in_spike: int = 0
    level: float | None = None
    previous: float = 0.0
    variance: float = 0.0
    steps: int = 0

    def see(self, loss: float) -> None:
        """Take a step's loss in nats; losses that are not finite are for `divergence`."""
        if not math.isfinite(loss):
            return
        if self.level is None:
            self.level = self.previous = loss
        excess = loss - self.level
        scatter = math.sqrt(self.variance)
        self.steps += 1
        begins = self.steps > FIRST_STEPS and excess > HIGH_SD * scatter
        if self.steps_in_spike or begins:
            if self.steps_in_spike and excess < BACK_SD * scatter:
                self.steps_in_spike = 0
                self.previous = loss
                return
            self.count += not self.steps_in_spike
            self.steps_in_spike += 1
            self.height = max(self.height, excess)
            self.longest = max(self.longest, self.steps_in_spike)
            return
        self.level += excess / LEVEL_STEPS
        weight = 1 / min(self.steps, SCATTER_STEPS)
        self.variance += ((loss - self.previous) ** 2 / 2 - self.variance) * weight
        self.previous = loss

    def summary(self) -> dict[str, float]:
        """As a record's diagnostics say it."""
        return {"loss_spikes": self.count, "spike_height": self.height,
                "spike_steps": self.longest}  # fmt: skip
