"""How a sweep ends: the last fit with its checks, the predictions, the target's own runs."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bayeslr.errors import DataError, UntrustworthyFit
from bayeslr.loop.early import EarlyEnds, early_ends
from bayeslr.loop.planning import FAILED_STATES, table_of
from bayeslr.loop.validation import (
    Validation,
    near_lr,
    validate,
    validation_runs,
    validation_summary,
)
from bayeslr.loop.worker import Due, Progress, Stop, Worker
from bayeslr.runner_protocol import Runner, Study, Trial, find_entry_point
from bayeslr.runs import first_reasons, quarantine_path, write_atomically
from bayeslr.space import targets_of
from bayeslr.specs import Recipe
from bayeslr.units import counted

if TYPE_CHECKING:
    import pandas as pd

    from bayeslr.posterior import Posterior
    from bayeslr.runs import RunTable

_FREE_SECONDS, _SHARE_OF_TRAINING = 60.0, 0.1
"""The refit without the largest cells takes about as long as the last fit. It is made where that
took no longer than this, or than this share of the time the runs took."""

_MORE_DRAWS = 4000
"""Draws a chain to try where those of a sweep (500, `sampling.fit`) were too few."""


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep leaves: runs, posterior, predictions, why it stopped, what ended early.

    ``covariates``: the best values of what else the space varied, as `covariate_table`.
    """

    recipe: Recipe
    out: Path
    runs: RunTable
    posterior: Posterior
    predictions: pd.DataFrame
    covariates: pd.DataFrame
    stop: Stop
    spent_flops: float
    early: EarlyEnds
    validation: Validation | None = None


def conclude(
    study: Study, recipe: Recipe, runner: Runner, out: Path, stop: Stop, progress: Progress
) -> SweepResult:
    """Last fit and predictions of a sweep that has stopped; the study keeps what they say."""
    trials = study.trials()
    if not any(t.state in ("ok", "diverged") for t in trials):
        reasons = {t.status_reason for t in trials if t.finished and not t.void}
        raise DataError(
            f"sweep {recipe.name}: no run came to anything ({'; '.join(sorted(reasons))[:600]}); "
            f"see {out / 'runs'}/*/stderr.log, mend the cause, repeat with --retry"
        )
    from bayeslr.covariates import covariate_table
    from bayeslr.predict import predict
    from bayeslr.sampling import fit

    table = table_of(trials, recipe)
    table.write(out / "runs.parquet")
    _write_quarantine(table, out, progress)
    progress(f"fitting {len(table)} rows", transient=True)
    method = "two-stage" if recipe.strategy == "classical" else "bayes"
    posterior = fit(table, recipe.prior, seed=recipe.seed, method=method)
    posterior = _checked(posterior, table, recipe.seed, progress)
    posterior.save(out / "fit")
    targets = targets_of(recipe, runner)
    predictions, covariates = predict(posterior, targets), covariate_table(posterior, targets)
    write_atomically(out / "predictions.csv", predictions.to_csv(index=False).encode())
    if len(covariates):
        write_atomically(out / "covariates.csv", covariates.to_csv(index=False).encode())
    study.set_note(
        "prediction",
        {
            "runs": len([t for t in trials if not t.void]),
            "targets": predictions.to_dict("records"),
            "verdict": str(posterior.info["verdict"]),
            "advice": "" if posterior.trustworthy else advice(recipe, out),
        },
    )
    return SweepResult(
        recipe=recipe,
        out=out,
        runs=table,
        posterior=posterior,
        predictions=predictions,
        covariates=covariates,
        stop=stop,
        spent_flops=math.fsum(t.flops for t in trials),
        early=early_ends(trials, posterior),
    )


def advice(recipe: Recipe, out: Path) -> str:
    """What can be done about a last fit that failed its gate."""
    runs, folder = (shlex.quote(str(out / name)) for name in ("runs.parquet", "fit-more-draws"))
    prior = shlex.quote(str(recipe.prior))
    return (
        f"more draws from the same runs: `bayeslr fit {runs} --prior {prior} --draws "
        f"{_MORE_DRAWS} -o {folder}`; or more runs: raise budget_flops or max_runs in the recipe "
        "and repeat the command of the sweep"
    )


