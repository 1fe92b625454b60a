"""Verbs that train: quickstart, sweep, worker, status."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayeslr.cli.words import key_values
from bayeslr.errors import SpecError, UntrustworthyFit

if TYPE_CHECKING:
    from bayeslr.loop import SweepResult

Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of the sweep; resumes what is in it [default: RECIPE-out]."),
]
Storage = Annotated[
    str | None,
    typer.Option(help="Optuna storage URL, such as postgresql+psycopg://user@host/db."),
]
Seed = Annotated[int | None, typer.Option(help="Instead of the recipe's seed.")]
Strategy = Annotated[
    str | None,
    typer.Option(
        help="Who chooses the runs, instead of the recipe's: bayes, classical, ladder, d-optimal, "
        "random."
    ),
]
Retry = Annotated[bool, typer.Option("--retry", help="Ask again for failed and lost runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def quickstart(out: Out = None, seed: Seed = None, strategy: Strategy = None) -> None:
    """Train real proxies on this machine, predict a larger one's LR, and check it by training."""
    from bayeslr.loop import sweep as run_sweep

    stop_on_sigterm()
    folder = _folder("quickstart", out, strategy)
    result = run_sweep("quickstart", folder, seed=seed, strategy=strategy, progress=Lines())
    _print_summary(result)
    _echo(
        "",
        "The same with runs of your own:",
        "  bayeslr check my_runs.csv",
        "  bayeslr fit my_runs.csv -o fit",
        "  bayeslr predict fit --n-active 1.3B --n-total 12B --tokens 500B --batch-tokens 4M",
        "and with a trainer of your own (edit argv and the space first):",
        f"  cp {_shipped('command')} my_sweep.toml",
        "  bayeslr sweep my_sweep.toml --out my-sweep",
    )
    _require_trust(result)


def sweep(
    recipe: Annotated[str, typer.Argument(help="Path of a recipe, or the name of a shipped one.")],
    out: Out = None,
    storage: Storage = None,
    seed: Seed = None,
    strategy: Strategy = None,
    retry: Retry = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the space, its cost and the first runs.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print JSON on standard output.")
    ] = False,
) -> None:
    """The closed loop: ask, train, tell, refit, stop. Resumes where it was killed."""
    from bayeslr.loop import describe, open_recipe
    from bayeslr.loop import sweep as run_sweep
    from bayeslr.runs.files import json_text

    if as_json and not dry_run:
        raise SpecError("--json goes with --dry-run; a sweep that runs: bayeslr status --json")
    opened = open_recipe(recipe)
    if strategy is not None:
        opened = dataclasses.replace(opened, strategy=strategy)
    if seed is not None:
        opened = dataclasses.replace(opened, seed=seed)
    if dry_run:
        plan = describe(opened)
        _echo(json_text(plan, indent=2)) if as_json else _print_description(plan)
        return
    stop_on_sigterm()
    folder = _folder(opened.name, out, strategy)
    result = run_sweep(opened, folder, storage=storage, retry=retry, progress=Lines())
    _print_summary(result)
    _require_trust(result)


def worker(
    storage: Annotated[str, typer.Option(help="Optuna storage URL, or the folder of a sweep.")],
    study: Annotated[str, typer.Option(help="Study name: the recipe's name.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for run folders; the sweep's own where it is shared."),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    launch: Annotated[
        str | None,
        typer.Option(help="Have workers started by slurm, ray or local (in the background here)."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="With --launch: how many workers.")] = 1,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="With --launch: KEY=VALUE for the scheduler, as gpus_per_node=1."),
    ] = None,
) -> None:
    """One more worker for a sweep, on any machine that reaches its storage."""
    from bayeslr.loop import work

    if out is None:
        out = Path(f"{study}-worker") if "://" in storage else Path(storage)
    if launch is not None:
        _launch(launch, storage, study, out, slots, count, setting or [])
        return
    if count != 1 or setting:
        raise SpecError("--count and --setting go with --launch")
    stop_on_sigterm()
    stop = work(storage, study, out, slots=slots, progress=Lines())
    _echo(f"the sweep has stopped: {stop.reason}")


def _launch(launcher: str, storage: str, study: str, out: Path, slots: int, count: int,
            settings: Sequence[str]) -> None:  # fmt: skip
    """Hand workers to a scheduler."""
    from bayeslr.runner_protocol import find_entry_point
    from bayeslr.units import counted

    parsed = key_values(settings, "--setting")
    place = storage if "://" in storage else str(Path(storage).absolute())
    words = [
        sys.executable, "-c", "from bayeslr.cli import main; main()", "worker",
        "--storage", place, "--study", study, "--out", str(out.absolute()), "--slots", str(slots),
    ]  # fmt: skip
    logs = out.absolute() / "workers"
    start = find_entry_point("bayeslr.launchers", launcher)
    jobs = start(words, count=count, folder=logs, settings=parsed)
    _echo(f"{counted(count, 'worker')} handed to {launcher}: {', '.join(jobs)}; logs in {logs}")


