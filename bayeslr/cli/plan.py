"""The verb that says what to run next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayeslr.cli.model import risk
from bayeslr.errors import SpecError, StorageError
from bayeslr.units import (
    format_extra_tokens,
    format_interval,
    format_lr,
    format_quantity,
    parse_quantity,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bayeslr.acquire import Plan


def plan(
    fit: Annotated[Path, typer.Argument(help="Fit folder.", show_default=False)],
    space: Annotated[str, typer.Option("--space", help="Recipe whose space to choose from.")],
    budget: Annotated[str, typer.Option("--budget", help="FLOPs to spend, such as 1e18.")],
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

    if out is not None and out.suffix not in ("", ".jsonl", ".json"):
        raise SpecError(f"-o {out} must end in .jsonl, or be a folder (no suffix)")
    flops = parse_quantity(budget, name="--budget")
    posterior, recipe = load(fit), open_recipe(space)
    found = make_plan(posterior, recipe, budget_flops=flops, num_runs=num_runs)
    table = predict(posterior, targets_of(recipe, find_runner(recipe)))
    if out is not None:
        _write_specs(out, found)
    if json:
        plan = {"budget_flops": flops, **dataclasses.asdict(found), "predictions": table}
        typer.echo(json_text(plan))
        return
    rows: list[dict[Any, Any]] = table.to_dict("records")
    typer.echo(f"Budget: {flops:,.0f} FLOPs")
    for line in _lines(found, rows):
        typer.echo(line)
    if out is not None and found.proposals:
        typer.echo(f"Run specs written to {out}")


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


def _lines(found: Plan, predictions: Sequence[dict[Any, Any]]) -> list[str]:
    lines = ["If nothing more is run:"]
    lines += [
        f"  {row['target_id']}: peak LR {format_lr(row['lr'])} "
        f"({format_interval(row['lr_q05'], row['lr_q95'])}), expected regret "
        f"{row['regret_mean']:.2g} nats, as much as {format_extra_tokens(row['extra_tokens'])} "
        "more tokens"
        for row in predictions
    ]
    if not found.proposals:
        return [*lines, "", f"Nothing more pays: {found.stop_reason}."]
    head = ("model", "tokens", "batch", "LR", "FLOPs", "saves, nats", "saves, FLOPs", "diverges")
    cells = [head] + [
        (
            str(p.spec.shape.get("name", format_quantity(p.spec.n_active))),
            format_quantity(p.spec.tokens), format_quantity(p.spec.batch_tokens),
            f"{format_lr(p.spec.lr)}{'*' if p.repeat else ''}", format_quantity(p.flops),
            f"{p.saves_nats:.2g}", format_quantity(p.saves_flops), risk(p.p_diverge, "{:.0f} %"),
        )
        for p in found.proposals
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines += ["", "Next runs, the best first:"]
    for number, row in enumerate(cells):
        first = f"{number:>4}" if number else "    "
        lines.append("  ".join([first, *(c.rjust(w) for c, w in zip(row, widths, strict=True))]))
    lines += [
        f"{number:>4}  goes on from {p.spec.continues} at {format_quantity(p.spec.continues_at)} "
        "tokens: its folder belongs beside that one's"
        for number, p in enumerate(found.proposals, start=1) if p.spec.continues is not None
    ]  # fmt: skip
    if any(p.repeat for p in found.proposals):
        lines.append("   * made before; again with another seed, against the noise")
    cost = sum(p.flops for p in found.proposals)
    saved = sum(p.saves_flops for p in found.proposals)
    count = len(found.proposals)
    runs = "One more run" if count == 1 else f"{count} more runs"
    return [
        *lines, "",
        f"{runs}, {format_quantity(cost)} FLOPs, would save an expected {format_quantity(saved)} "
        "FLOPs at the targets: their mean regret, were valleys plain parabolas, falls from "
        f"{found.regret_now:.2g} to {found.regret_after:.2g} nats. Then stop: {found.stop_reason}.",
    ]  # fmt: skip
