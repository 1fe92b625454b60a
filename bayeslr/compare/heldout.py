"""The held-out models: trained at each arm's choice and around it, several seeds each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bayeslr.compare.arms import FITTING, MODULES, TRANSFER, Arm
from bayeslr.compare.proxies import due_run
from bayeslr.compare.recipe import CompareRecipe
from bayeslr.loop.worker import Due
from bayeslr.runner_protocol import Runner, Trial
from bayeslr.runs.diagnostics import OF_THE_TRUNK, read_diagnostics
from bayeslr.space import targets_of

# These three are trained around their choice as well; the others lie on the same valleys.
WITH_VALLEY = (FITTING, TRANSFER, MODULES)

MERGE_OCTAVES = 0.1
"""A choice this near to an LR that is trained anyway is judged by its runs.

A tenth of an octave off the optimum costs 1e-4 nats at the curvature of published valleys
(0.03 nats per squared ln LR, 2503.04715), a tenth of the seed noise of a final loss.
"""

FIRST_SEED = 1000
"""Seed of the first held-out run, over the comparison's own: far above those of all proxies, so
that no arm is judged on data orders that it was tuned on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One LR on one valley of one target, and the arms that chose it (``around``: near whom)."""

    target_id: str
    variant: str
    lr: float
    arm: Arm
    chosen_by: tuple[str, ...]
    around: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What the seeds of a place came to, in order of the seeds.

    losses: nats per token, None where a run diverged or failed. states: as in the run table.
    diagnostics: of each run, flat names to numbers.
    """

    target_id: str
    variant: str
    lr: float
    chosen_by: tuple[str, ...]
    around: str
    losses: tuple[float | None, ...]
    states: tuple[str, ...]
    diagnostics: tuple[Mapping[str, float], ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every seed ended well."""
        return None not in self.losses


def places(recipe: CompareRecipe, arms: Sequence[Arm]) -> list[Place]:
    """Every LR to train, target by target, valley by valley."""
    found: list[Place] = []
    for raw in recipe.fitting.targets:
        target_id = str(raw["target_id"])
        for arm in sorted(arms, key=lambda a: a.name not in WITH_VALLEY):
            multiples = recipe.multiples if arm.name in WITH_VALLEY else (1.0,)
            for multiple in sorted(multiples, key=lambda m: m != 1):
                lr = float(f"{arm.lr(target_id) * multiple:.5g}")
                twin = _twin(found, target_id, arm.variant, lr)
                chosen = (arm.name,) if multiple == 1 else ()
                if twin is None:
                    found.append(
                        Place(
                            target_id=target_id, variant=arm.variant, lr=lr, arm=arm,
                            chosen_by=chosen, around=arm.name,
                        )
                    )  # fmt: skip
                elif chosen:
                    merged = replace(found[twin], chosen_by=(*found[twin].chosen_by, *chosen))
                    found[twin] = merged
    return found


def held_out_runs(
    recipe: CompareRecipe, runner: Runner, planned: Sequence[Place]
) -> list[tuple[Place, Due]]:
    """The runs of all places: seed by seed, so that an early end leaves whole valleys."""
    shapes = {str(raw["target_id"]): raw["shape"] for raw in recipe.fitting.targets}
    targets = {t.target_id: t for t in targets_of(recipe.fitting, runner)}
    runs = []
    for number in range(recipe.num_seeds):
        for place in planned:
            target = targets[place.target_id]
            transfer = place.arm.paradigm == "transfer"
            base = recipe.transfer if transfer else recipe.fitting
            named = replace(base, name=f"{recipe.name}.held-out-{base.run['parametrization']}")
            due = due_run(
                named, runner, {"name": target.target_id, **shapes[place.target_id]},
                lr=place.lr, tokens=int(target.tokens), batch_tokens=int(target.batch_tokens),
                seed=recipe.seed + FIRST_SEED + number, multipliers=place.arm.multipliers,
                reason=f"{place.target_id} under {place.variant}, near the choice of "
                f"{place.around}",
            )  # fmt: skip
            runs.append((place, due))
    return runs


def cells_of(runs: Sequence[tuple[Place, Due]], trials: Sequence[Trial]) -> list[Cell]:
    """Outcome of each place. A run that was asked for twice counts as it last ended."""
    by_id = {t.spec.run_id: t for t in trials if not t.void}
    grouped: dict[int, tuple[Place, list[Trial | None]]] = {}
    for place, due in runs:
        grouped.setdefault(id(place), (place, []))[1].append(by_id.get(due.spec.run_id))
    return [
        Cell(
            target_id=place.target_id,
            variant=place.variant,
            lr=place.lr,
            chosen_by=place.chosen_by,
            around=place.around,
            losses=tuple(None if t is None else t.final_loss for t in ended),
            states=tuple("missing" if t is None else t.state for t in ended),
            diagnostics=tuple({} if t is None else _diagnostics(t) for t in ended),
        )
        for place, ended in grouped.values()
    ]


def _twin(found: Sequence[Place], target_id: str, variant: str, lr: float) -> int | None:
    """Index of a place on the same valley at nearly the same LR."""
    near = [
        (abs(math.log2(place.lr / lr)), i)
        for i, place in enumerate(found)
        if (place.target_id, place.variant) == (target_id, variant)
    ]
    distance, index = min(near, default=(math.inf, 0))
    return index if distance <= MERGE_OCTAVES else None


def _diagnostics(trial: Trial) -> dict[str, float]:
    """Those of a run's last record; of the last before the decay where the LR's size is in them."""
    rows = sorted((r for r in trial.records if r.get("diagnostics")), key=lambda r: r["tokens"])
    if not rows:
        return {}
    found = read_diagnostics(rows[-1]["diagnostics"])
    before = [r for r in rows if r.get("status") == "partial"]
    if before:
        earlier = read_diagnostics(before[-1]["diagnostics"])
        found |= {name: value for name, value in earlier.items() if name.startswith(OF_THE_TRUNK)}
    return found
