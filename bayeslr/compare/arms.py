"""An arm of the comparison: one way of choosing the LR of the held-out models, and its choices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

FITTING, TWO_STAGE = "fitting", "fitting, two-stage"
TRANSFER, MODULES, BLEND = "transfer", "transfer, modules", "transfer, posterior"

TOLD = {
    FITTING: "LR law fitted by the Bayesian model",
    TWO_STAGE: "parabolas and a power law by least squares, the same runs",
    TRANSFER: "one LR, tuned on the base shape and carried over unchanged",
    MODULES: "the same, with an LR multiplier for each module group",
    BLEND: "the transferred LR and a law, weighed by what they predict of larger rungs",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """An arm's LR for one target, and the 90 % interval of the optimum as the arm sees it.

    ``p_diverge`` is None where the arm does not say.
    """

    target_id: str
    lr: float
    lr_q05: float
    lr_q95: float
    p_diverge: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way of choosing.

    proxy_runs, proxy_flops: what it is charged for, shared runs in full. variant: the valley that
    its held-out runs lie on, a parametrisation with LR multipliers. note: what to know about it.
    """

    name: str
    parametrization: str
    choices: tuple[Choice, ...]
    proxy_runs: int
    proxy_flops: float
    multipliers: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def paradigm(self) -> str:
        """``fitting`` or ``transfer``."""
        return self.name.partition(",")[0]

    @property
    def variant(self) -> str:
        """Name of the valley."""
        if not self.multipliers:
            return self.parametrization
        return f"{self.parametrization} with module LRs"

    def lr(self, target_id: str) -> float:
        """LR chosen for a target."""
        return next(c.lr for c in self.choices if c.target_id == target_id)

    def document(self) -> dict[str, Any]:
        """JSON-safe form; `from_document` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Inverse of `document`."""
        choices = tuple(Choice(**choice) for choice in document["choices"])
        return cls(**{**document, "choices": choices})


def choices_from(rows: list[dict[str, Any]], lr: float | None = None) -> tuple[Choice, ...]:
    """Choices of a predictions table, one LR for all targets where ``lr`` is given."""
    return tuple(
        Choice(
            target_id=str(row["target_id"]),
            lr=float(row["lr"] if lr is None else lr),
            lr_q05=float(row["lr_q05"]),
            lr_q95=float(row["lr_q95"]),
            p_diverge=_finite(row.get("p_diverge")),
        )
        for row in rows
    )


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None
