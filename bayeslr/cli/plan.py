"""The verb that says what to run next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayeslr.cli.model import risk
from bayeslr.errors import SpecError, StorageError
from bayeslr.units import (
    flops_in,
    format_extra_tokens,
    format_flops,
    format_hours,
    format_interval,
    format_lr,
    format_quantity,
    gpu_hours,
    parse_quantity,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bayeslr.acquire import Plan


def plan(
    fit: Annotated[Path, typer.Argument(help="Fit folder.", show_default=False)],
    space: Annotated[str, typer.Option("--space", help="Recipe whose space to choose from.")],
    budget: Annotated[
        str | None, typer.Option("--budget", help="FLOPs to spend, such as 1e18.")
    ] = None,
    hours: Annotated[
        str | None, typer.Option("--gpu-hours", help="GPU-hours to spend, instead of --budget.")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            "--flops-per-second",
            help="With --gpu-hours: FLOP/s that one device sustains [default: the recipe's].",
        ),
    ] = None,
    num_runs: Annotated[
        int | None, typer.Option("--runs", min=1, help="At most so many runs.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Run specs: a .jsonl file, or a folder, one file a run."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """The next runs worth paying for: what each costs, what it buys, and when to stop."""
    import dataclasses

    from bayeslr.acquire import plan as make_plan
    from bayeslr.loop import open_recipe
    from bayeslr.posterior import load
    from bayeslr.predict import predict
    from bayeslr.runner_protocol import find_runner
    from bayeslr.runs.files import json_text
    from bayeslr.space import targets_of
    from bayeslr.verdicts import warnings_of

    if out is not None and out.suffix not in ("", ".jsonl", ".json"):
        raise SpecError(f"-o {out} must end in .jsonl, or be a folder (no suffix)")
    posterior, recipe = load(fit), open_recipe(space)
    warnings = warnings_of(posterior.info)
    if posterior.design is not None and recipe.family not in posterior.design.families:
        warnings.append(
            f"the fit has no run of the recipe's family {recipe.family!r}, but of "
            f"{', '.join(posterior.design.families)}: no run of the space counts as made, and what "
            "is known of the other families tells less of this one"
        )
    for text in warnings:
        typer.echo(f"Warning: {text}", err=True)
    flops, flops_per_second = _budget(budget, hours, rate, recipe.flops_per_second)
    found = make_plan(posterior, recipe, budget_flops=flops, num_runs=num_runs)
    table = predict(posterior, targets_of(recipe, find_runner(recipe)))
    if out is not None:
        _write_specs(out, found)
    if json:
        plan = {
            "budget_flops": flops,
            "flops_per_second": flops_per_second,
            **dataclasses.asdict(found),
            "predictions": table,
            "warnings": warnings,
        }
        if flops_per_second is not None:
            plan["budget_gpu_hours"] = gpu_hours(flops, flops_per_second)
            for proposal in plan["proposals"]:
                proposal["gpu_hours"] = gpu_hours(proposal["flops"], flops_per_second)
        typer.echo(json_text(plan))
        return
    rows: list[dict[Any, Any]] = table.to_dict("records")
    echoed = f"Budget: {flops:,.0f} FLOPs"
    if flops_per_second is not None:
        in_hours = format_hours(gpu_hours(flops, flops_per_second))
        echoed += f", {in_hours} at {format_quantity(flops_per_second)} FLOP/s"
    typer.echo(echoed)
    for line in _lines(found, rows, flops_per_second):
        typer.echo(line)
    if out is not None and found.proposals:
        typer.echo(f"Run specs written to {out}")


def _budget(
    flops: str | None, hours: str | None, rate: str | None, recipes_rate: float | None
) -> tuple[float, float | None]:
    """FLOPs to spend and, where it is known, the FLOP/s that put them in GPU-hours.

    Raises: SpecError unless exactly one of the two budgets is given, and hours with a rate.
    """
    if (flops is None) == (hours is None) or (rate is not None and hours is None):
        options = {"--budget": flops, "--gpu-hours": hours, "--flops-per-second": rate}
        given = [name for name, value in options.items() if value is not None]
        raise SpecError(
            "the budget is either --budget in FLOPs, or --gpu-hours with --flops-per-second; got "
            f"{' and '.join(given) or 'none of them'}"
        )
    given_rate = None if rate is None else parse_quantity(rate, name="--flops-per-second")
    known = given_rate or recipes_rate
    if flops is not None:
        return parse_quantity(flops, name="--budget"), known
    if known is None:
        raise SpecError(
            "--gpu-hours needs --flops-per-second, what one device sustains (its peak times the "
            "utilisation, as in 4e14), here or in the recipe"
        )
    return flops_in(parse_quantity(str(hours), name="--gpu-hours"), known), known


def _write_specs(out: Path, found: Plan) -> None:
    from bayeslr.runs import write_atomically

    specs = [proposal.spec for proposal in found.proposals]
    if out.suffix:
        write_atomically(out, "".join(f"{spec.to_json()}\n" for spec in specs).encode())
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make the folder {out}: {error.strerror or error}; name another place"
        ) from error
    for spec in specs:
        write_atomically(out / f"{spec.run_id}.json", f"{spec.to_json()}\n".encode())


def _lines(
    found: Plan, predictions: Sequence[dict[Any, Any]], flops_per_second: float | None = None
) -> list[str]:
    lines = ["If nothing more is run:"]
    lines += [
        f"  {row['target_id']}: peak LR {format_lr(row['lr'])} "
        f"({format_interval(row['lr_q05'], row['lr_q95'])}), expected regret "
        f"{row['regret_mean']:.2g} nats, as much as {format_extra_tokens(row['extra_tokens'])} "
        "more tokens"
        for row in predictions
    ]
    if not found.proposals:
        return [*lines, "", f"No run is proposed: {found.stop_reason}."]
    head = ("model", "tokens", "batch", "LR", "FLOPs", "saves, nats", "saves, FLOPs", "diverges")
    cells: list[tuple[str, ...]] = [head]
    cells += [
        (
            str(p.spec.shape.get("name", format_quantity(p.spec.n_active))),
            format_quantity(p.spec.tokens), format_quantity(p.spec.batch_tokens),
            f"{format_lr(p.spec.lr)}{'*' if p.repeat else ''}", format_quantity(p.flops),
            f"{p.saves_nats:.2g}", format_quantity(p.saves_flops), risk(p.p_diverge, "{:.0f} %"),
        )
        for p in found.proposals
    ]  # fmt: skip
    if flops_per_second is not None:
        rate = flops_per_second
        column = ["GPU-hours", *(f"{gpu_hours(p.flops, rate):.3g}" for p in found.proposals)]
        cells = [(*row[:5], hour, *row[5:]) for row, hour in zip(cells, column, strict=True)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines += ["", "Next runs, the best first:"]
    for number, row in enumerate(cells):
        first = f"{number:>4}" if number else "    "
        lines.append("  ".join([first, *(c.rjust(w) for c, w in zip(row, widths, strict=True))]))
    lines += [
        f"{number:>4}  goes on from {p.spec.continues} at {format_quantity(p.spec.continues_at)} "
        "tokens: its folder belongs beside that one's"
        for number, p in enumerate(found.proposals, start=1) if p.spec.continues is not None
    ]  # fmt: skip
    lines += [
        f"{number:>4}  with {', '.join(f'{name} {x:.3g}' for name, x in p.changed.items())}"
        for number, p in enumerate(found.proposals, start=1) if p.changed
    ]  # fmt: skip
    if any(p.repeat for p in found.proposals):
        lines.append("   * made before; again with another seed, against the noise")
    cost = sum(p.flops for p in found.proposals)
    saved = sum(p.saves_flops for p in found.proposals)
    count = len(found.proposals)
    runs = "One more run" if count == 1 else f"{count} more runs"
    return [
        *lines, "",
        f"{runs}, {format_flops(cost, flops_per_second)}, would save an expected "
        f"{format_flops(saved, flops_per_second)} at the targets: their mean regret, were valleys "
        f"plain parabolas, falls from {found.regret_now:.2g} to {found.regret_after:.2g} nats. "
        f"Then stop: {found.stop_reason}.",
    ]  # fmt: skip
