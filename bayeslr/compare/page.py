"""The report of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslr import __version__
from bayeslr.compare import figure
from bayeslr.compare.arms import BLEND, TOLD, Arm, Choice
from bayeslr.compare.scores import Estimate
from bayeslr.compare.stability import FEATURES, stability_rows
from bayeslr.compare.verdict import PARADIGM
from bayeslr.report.rendering import render_page
from bayeslr.report.text import interval_text, scale_text
from bayeslr.runs import write_atomically
from bayeslr.specs import Target
from bayeslr.units import counted, format_lr, format_quantity

if TYPE_CHECKING:
    from bayeslr.compare import Comparison


def write_report(result: Comparison, targets: Sequence[Target], path: Path) -> None:
    """Write the report, all or nothing. Raises: StorageError if the file cannot be written."""
    write_atomically(path, render(result, targets).encode("utf-8"))


def render(result: Comparison, targets: Sequence[Target]) -> str:
    """The report's HTML, in the style of the planner's report."""
    return render_page("bayeslr.compare", _page(result, targets))


def _page(result: Comparison, targets: Sequence[Target]) -> dict[str, Any]:
    recipe, winner = result.recipe, result.verdict.winner
    num_runs = sum(len(cell.losses) for cell in result.cells)
    stability = [
        {"target": t.target_id, **stability_rows(result.cells, result.arms, t.target_id)}
        for t in targets
    ]
    keys = {row["key"] for table in stability for row in table["rows"]}
    return {
        "version": __version__,
        "written_on": datetime.date.today().isoformat(),
        "title": "Fitting against transfer"
        if winner is None
        else f"Fitting against transfer: {PARADIGM[winner]} served better",
        "eyebrow": [
            recipe.name,
            f"at most {format_quantity(recipe.proxy_flops)} FLOPs of proxies each",
            f"{num_runs} held-out runs, {counted(recipe.num_seeds, 'seed')}",
        ],
        "sentence": result.verdict.sentence,
        "plain": winner is None,
        "mark": "Undecided" if winner is None else "Decided",
        "rule": (
            "A paradigm counts as better if runs at the other's choices diverged and all at its "
            "own ended well, or if the 90 % interval of the difference at the chosen LRs excludes "
            "zero. Where there is no difference, 1 comparison in 10 finds one."
        ),
        "outcome_lead": (
            "Each held-out model, trained at the LR that each way of choosing named for it, under "
            "its own parametrisation."
        ),
        "tables": [_outcome_table(result, target) for target in targets],
        "intervals": _interval_note(result),
        "differences": _difference_rows(result),
        "valley_lead": (
            f"Loss against LR of the held-out models, at {_multiples(recipe.multiples)} times each "
            "choice. A dot is a run, with what all runs of its seed share taken out; the lines "
            "join the means. Losses of two parametrisations compare, their LRs do not. Below each "
            "figure: what each way of choosing had expected, with 90 % intervals."
        ),
        "legend": _legend(result.arms),
        "valleys": [_valley(result, target, i) for i, target in enumerate(targets)],
        "stability": stability,
        "has_features": any(key.startswith(FEATURES) for key in keys),
        "stability_lead": _stability_lead(keys),
        "modules": _modules(result),
        "posterior": _posterior(result),
        "left_out": dict(result.details.get("left_out", {})),
        "compute": [_compute_row(result, arm) for arm in result.arms],
        "facts": [
            ("Recipe", f"{recipe.name}, seed {recipe.seed}, runner {recipe.fitting.runner}"),
            ("Folder", str(result.out)),
            (
                "Fits",
                "fitting/fit, fitting/fit-two-stage, transfer/fit and those of the posterior; each "
                "opens with bayeslr predict or bayeslr report",
            ),
            ("Every run", f"runs.parquet, {result.runs.frame['run_id'].nunique()} runs"),
        ],
        "numbers": json.dumps(result.document(), allow_nan=False).replace("<", "\\u003c"),
    }


def _multiples(multiples: Sequence[float]) -> str:
    told = [f"{multiple:g}" for multiple in sorted(multiples)]
    return f"{', '.join(told[:-1])} and {told[-1]}" if len(told) > 1 else told[0]


def _outcome_table(result: Comparison, target: Target) -> dict[str, Any]:
    rows = []
    for outcome in result.outcomes:
        if outcome.target_id != target.target_id:
            continue
        arm = next(a for a in result.arms if a.name == outcome.arm)
        ended = sum(state == "ok" for state in outcome.states)
        bad = sorted({state for state in outcome.states if state != "ok"})
        rows.append(
            {
                "arm": outcome.arm,
                "variant": outcome.variant,
                "lr": format_lr(outcome.lr),
                "interval": _choice_text(_choice(arm, target.target_id)),
                "loss": _cell(outcome.loss),
                "regret": _cell(outcome.regret),
                "gap": _cell(outcome.gap),
                "best_lr": "-" if outcome.best_lr is None else format_lr(outcome.best_lr),
                "edge": "at the edge" if outcome.beyond_edge else "",
                "lost": bool(bad),
                "runs": f"{ended} of {len(outcome.states)}{' ' if bad else ''}{', '.join(bad)}",
            }
        )
    return {"target": target.target_id, "scale": scale_text(target), "rows": rows}


def _choice(arm: Arm, target_id: str) -> Choice:
    return next(c for c in arm.choices if c.target_id == target_id)


def _choice_text(choice: Choice) -> str:
    return interval_text(choice.lr_q05, choice.lr_q95)


def _cell(estimate: Estimate | None, *, sign: bool = False) -> dict[str, str]:
    if estimate is None:
        return {"value": "-", "interval": ""}
    if estimate.is_nothing:
        return {"value": "0", "interval": "the same runs" if sign else "the best tried"}
    form = "{:+.4f}" if sign else "{:.4f}"
    interval = ""
    if estimate.low is not None and estimate.high is not None:
        interval = f"{form.format(estimate.low)} to {form.format(estimate.high)}"
    return {
        "value": form.format(estimate.value).replace("-", "−"),
        "interval": interval.replace("-", "−"),
    }


def _interval_note(result: Comparison) -> str:
    if result.recipe.num_seeds < 2:
        return "One seed: no interval can be given."
    noise = ", ".join(
        f"{sd:.4f} nats for {target_id}" for target_id, sd in result.noise.items() if sd is not None
    )
    return (
        "Intervals are Student's t over the seeds, of differences between runs of the same seed: "
        "they see the same batches, and what that does to all of them cancels. Regret is above the "
        "LR with the lowest mean on the own valley, which these runs name themselves; the choice "
        "that is that LR has none. The interval of the loss alone holds what a seed does to all "
        f"runs. Beside that, a loss at a chosen LR scatters by {noise} between seeds."
    )


def _difference_rows(result: Comparison) -> list[dict[str, Any]]:
    rows = []
    for found in result.differences.values():
        if found is None:
            continue
        if found.total.value == 0:
            says = "the same choice"
        elif found.total.low is None:
            says = "one seed: cannot tell"
        elif not found.total.settled:
            says = "cannot tell"
        else:
            says = f"{found.first if found.total.value < 0 else found.second} is better"
        rows.append(
            {
                "first": found.first,
                "second": found.second,
                "total": _cell(found.total, sign=True),
                "by_regret": _cell(found.by_regret, sign=True),
                "by_valley": _cell(found.by_valley, sign=True),
                "targets": len(found.targets),
                "says": says,
            }
        )
    return rows


def _legend(arms: Sequence[Arm]) -> list[dict[str, str]]:
    styles = figure.style_of(list(dict.fromkeys(arm.variant for arm in arms)))
    return [
        {"label": variant, "colour": css, "dash": " ".join(map(str, dash))}
        for variant, (_, css, _, dash) in styles.items()
    ]


def _valley(result: Comparison, target: Target, number: int) -> dict[str, str]:
    cells = [cell for cell in result.cells if cell.target_id == target.target_id]
    lowest: dict[str, float] = {}
    for cell in cells:
        if cell.complete:
            mean = sum(y for y in cell.losses if y is not None) / len(cell.losses)
            lowest[cell.variant] = min(mean, lowest.get(cell.variant, mean))
    return {
        "title": target.target_id,
        "subtitle": scale_text(target),
        "svg": figure.held_out(
            f"valley{number}", cells=cells, arms=result.arms, target_id=target.target_id,
            description=figure.description_of(cells, lowest),
        ),
        "caption": "Lowest mean loss: "
        + ", ".join(f"{variant} {loss:.4f}" for variant, loss in lowest.items())
        + ".",
    }  # fmt: skip


def _stability_lead(keys: set[str]) -> str:
    if any("." in key or key not in ("ended", "half", "twice") for key in keys):
        return "What the trainer recorded of the runs at each choice, mean of the seeds."
    return "This trainer recorded no diagnostics; what the losses alone say."


def _modules(result: Comparison) -> dict[str, Any] | None:
    found = result.details.get("modules")
    if found is None:
        return None
    kept = found["multipliers"]
    rows = [
        {
            "label": _multiplier_text(one["multipliers"]),
            "loss": one["state"] if one["loss"] is None else f"{one['loss']:.4f}",
            "kept": "kept" if one["multipliers"] == kept else "",
        }
        for one in found["tried"]
    ]
    return {
        "lead": (
            "One module group after the other on the base shape, one seed; the lowest loss so far "
            f"stands. What is carried over: {_multiplier_text(kept)}."
        ),
        "rows": rows,
    }


def _multiplier_text(multipliers: dict[str, float]) -> str:
    if not multipliers:
        return "all 1"
    return ", ".join(f"{group} × {value:g}" for group, value in sorted(multipliers.items()))


def _posterior(result: Comparison) -> dict[str, Any] | None:
    found = result.details.get("posterior")
    if found is None:
        return None
    arm = next(a for a in result.arms if a.name == BLEND)
    rows = [
        {
            "name": f"card {card} alone",
            "weight": f"{100 * found['weights'][card]:.0f} %",
            "score": f"{found['scores'][card]:+.2f}".replace("-", "−")
            if card in found["scores"]
            else "-",
            "cells": [
                {"lr": format_lr(one["lr"]), "interval": _choice_text(Choice(**one))}
                for one in found["alone"][card]
            ],
        }
        for card in found["weights"]
    ]
    both = [{"lr": format_lr(c.lr), "interval": _choice_text(c)} for c in arm.choices]
    return {
        "lead": (
            "The same runs under the rules of the transfer, base shape and larger rungs, fitted "
            "under two prior cards: one in which the LR stays put, one with a published law's "
            "exponents. The data may overrule either."
        ),
        "sentence": found["sentence"],
        "targets": [c.target_id for c in arm.choices],
        "rows": [*rows, {"name": "both", "weight": "100 %", "score": "", "cells": both}],
    }


def _compute_row(result: Comparison, arm: Arm) -> dict[str, str]:
    return {
        "arm": arm.name,
        "told": TOLD[arm.name],
        "runs": str(arm.proxy_runs),
        "flops": format_quantity(arm.proxy_flops),
        "share": f"{100 * arm.proxy_flops / result.recipe.proxy_flops:.0f} %",
        "note": arm.note,
    }
