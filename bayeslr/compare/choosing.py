"""Trains the proxies of both paradigms and makes each arm's choices, once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslr.compare.arms import (
    BLEND,
    FITTING,
    MODULES,
    TRANSFER,
    TWO_STAGE,
    Arm,
    choices_from,
)
from bayeslr.compare.driving import train
from bayeslr.compare.proxies import (
    BaseResult,
    ModulesPlan,
    RungsPlan,
    SeedsPlan,
    base_result,
    best_multipliers,
    multipliers_of,
)
from bayeslr.compare.recipe import CompareRecipe
from bayeslr.errors import DataError, UntrustworthyFit
from bayeslr.loop import sweep
from bayeslr.loop.planning import table_of
from bayeslr.loop.worker import Progress
from bayeslr.runner_protocol import Runner, Trial, find_entry_point
from bayeslr.runs import write_atomically
from bayeslr.space import targets_of
from bayeslr.specs import Recipe, Target
from bayeslr.units import format_interval, format_lr

if TYPE_CHECKING:
    from bayeslr.runs import RunTable

CHOICES_FILE = "choices.json"

MIN_LR, MAX_LR = 1e-9, 10.0
"""Peak LRs that a `RunSpec` and a study take."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Arms with their choices, every trial of the proxies; details: JSON-safe."""

    arms: tuple[Arm, ...]
    trials: tuple[Trial, ...]
    details: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Proxies:
    """Ended trials of the transfer paradigm: the base shape, and what each further use added."""

    base: BaseResult
    seeds: list[Trial]
    grid: list[Trial]
    modules: list[Trial]
    rungs: list[Trial]


