"""The verb that replays strategies on recorded runs."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayeslr.errors import SpecError

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
    from bayeslr.runs import write_atomically

    if plot is not None and plot.suffix.lower() not in (".svg", ".pdf", ".png"):
        raise SpecError(f"--plot {plot} must end in .svg, .pdf or .png")
    load_prior(prior)
    chosen, notices = library.strategies(strategy)
    for notice in notices:
        typer.echo(notice, err=True)
    wanted = read_targets(targets)
    scores = library.replay(
        library.read_pool(runs), wanted, library.read_truth(truth, wanted), chosen=chosen,
        budget_shares=budget, seeds=range(1, seeds + 1), prior=prior,
        progress=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    entries = library.summary(scores)
    if out is not None:
        write_atomically(out, scores.to_csv(index=False).encode())
    if plot is not None:
        library.plot(scores, plot)
    if json:
        typer.echo(json_module.dumps({"strategies": entries}))
    else:
        for line in _lines(entries):
            typer.echo(line)


def _lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'strategy':11s} {'budget':>8s} {'runs':>6s} {'regret':>8s} {'worst':>8s} "
        f"{'cover 90':>8s} {'score':>7s}"
    ]
    return lines + [
        f"{e['strategy']:11s} {100 * e['budget_share']:6.2f} % {e['runs']:6.1f} "
        f"{e['regret_mean']:8.4f} {e['regret_worst']:8.4f} {e['cover_90']:8.2f} "
        f"{e['interval_score']:7.2f}"
        for e in entries
    ]