def _write_quarantine(table: RunTable, out: Path, progress: Progress) -> None:
    """Say which rows break a rule, and put them where `bayeslr check` looks for them."""
    path = quarantine_path(out / "runs.parquet")
    if not len(table.quarantine):
        path.unlink(missing_ok=True)  # that of an earlier end, whose runs have been made again
        return
    write_atomically(path, table.quarantine.to_csv(index=False).encode())
    number = counted(len(table.quarantine), "row")
    progress(f"{number} set aside, for they break a rule of the run table (all in {path}):")
    for line in first_reasons(table.quarantine).splitlines():
        progress(line)


def _checked(posterior: Posterior, table: RunTable, seed: int, progress: Progress) -> Posterior:
    """The last fit with every check that a fit gets, the refit only where it is worth its time."""
    from bayeslr.verdicts import with_verdicts

    fitted_s = float(posterior.info["diagnostics"].get("seconds", 0.0))
    trained_s = float(table.frame.groupby("run_id")["wall_s"].max().sum())  # 0: not known
    holdout = not (fitted_s > _FREE_SECONDS and 0 < trained_s < fitted_s / _SHARE_OF_TRAINING)
    why_not = (
        "The largest cells were not left out and predicted: a fit took "
        f"{fitted_s:.0f} s here, and all runs {trained_s:.0f} s. bayeslr fit runs.parquet does it."
    )
    progress("checking the fit", transient=True)
    return with_verdicts(posterior, holdout=holdout, why_not=why_not, seed=seed)


def train_target(
    result: SweepResult,
    runner: Runner,
    storage: str | None,
    progress: Progress,
    *,
    retry: bool = False,
) -> Validation:
    """Train the first target for real; killed and started again it resumes like the sweep.

    retry: ask once more for those of its runs that failed or were lost.
    """
    recipe, out = result.recipe, result.out
    target = targets_of(recipe, runner)[0]
    prediction = result.predictions.to_dict("records")[0]
    if not math.isfinite(float(prediction["lr"])):
        raise UntrustworthyFit(str(result.posterior.info["verdict"]))
    runs = validation_runs(recipe, runner, target, float(prediction["lr"]))
    progress(validation_summary(recipe, target, math.fsum(run.flops for run in runs)))
    own = dataclasses.replace(
        recipe, name=f"{recipe.name}.validation", max_runs=None, early_ends=False,
        budget_flops=math.fsum(run.flops for run in runs),
    )  # fmt: skip
    study: Study = find_entry_point("bayeslr.studies", "optuna")(storage, own.name, out, own)

    def plan(trials: Sequence[Trial], _: int) -> list[Due] | Stop:
        # After more runs another LR may be recommended: what was checked stands, the rest follows.
        stand = [t for t in trials if t.number not in forgiven]
        tried = [t.spec.run_id for t in trials if t.number in forgiven]
        missing = [
            dataclasses.replace(run, nth=tried.count(run.spec.run_id) + 1)
            for run in runs
            if not near_lr(run.spec.lr, stand)
        ]
        return missing or Stop(kind="done", reason="the target's runs have ended")

    try:
        trials = study.trials()
        forgiven = {t.number for t in trials if retry and t.state in FAILED_STATES}
        if trials and isinstance(missing := plan(trials, 0), list):
            budget = math.fsum([t.flops for t in trials] + [run.flops for run in missing])
            study.set_recipe(dataclasses.replace(own, budget_flops=budget))
            study.set_note("stop", None)
        worker = Worker(
            study, runner, out / "runs", slots=recipe.workers, plan=plan, progress=progress
        )
        worker.run()
        validation = validate(study.trials(), {str(k): v for k, v in prediction.items()})
    finally:
        study.close()
    text = json.dumps(validation.document(), indent=2, allow_nan=False)
    write_atomically(out / "validation.json", f"{text}\n".encode())
    return validation