def choose(
    recipe: CompareRecipe, runner_of: Mapping[str, Runner], out: Path, *, retry: bool,
    progress: Progress,
) -> Chosen:  # fmt: skip
    """Choices of every arm; those that choices.json holds already stand.

    Raises: DataError if the proxies of a paradigm came to nothing.
    """
    transfer = _train_transfer(recipe, runner_of["transfer"], out / "transfer", retry, progress)
    path = out / CHOICES_FILE
    if path.exists():
        document = json.loads(path.read_text(encoding="utf-8"))
    else:
        targets = targets_of(recipe.fitting, runner_of["fitting"])
        fitted, left_out = _fitting_arms(recipe, out / "fitting", targets, retry, progress)
        carried, details = _transfer_arms(recipe, transfer, targets, out / "transfer", progress)
        left_out |= _unaffordable(recipe, transfer)
        arms = _trainable([*fitted, *carried], recipe, left_out)
        details["left_out"] = left_out
        for name, why in left_out.items():
            progress(f"{name}: left out, {why}")
        document = {"arms": [arm.document() for arm in arms], "details": details}
        write_atomically(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
        for arm in arms:
            progress(arm_line(arm))
    return Chosen(
        arms=tuple(Arm.from_document(arm) for arm in document["arms"]),
        trials=(
            *_trials_of(recipe.fitting, out / "fitting"),
            *transfer.seeds, *transfer.modules, *transfer.rungs,
        ),
        details=document["details"],
    )  # fmt: skip


def _unaffordable(recipe: CompareRecipe, transfer: _Proxies) -> dict[str, str]:
    """Why an arm that the recipe asks for has no run of its own, by arm."""
    why = "what the LR grid left of proxy_flops is less than one run of it"
    asked = ((MODULES, recipe.modules, transfer.modules), (BLEND, recipe.rungs, transfer.rungs))
    return {name: why for name, wanted, trials in asked if wanted and not trials}


def _trainable(arms: Sequence[Arm], recipe: CompareRecipe, left_out: dict[str, str]) -> list[Arm]:
    """The arms whose LRs can be trained at; ``left_out`` gets the others with the reason.

    Raises: UntrustworthyFit if one of those is what a paradigm stands for.
    """
    kept = []
    for arm in arms:
        lrs = [c.lr * multiple for c in arm.choices for multiple in recipe.multiples]
        if all(math.isfinite(lr) and MIN_LR < lr < MAX_LR for lr in lrs):
            kept.append(arm)
            continue
        why = f"its LRs cannot be trained at: {arm_line(arm)}"
        if arm.name in (FITTING, TRANSFER):
            raise UntrustworthyFit(f"{why}. {arm.note}".strip())
        left_out[arm.name] = why
    return kept


def arm_line(arm: Arm) -> str:
    """An arm's choices in one line."""
    lrs = ", ".join(
        f"{c.target_id} lr {format_lr(c.lr)} ({format_interval(c.lr_q05, c.lr_q95)})"
        for c in arm.choices
    )
    return f"{arm.name}: {lrs}"


def _train_transfer(
    recipe: CompareRecipe, runner: Runner, folder: Path, retry: bool, progress: Progress
) -> _Proxies:
    own = recipe.transfer
    seeds = train(own, runner, folder, SeedsPlan(recipe, runner), retry=retry, progress=progress)
    base = base_result(recipe, seeds)
    left = recipe.proxy_flops - base.flops
    modules: list[Trial] = []
    rungs: list[Trial] = []
    if recipe.modules is not None:
        named = replace(own, name=f"{own.name}.modules", budget_flops=left)
        plan = ModulesPlan(recipe, runner, recipe.modules, base)
        modules = train(named, runner, folder, plan, retry=retry, progress=progress)
    if recipe.rungs:
        named = replace(own, name=f"{own.name}.rungs", budget_flops=left)
        rungs = train(
            named, runner, folder, RungsPlan(recipe, runner, base), retry=retry, progress=progress
        )
    grid = [t for t in seeds if t.spec.seed == recipe.seed]
    return _Proxies(base=base, seeds=seeds, grid=grid, modules=modules, rungs=rungs)


def _fitting_arms(
    recipe: CompareRecipe, folder: Path, targets: Sequence[Target], retry: bool,
    progress: Progress,
) -> tuple[list[Arm], dict[str, str]]:  # fmt: skip
    from bayeslr.sampling import fit

    result = sweep(recipe.fitting, folder, retry=retry, progress=progress)
    if not result.posterior.trustworthy:
        progress(f"fitting: {result.posterior.info['verdict']}")
    shared: dict[str, Any] = {
        "parametrization": str(recipe.fitting.run["parametrization"]),
        "proxy_runs": int(result.runs.frame["run_id"].nunique()),
        "proxy_flops": result.spent_flops,
    }
    rows = _rows(result.predictions.to_dict("records"))
    note = "" if result.posterior.trustworthy else str(result.posterior.info["verdict"])
    arms = [Arm(name=FITTING, choices=choices_from(rows), note=note, **shared)]
    try:
        classical = fit(result.runs, recipe.fitting.prior, seed=recipe.seed, method="two-stage")
    except DataError as error:
        return arms, {TWO_STAGE: str(error)}
    classical.save(folder / "fit-two-stage")
    # Least squares drop diverged runs and know no edge: it does not say what diverges.
    rows = [{**row, "p_diverge": None} for row in _predict(classical, targets)]
    return [*arms, Arm(name=TWO_STAGE, choices=choices_from(rows), **shared)], {}


def _transfer_arms(
    recipe: CompareRecipe, proxies: _Proxies, targets: Sequence[Target], folder: Path,
    progress: Progress,
) -> tuple[list[Arm], dict[str, Any]]:  # fmt: skip
    from bayeslr.sampling import fit

    progress("fitting the transferred LR", transient=True)
    own, base = recipe.transfer, proxies.base
    shape, family = own.space.shapes[0], own.family
    carried = fit(table_of(proxies.seeds, own), own.prior, seed=recipe.seed)
    carried.save(folder / "fit")
    spec = proxies.seeds[0].spec
    base_target = Target(
        target_id=str(shape["name"]), family=family, n_active=spec.n_active, n_total=spec.n_total,
        tokens=spec.tokens, batch_tokens=spec.batch_tokens,
        param_convention=spec.param_convention,
    )  # fmt: skip
    kin = [replace(target, family=family) for target in targets]
    lr = float(_predict(carried, [base_target])[0]["lr"])
    if not math.isfinite(lr):
        lr = base.lr
    parametrization = str(own.run["parametrization"])
    at_edge = "the base shape's best LR lies at the end of the LR grid: widen it"
    doubts = [at_edge] if base.at_edge else []
    if not carried.trustworthy:
        doubts.append(str(carried.info["verdict"]))
    note = "; ".join(doubts)
    arms = [
        Arm(
            name=TRANSFER, parametrization=parametrization, note=note,
            choices=choices_from(_predict(carried, kin), lr=lr),
            proxy_runs=len(proxies.seeds), proxy_flops=_spent(proxies.seeds),
        )
    ]  # fmt: skip
    details: dict[str, Any] = {"base": {"shape": dict(shape), "lr": lr, "grid_lr": base.lr}}
    if proxies.modules:
        multipliers = best_multipliers(proxies.modules)
        arms.append(
            Arm(
                name=MODULES, parametrization=parametrization, note=note, multipliers=multipliers,
                choices=choices_from(_predict(carried, kin), lr=base.lr),
                proxy_runs=len(proxies.grid) + len(proxies.modules),
                proxy_flops=base.flops + _spent(proxies.modules),
            )
        )  # fmt: skip
        details["modules"] = {
            "multipliers": multipliers,
            "tried": [
                {"multipliers": multipliers_of(t), "loss": t.final_loss, "state": t.state}
                for t in proxies.modules
            ],
        }
    if proxies.rungs:
        table = table_of([*proxies.grid, *proxies.rungs], own)
        arm, details["posterior"] = _blend_arm(recipe, table, kin, folder, progress)
        arms.append(
            replace(
                arm, proxy_runs=len(proxies.grid) + len(proxies.rungs),
                proxy_flops=base.flops + _spent(proxies.rungs),
            )
        )  # fmt: skip
    return arms, details


def _blend_arm(
    recipe: CompareRecipe, table: RunTable, targets: Sequence[Target], folder: Path,
    progress: Progress,
) -> tuple[Arm, dict[str, Any]]:  # fmt: skip
    from bayeslr.blend import blend

    progress("weighing the transferred LR against a law", transient=True)
    cards = (recipe.transfer.prior, recipe.law_prior)
    found = blend(table, targets, cards=cards, seed=recipe.seed)
    for card, posterior in found.posteriors.items():
        posterior.save(folder / f"fit-{Path(card).stem}")
    details = {
        "weights": dict(found.weights),
        "scores": dict(found.scores),
        "sentence": found.sentence,
        "alone": {
            card: [
                {"target_id": c.target_id, "lr": c.lr, "lr_q05": c.lr_q05, "lr_q95": c.lr_q95}
                for c in choices_from(_rows(rows.to_dict("records")))
            ]
            for card, rows in found.alone.items()
        },
    }
    arm = Arm(
        name=BLEND,
        parametrization=str(recipe.transfer.run["parametrization"]),
        choices=choices_from(_rows(found.predictions.to_dict("records"))),
        proxy_runs=0,
        proxy_flops=0.0,
        note=found.sentence,
    )
    return arm, details


def _predict(posterior: Any, targets: Sequence[Target]) -> list[dict[str, Any]]:
    from bayeslr.predict import predict

    return _rows(predict(posterior, targets).to_dict("records"))


def _rows(records: Sequence[Mapping[Any, Any]]) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in record.items()} for record in records]


def _spent(trials: Sequence[Trial]) -> float:
    return math.fsum(t.flops for t in trials)


def _trials_of(recipe: Recipe, folder: Path) -> list[Trial]:
    study = find_entry_point("bayeslr.studies", "optuna")(None, recipe.name, folder, None)
    try:
        return [t for t in study.trials() if not t.void]
    finally:
        study.close()