def status(
    place: Annotated[str, typer.Argument(help="Folder of a sweep, or a storage URL.")],
    study: Annotated[str | None, typer.Option(help="Study name; needed with a URL.")] = None,
    as_json: AsJson = False,
) -> None:
    """How a sweep stands: runs, budget, prediction, who is working, what failed and why."""
    from bayeslr.loop import open_status
    from bayeslr.loop.status import status_lines
    from bayeslr.runs.files import json_text

    document = open_status(place, study)
    _echo(json_text(document, indent=2)) if as_json else _echo(*status_lines(document))


def _folder(name: str, out: Path | None, strategy: str | None) -> Path:
    """Where a sweep goes by default: another strategy is another sweep."""
    other = [strategy] if strategy not in (None, "bayes") else []
    return out or Path("-".join([name, *other, "out"]))


class Lines:
    """Progress on standard error; what is transient shows on a terminal alone."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    def __call__(self, line: str, *, transient: bool = False) -> None:
        """Show one line."""
        if transient and not self._terminal:
            return
        clear = "\r\033[K" if self._terminal else ""
        typer.echo(f"{clear}{line}", err=True, nl=not transient)


def _print_summary(result: SweepResult) -> None:
    from bayeslr.units import format_flops
    from bayeslr.verdicts import verdict_lines

    spent, budget = result.spent_flops, result.recipe.budget_flops
    rate = result.recipe.flops_per_second
    _echo(
        f"{result.runs.frame['run_id'].nunique()} runs, {format_flops(spent, rate)} "
        f"({spent / budget:.0%} of the budget); stopped: {result.stop.reason}"
    )
    if result.early.runs:
        _echo(result.early.line(rate))
    rows: list[dict[str, Any]] = result.predictions.to_dict("records")  # type: ignore[assignment]
    for row in rows:
        _echo(f"{row['target_id']}: {row['sentence']}")
    _echo(*result.covariates["sentence"])
    if lines := verdict_lines(result.posterior.info):
        _echo("", "What the checks of the fit say (more in the report):", *lines)
    if result.validation is not None:
        _echo("", *result.validation.lines())
    left = [
        n
        for n in (
            "report.html",
            "runs.parquet",
            "runs.parquet.quarantine.csv",
            "predictions.csv",
            "covariates.csv",
            "fit",
        )
        if (result.out / n).exists()
    ]
    _echo("", f"In {result.out}: {', '.join(left)}")


def _require_trust(result: SweepResult) -> None:
    """Exit code 4, after all has been printed, if the last fit failed its gate."""
    if not result.posterior.trustworthy:
        raise UntrustworthyFit(str(result.posterior.info["verdict"]))


def _print_description(plan: dict[str, Any]) -> None:
    from bayeslr.units import format_flops

    lrs, rate = plan["lrs"], plan["flops_per_second"]
    pace = "" if rate is None else f" at {rate:.6g} FLOP/s"
    _echo(
        f"sweep {plan['name']}: runner {plan['runner']}, budget "
        f"{format_flops(plan['budget_flops'], rate)} ({plan['budget_flops']:.6g}){pace}",
        f"LRs: {len(lrs)} from {lrs[0]:.4g} to {lrs[-1]:.4g}",
        "cells (one run each LR):",
    )
    for cell in plan["cells"]:
        _echo(
            f"  {cell['shape']:<16} N={cell['n_active']} of {cell['n_total']}  D={cell['tokens']}  "
            f"batch={cell['batch_tokens']}  {format_flops(cell['flops_per_run'], rate)} a run  "
            f"losses at {', '.join(str(t) for t in cell['decay_at'])} tokens"
        )
    _echo(f"first runs, {format_flops(plan['start_flops'], rate)}:")
    _echo(*(f"  {run['run_id']}  {format_flops(run['flops'], rate)}" for run in plan["start"]))
    for target in plan["targets"]:
        _echo(
            f"target {target['target_id']}: N={target['n_active']:.0f} of {target['n_total']:.0f}, "
            f"D={target['tokens']:.0f}, {format_flops(target['flops'], rate)}"
        )


def _shipped(name: str) -> str:
    from bayeslr.loop import find_recipe

    return str(find_recipe(name))


def stop_on_sigterm() -> None:
    """A scheduler's SIGTERM ends a sweep as Ctrl-C does: children first, runs given up cleanly."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _echo(*lines: str) -> None:
    for line in lines:
        typer.echo(line)
