"""The verb that replays strategies on recorded runs."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayeslr.cli.sweeps import Lines
from bayeslr.errors import SpecError
from bayeslr.units import counted

if TYPE_CHECKING:
    from collections.abc import Sequence


def replay(
    runs: Annotated[
        Path, typer.Argument(help="Run table, or a raw Step Law CSV.", show_default=False)
    ],
    targets: Annotated[Path, typer.Option("--targets", help="Table of targets.")],
    truth: Annotated[
        Path, typer.Option("--truth", help="Losses measured at the targets: target_id, lr, loss.")
    ],
    budget: Annotated[
        list[float], typer.Option("--budget", help="Share of the pool's FLOPs; may be repeated.")
    ] = [0.01],  # noqa: B006
    strategy: Annotated[
        str, typer.Option(help="all, or one: bayeslr, random, ladder, classical, ...")
    ] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="Replays of each, seeds 1, 2, ...")] = 5,
    prior: Annotated[str, typer.Option(help="Prior card: a name or a .toml file.")] = "moe-default",
    jobs: Annotated[int, typer.Option(min=1, help="Replays at a time.")] = 1,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="CSV file: one row a replay.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Figure: .svg, .pdf or .png.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """The loop on recorded runs: strategies side by side, scored at held-out targets."""
    from bayeslr import replay as library
    from bayeslr.predict import read_targets
    from bayeslr.priors import load_prior
    from bayeslr.runs.files import json_text, write_atomically

    if plot is not None and plot.suffix.lower() not in (".svg", ".pdf", ".png"):
        raise SpecError(f"--plot {plot} must end in .svg, .pdf or .png")
    for path in (out, plot):
        if path is not None and path.is_dir():
            raise SpecError(f"{path} is a folder; name a file in it")
    load_prior(prior)
    chosen, notices = library.strategies(strategy)
    for notice in notices:
        typer.echo(notice, err=True)
    wanted = read_targets(targets)
    measured = library.read_truth(truth, wanted)
    asked = measured["target_id"].isin([target.target_id for target in wanted])
    if others := measured["target_id"][~asked].nunique():
        typer.echo(
            f"{truth} also holds {counted(others, 'target')} that --targets does not; not scored",
            err=True,
        )
    bench = library.Bench(
        pool=library.read_pool(runs), targets=wanted, prior=prior, truth=measured[asked]
    )
    tasks = library.tasks_of(chosen, budget, range(1, seeds + 1))
    lines, rows = Lines(), []
    started = time.monotonic()
    for row in library.replays(bench, tasks, jobs=jobs):
        rows.append(row)
        done = f"{row['strategy']} at {100 * row['budget_share']:g} %, seed {row['seed']}"
        if row["failure"]:
            lines(f"{done} failed ({row['failure']}); the best LR of its runs is copied instead")
        left = (time.monotonic() - started) / len(rows) * (len(tasks) - len(rows))
        lines(
            f"{len(rows)} of {len(tasks)}, about {math.ceil(left / 60)} min left; {done}: "
            f"{row['runs']} runs, regret {row['regret_mean']:.4f} nats",
            transient=True,
        )
        if out is not None:  # what is finished is kept, whatever ends a long replay
            write_atomically(out, library.table_of(rows).to_csv(index=False).encode())
    lines("", transient=True)
    scores = library.table_of(rows)
    entries = library.summary(scores)
    if json:
        typer.echo(json_text({"strategies": entries}))
    else:
        for line in _lines(entries):
            typer.echo(line)
    if plot is not None:
        library.plot(scores, plot)


def _lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'strategy':11s} {'budget':>8s} {'runs':>6s} {'regret':>8s} {'worst':>8s} "
        f"{'cover 90':>8s} {'score':>7s}"
    ]
    return lines + [
        f"{e['strategy']:11s} {100 * e['budget_share']:6.2f} % {e['runs']:6.1f} "
        f"{e['regret_mean']:8.4f} {e['regret_worst']:8.4f} {e['cover_90']:8.2f} "
        f"{e['interval_score']:7.2f}{_broken(e)}"
        for e in entries
    ]


def _broken(entry: dict[str, Any]) -> str:
    """In how many replays a strategy broke, for the scores are then those of a copied LR."""
    if not entry["failures"]:
        return ""
    return f"  failed in {entry['failures']} of {entry['seeds']}, the best LR copied instead"
