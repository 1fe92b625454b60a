"""What finishing a run is worth at the targets, by how far above its slice's floor it ends.

The table is made where a run is chosen, for only there is a posterior. It is plain numbers, so
that any worker that trains the run can weigh it again as its losses come in.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from bayeslr.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class Finishing:
    """What is expected of a run's end, and what its FLOPs would buy elsewhere.

    ``excess`` ascends, in nats above the floor; ``saves_flops`` are the FLOPs of the targets that
    the end then saves. ``rate`` is what a FLOP saves elsewhere at least: on the next best run, or
    kept; ``flops`` the price of the whole run.
    """

    excess: tuple[float, ...]
    saves_flops: tuple[float, ...]
    rate: float
    flops: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "excess", tuple(self.excess))
        object.__setattr__(self, "saves_flops", tuple(self.saves_flops))
        if not self.excess or len(self.excess) != len(self.saves_flops):
            raise SpecError(
                f"finishing: excess ({len(self.excess)} values) and saves_flops "
                f"({len(self.saves_flops)}) must be of one length, at least 1"
            )

    def saves(self, excess: float) -> float:
        """FLOPs saved at the targets by a run that ends so far up, linear between the table's."""
        place = bisect_right(self.excess, excess)
        if place in (0, len(self.excess)):
            return self.saves_flops[max(0, place - 1)]
        (left, right), (high, low) = (
            values[place - 1 : place + 1] for values in (self.excess, self.saves_flops)
        )
        return high + (excess - left) / (right - left) * (low - high)

    def remaining(self, share: float) -> float:
        """FLOPs that a run still costs with a share of its way, 0 to 1, behind it."""
        return (1.0 - share) * self.flops

    def pays(self, excess: float, share: float) -> bool:
        """Whether the end saves as much as its remaining FLOPs would elsewhere."""
        return self.saves(excess) >= self.rate * self.remaining(share)

    def document(self) -> dict[str, Any]:
        """JSON-safe form."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """Inverse of `document`."""
        return cls(**document)
