"""Was the prediction right? Trains the target at the recommended LR, half and twice it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bayeslr.errors import SpecError
from bayeslr.loop.worker import Due
from bayeslr.runner_protocol import Runner, Trial
from bayeslr.space import run_spec
from bayeslr.specs import Recipe, Target
from bayeslr.units import format_flops, format_interval, format_lr, format_quantity

MULTIPLES = (1.0, 0.5, 2.0)

_NEAR = 0.1 * math.log(2.0)  # A tenth of an octave costs a tenth of the seed noise of a loss.


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Measured losses of the target around the recommended LR.

    ``lr_q05`` and ``lr_q95`` bound the 90 % interval that was predicted. ``best_lr`` is the bottom
    of the parabola through the three losses in ln LR, or the LR with the lowest loss where there is
    no bottom between them. ``regret`` is the loss at the recommended LR above that bottom, or above
    the lowest one measured, in nats.
    """

    target_id: str
    lr: float
    lr_q05: float
    lr_q95: float
    lrs: tuple[float, ...]
    losses: tuple[float | None, ...]
    states: tuple[str, ...]
    best_lr: float | None
    bracketed: bool
    regret: float | None

    @property
    def inside(self) -> bool | None:
        """Whether the measured optimum lies in the predicted interval; None if it is not known."""
        if self.best_lr is None:
            return None
        if self.bracketed:
            return self.lr_q05 <= self.best_lr <= self.lr_q95
        # The optimum lies at or beyond the outermost LR: outside for certain only past an end.
        if (self._low_side and self.best_lr <= self.lr_q05) or (
            not self._low_side and self.best_lr >= self.lr_q95
        ):
            return False
        return None

    @property
    def _low_side(self) -> bool:
        """Whether the best LR is the lowest of those with a loss."""
        measured = [lr for lr, y in zip(self.lrs, self.losses, strict=True) if y is not None]
        return self.best_lr == min(measured)

    def lines(self) -> list[str]:
        """What came out, for people."""
        told = [f"{self.target_id}, trained at half, once and twice the recommended LR:"]
        for lr, loss, state in sorted(zip(self.lrs, self.losses, self.states, strict=True)):
            outcome = state if loss is None else f"loss {loss:.4f}"
            mark = "  <- recommended" if lr == self.lr else ""
            told.append(f"  lr {format_lr(lr)}: {outcome}{mark}")
        interval = format_interval(self.lr_q05, self.lr_q95)
        if self.best_lr is None or self.regret is None:
            return [*told, f"No verdict: too few of the three runs ended well ({interval})."]
        if self.bracketed:
            best_lr = format_lr(self.best_lr)
            told.append(f"The bottom of the valley through them is at lr {best_lr}.")
        else:
            side = "below" if self._low_side else "above"
            told.append(
                f"The lowest loss is at the edge, lr {format_lr(self.best_lr)}: the optimum may "
                f"lie further {side}."
            )
        verdict = {
            True: f"It lies where the posterior said ({interval}).",
            False: f"It lies OUTSIDE of what the posterior said ({interval}).",
            None: f"These runs cannot tell whether it lies where the posterior said ({interval}).",
        }[self.inside]
        above = "that bottom" if self.bracketed else "the lowest of them"
        regret = f"Regret of the recommended LR: {self.regret:.4f} nats above {above}."
        return [*told, verdict, regret]

    def document(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {**dataclasses.asdict(self), "inside": self.inside}


def validation_runs(recipe: Recipe, runner: Runner, target: Target, lr: float) -> list[Due]:
    """The three runs. Raises: SpecError if the first target has no shape to train."""
    shape = recipe.targets[0].get("shape")
    if shape is None:
        raise SpecError(
            f"recipe {recipe.name}: validate_target needs a shape in the first of [[targets]], "
            "so that it can be trained"
        )
    shape = {"name": target.target_id, **shape}
    due = []
    for multiple in MULTIPLES:
        spec = run_spec(
            recipe,
            runner,
            shape,
            lr=lr * multiple,
            batch_tokens=int(target.batch_tokens),
            decay_at=[int(target.tokens)],
            prefix=f"{recipe.name}-validation",
        )
        reason = f"the target itself at {multiple:g} times the recommended LR"
        due.append(Due(spec=spec, flops=runner.flops(spec), reason=reason))
    return due


def near_lr(lr: float, trials: Sequence[Trial]) -> list[Trial]:
    """Runs, made or planned, within a tenth of an octave of an LR."""
    return [t for t in trials if not t.void and abs(math.log(t.spec.lr / lr)) < _NEAR]


def validate(trials: Sequence[Trial], prediction: Mapping[str, Any]) -> Validation:
    """Verdict on a prediction (a row of the predictions table) from the ended runs.

    Runs about an LR that was recommended before, and is no more, are left out; one that was made
    again counts as what it came to.
    """
    recommended = float(prediction["lr"])
    near = [t for multiple in MULTIPLES for t in near_lr(multiple * recommended, trials)]
    trials = list({t.spec.lr: t for t in near}.values())
    trials.sort(key=lambda t: t.spec.lr)
    losses = [t.final_loss for t in trials]
    measured = [(t.spec.lr, y) for t, y in zip(trials, losses, strict=True) if y is not None]
    lr = min((t.spec.lr for t in near_lr(recommended, trials)), default=recommended)
    best, lowest, bracketed = _bottom(measured)
    at_lr = dict(measured).get(lr)
    return Validation(
        target_id=str(prediction["target_id"]),
        lr=lr,
        lr_q05=float(prediction["lr_q05"]),
        lr_q95=float(prediction["lr_q95"]),
        lrs=tuple(t.spec.lr for t in trials),
        losses=tuple(losses),
        states=tuple(t.state for t in trials),
        best_lr=best,
        bracketed=bracketed,
        regret=None if at_lr is None or lowest is None else at_lr - lowest,
    )


def validation_summary(recipe: Recipe, target: Target, flops: float) -> str:
    """What is about to be trained."""
    return (
        f"training the target {target.target_id} itself at three LRs "
        f"(N={format_quantity(target.n_active)}, D={format_quantity(target.tokens)}, "
        f"{format_flops(flops, recipe.flops_per_second)}, beside the budget of {recipe.name})"
    )


def _bottom(
    measured: Sequence[tuple[float, float]],
) -> tuple[float | None, float | None, bool]:
    """LR and loss at the bottom of the measured valley, and whether it lies between measured LRs.

    Where it does not, they are those of the lowest loss.
    """
    if len(measured) < 2:
        return None, None, False
    lowest = min(range(len(measured)), key=lambda i: measured[i][1])
    if len(measured) < 3:
        return *measured[lowest], False
    middle = min(max(lowest, 1), len(measured) - 2)
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(x), y) for x, y in measured[middle - 1 : middle + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if right <= left:
        return *measured[lowest], False
    # Newton's divided differences: the slope of the parabola is zero at the vertex.
    bend = (right - left) / (x2 - x0)
    vertex = 0.5 * (x0 + x1 - left / bend)
    if not x0 < vertex < x2:
        return *measured[lowest], False
    return math.exp(vertex), y0 + (vertex - x0) * (left + bend * (vertex - x1)), True
