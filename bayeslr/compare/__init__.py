"""Fitting against transfer at equal proxy compute: proxies, choices, held-out runs, verdict.

The folder of a comparison holds

    resolved.json             the recipe, versions, git hash
    fitting/                  the sweep of the fitting paradigm, with fit/ and fit-two-stage/
    transfer/                 the proxies of the transfer paradigm, with fit/ and the blend's fits
    choices.json              each arm's LR for each target, made once
    held-out/                 the larger models, trained at the choices and around them
    runs.parquet              every run of the above
    compare.json, report.html what came of it

Started again on the same folder it goes on from where it was: every run lies in a study, every
choice in choices.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslr.compare.arms import Arm
from bayeslr.compare.choosing import choose
from bayeslr.compare.driving import all_of, train
from bayeslr.compare.heldout import Cell, cells_of, held_out_runs, places
from bayeslr.compare.proxies import grid_runs
from bayeslr.compare.recipe import CompareRecipe, load_compare_recipe, with_seed
from bayeslr.compare.scores import Difference, Outcome, Scoreboard
from bayeslr.compare.verdict import Verdict, baseline, verdict
from bayeslr.errors import SpecError
from bayeslr.loop import changes, check_recipe, disk_errors
from bayeslr.loop.planning import rows_of
from bayeslr.loop.worker import Progress, silent
from bayeslr.runner_protocol import Runner, Trial, find_runner
from bayeslr.runs import make_table, write_atomically
from bayeslr.space import targets_of
from bayeslr.units import format_quantity

if TYPE_CHECKING:
    from bayeslr.runs import RunTable

__all__ = ["Comparison", "compare", "describe", "load_compare_recipe", "with_seed"]

MUTABLE = ("workers", "num_seeds", "multiples")
"""What of [compare] may change between two starts on one folder."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison leaves.

    outcomes: one an arm and target. differences: by arm, that arm minus the one it is judged
    against (`verdict.baseline`); None where no target has both. noise: by target, sd of a loss at a
    chosen LR between seeds, beside what all runs of a seed share, in nats.
    details: what the choosing showed, JSON-safe (module multipliers, weights of the blend).
    """

    recipe: CompareRecipe
    out: Path
    arms: tuple[Arm, ...]
    cells: tuple[Cell, ...]
    outcomes: tuple[Outcome, ...]
    differences: Mapping[str, Difference | None]
    noise: Mapping[str, float | None]
    verdict: Verdict
    details: Mapping[str, Any]
    runs: RunTable

    def document(self) -> dict[str, Any]:
        """JSON-safe form, as it stands in compare.json."""
        return {
            "name": self.recipe.name,
            "winner": self.verdict.winner,
            "sentence": self.verdict.sentence,
            "proxy_flops": self.recipe.proxy_flops,
            "arms": [{**arm.document(), "variant": arm.variant} for arm in self.arms],
            "outcomes": [outcome.document() for outcome in self.outcomes],
            "differences": {
                name: None if found is None else found.document()
                for name, found in self.differences.items()
            },
            "seed_noise": dict(self.noise),
            "cells": [_cell_document(cell) for cell in self.cells],
            **self.details,
        }


def compare(
    recipe: CompareRecipe | str | Path,
    out: str | Path,
    *,
    seed: int | None = None,
    retry: bool = False,
    progress: Progress = silent,
) -> Comparison:
    """Run a comparison, or go on with the one in ``out``, to its end.

    recipe: a recipe, the path of one, or the name of one that is shipped. seed: instead of the
    recipe's. retry: ask once more for runs that failed or were lost.

    Raises
    ------
    SpecError
        The recipe breaks a rule, or differs from the one that the folder was begun with.
    StorageError
        Another process runs the fitting sweep in this folder, or the disk is full.
    DataError
        The proxies of a paradigm came to nothing.
    """
    from bayeslr.compare.page import write_report

    if not isinstance(recipe, CompareRecipe):
        recipe = load_compare_recipe(recipe)
    if seed is not None:
        recipe = with_seed(recipe, seed)
    out = Path(out)
    runner_of = {"fitting": find_runner(recipe.fitting), "transfer": find_runner(recipe.transfer)}
    check(recipe, runner_of)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        _take_up(recipe, out)
        chosen = choose(recipe, runner_of, out, retry=retry, progress=progress)
        planned = held_out_runs(recipe, runner_of["fitting"], places(recipe, chosen.arms))
        progress(held_out_summary(recipe, len(planned), math.fsum(d.flops for _, d in planned)))
        budget = math.fsum(due.flops for _, due in planned)
        own = replace(recipe.fitting, name=f"{recipe.name}.held-out", budget_flops=budget)
        ended = train(
            own, runner_of["fitting"], out / "held-out", all_of([due for _, due in planned]),
            retry=retry, progress=progress, wanted={due.spec.run_id for _, due in planned},
        )  # fmt: skip
        progress("writing the report", transient=True)
        result = _judged(recipe, out, chosen.arms, cells_of(planned, ended), chosen.details,
                         [*chosen.trials, *ended])  # fmt: skip
        result.runs.write(out / "runs.parquet")
        document = json.dumps(result.document(), indent=1, allow_nan=False)
        write_atomically(out / "compare.json", (document + "\n").encode())
        write_report(result, targets_of(recipe.fitting, runner_of["fitting"]), out / "report.html")
        return result


def check(recipe: CompareRecipe, runner_of: Mapping[str, Runner]) -> None:
    """Make certain that everything can begin. Raises: SpecError."""
    check_recipe(recipe.fitting, runner_of["fitting"])
    grid_runs(recipe, runner_of["transfer"])


def describe(recipe: CompareRecipe) -> dict[str, Any]:
    """What a comparison would do: cost of proxies and held-out runs, nothing trained."""
    from bayeslr.loop import describe as describe_sweep

    runner_of = {"fitting": find_runner(recipe.fitting), "transfer": find_runner(recipe.transfer)}
    check(recipe, runner_of)
    grid = grid_runs(recipe, runner_of["transfer"])
    targets = targets_of(recipe.fitting, runner_of["fitting"])
    # Valleys of fitting, transfer and module LRs; two-stage and the blend add one LR each.
    num_valleys = 3 if recipe.modules else 2
    num_lrs = num_valleys * len(recipe.multiples) + (2 if recipe.rungs else 1)
    runs_each = num_lrs * recipe.num_seeds
    return {
        "name": recipe.name,
        "runner": recipe.fitting.runner,
        "proxy_flops": recipe.proxy_flops,
        "fitting": describe_sweep(recipe.fitting),
        "transfer": {
            "parametrization": recipe.transfer.run["parametrization"],
            "grid": [{"lr": due.spec.lr, "flops": due.flops} for due in grid],
            "rungs": [str(shape["name"]) for shape in recipe.rungs],
            "modules": list(recipe.modules.groups) if recipe.modules else [],
        },
        "targets": [
            {"target_id": t.target_id, "n_active": t.n_active, "n_total": t.n_total,
             "tokens": t.tokens, "flops_per_run": t.flops, "runs_at_most": runs_each}
            for t in targets
        ],
        "held_out_flops_at_most": math.fsum(t.flops * runs_each for t in targets),
    }  # fmt: skip


def held_out_summary(recipe: CompareRecipe, num_runs: int, flops: float) -> str:
    """What is about to be trained."""
    targets = ", ".join(str(target["target_id"]) for target in recipe.fitting.targets)
    return (
        f"training the held-out {targets} at the chosen LRs and around them: {num_runs} runs, "
        f"{format_quantity(flops)} FLOPs, beside the proxies"
    )


def _take_up(recipe: CompareRecipe, out: Path) -> None:
    """Refuse a folder that was begun with another recipe; note the present one."""
    path = out / "resolved.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["recipe"]
        changed = changes(before, json.loads(json.dumps(recipe.document)))
        fixed = [c for c in changed if c not in [f"compare.{name}" for name in MUTABLE]]
        if fixed:
            raise SpecError(
                f"{out} was begun with another recipe: {', '.join(fixed)} differ; only "
                f"{', '.join(MUTABLE)} may change. Choose another folder"
            )
    text = json.dumps({"recipe": recipe.document}, indent=2, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def _judged(
    recipe: CompareRecipe, out: Path, arms: Sequence[Arm], cells: Sequence[Cell],
    details: Mapping[str, Any], trials: Sequence[Trial],
) -> Comparison:  # fmt: skip
    board = Scoreboard(cells)
    outcomes = [
        board.outcome(arm, str(target["target_id"]))
        for target in recipe.fitting.targets
        for arm in arms
    ]
    differences = {
        arm.name: board.difference(arm.name, against)
        for arm in arms
        if (against := baseline(arm.name)) is not None
    }
    return Comparison(
        recipe=recipe,
        out=out,
        arms=tuple(arms),
        cells=tuple(cells),
        outcomes=tuple(outcomes),
        differences=differences,
        noise=board.noise(),
        verdict=verdict(arms, outcomes, differences),
        details=details,
        runs=make_table(rows_of(trials), source=f"comparison {recipe.name}"),
    )


def _cell_document(cell: Cell) -> dict[str, Any]:
    return {
        "target_id": cell.target_id, "variant": cell.variant, "lr": cell.lr,
        "chosen_by": list(cell.chosen_by), "around": cell.around, "losses": list(cell.losses),
        "states": list(cell.states), "diagnostics": [dict(d) for d in cell.diagnostics],
    }  # fmt: skip
