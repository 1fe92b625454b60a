"""The verb that compares the two paradigms."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bayeslr.compare import Comparison


def compare(
    recipe: Annotated[str, typer.Argument(help="Path of a recipe, or the name of a shipped one.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the comparison [default: RECIPE-out].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the recipe's seed.")] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Ask again for failed and lost runs.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained, and its cost.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Fitting against transfer at equal proxy compute, judged on held-out larger models."""
    from bayeslr import compare as library
    from bayeslr.cli.sweeps import Lines, stop_on_sigterm

    opened = library.load_compare_recipe(recipe)
    if seed is not None:
        opened = library.with_seed(opened, seed)
    if dry_run:
        plan = library.describe(opened)
        _echo(json_module.dumps(plan, indent=1)) if json else _echo(*_plan_lines(plan))
        return
    stop_on_sigterm()
    folder = Path(f"{opened.name}-out") if out is None else out
    result = library.compare(opened, folder, retry=retry, progress=Lines())
    if json:
        _echo(json_module.dumps(result.document(), indent=1, allow_nan=False))
    else:
        _echo(*_result_lines(result))


def _result_lines(result: Comparison) -> list[str]:
    from bayeslr.units import format_lr

    width = max(len(o.arm) for o in result.outcomes)
    lines = []
    for target_id in dict.fromkeys(o.target_id for o in result.outcomes):
        lines.append(f"{target_id}, at each choice (mean of {result.recipe.num_seeds} seeds):")
        head = f"{'LR':>8s}  {'loss':>7s}  {'regret, nats (90 % interval)':30s}  valley"
        lines.append(f"  {'':{width}s}  {head}")
        for outcome in result.outcomes:
            if outcome.target_id != target_id:
                continue
            ended = [s for s in outcome.states if s != "ok"]
            loss = f"{outcome.loss.value:.4f}" if outcome.loss else "-"
            regret = _estimate(outcome.regret) if outcome.regret else ", ".join(ended)
            lines.append(
                f"  {outcome.arm:{width}s}  {format_lr(outcome.lr):>8s}  {loss:>7s}  "
                f"{regret:30s}  {outcome.variant}"
            )
    lines += ["", result.verdict.sentence, ""]
    left = ("report.html", "compare.json", "runs.parquet", "fitting", "transfer", "held-out")
    return [*lines, f"In {result.out}: {', '.join(left)}"]


def _estimate(estimate: Any) -> str:
    if estimate.is_nothing:
        return "0 (the best tried)"
    if estimate.low is None:
        return f"{estimate.value:.4f}"
    return f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    from bayeslr.units import format_quantity as quantity

    transfer, fitting = plan["transfer"], plan["fitting"]
    cells = ", ".join(
        f"{cell['shape']} to {quantity(cell['tokens'])} tokens" for cell in fitting["cells"]
    )
    grid = transfer["grid"]
    lines = [
        f"comparison {plan['name']}: runner {plan['runner']}, proxies of each arm within "
        f"{quantity(plan['proxy_flops'])} FLOPs",
        f"fitting: {len(fitting['lrs'])} LRs, {cells}",
        f"transfer under {transfer['parametrization']}: {len(grid)} LRs from {grid[0]['lr']:.4g} "
        f"to {grid[-1]['lr']:.4g} on the base shape, {quantity(grid[0]['flops'])} FLOPs a run",
    ]
    if transfer["modules"]:
        lines.append(f"  LR multipliers of {', '.join(transfer['modules'])}")
    if transfer["rungs"]:
        lines.append(f"  larger shapes under the same rules: {', '.join(transfer['rungs'])}")
    lines += [
        f"held out: {target['target_id']}, N={quantity(target['n_active'])} of "
        f"{quantity(target['n_total'])}, D={quantity(target['tokens'])}, at most "
        f"{target['runs_at_most']} runs of {quantity(target['flops_per_run'])} FLOPs"
        for target in plan["targets"]
    ]
    total = quantity(plan["held_out_flops_at_most"])
    return [*lines, f"held-out runs together: at most {total} FLOPs, beside the proxies"]


def _echo(*lines: str) -> None:
    for line in lines:
        typer.echo(line)
