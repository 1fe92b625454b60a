"""How a sweep stands, read from its study."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bayeslr.errors import DataError
from bayeslr.loop.early import EarlyEnds, early_ends
from bayeslr.loop.planning import prediction_line, rows_of, table_of
from bayeslr.runner_protocol import Study, Trial
from bayeslr.runs import first_reasons
from bayeslr.specs import Recipe
from bayeslr.units import (
    SECONDS_PER_HOUR,
    counted,
    format_flops,
    format_quantity,
    gpu_hours,
)


def status_of(study: Study) -> dict[str, Any]:
    """State of a sweep as one JSON-safe document; nothing is changed."""
    recipe = study.recipe()
    trials = [t for t in study.trials() if not t.void]
    running = [t for t in trials if not t.finished]
    stop = study.note("stop")
    if stop is not None:
        state = "stopped"
    else:
        # Between two batches no run is under way, and whoever chooses the next is at work.
        state = "running" if any(t.alive for t in running) or study.slots() else "idle"
    flops = {
        "budget": recipe.budget_flops,
        "spent": math.fsum(t.flops for t in trials if t.finished),
        "reserved": math.fsum(t.flops for t in running),
    }
    rate = recipe.flops_per_second
    return {
        "name": recipe.name,
        "state": state,
        "stop": stop,
        "runs": dict(Counter(t.state for t in trials)),
        **{f"{name}_flops": number for name, number in flops.items()},
        "flops_per_second": rate,
        **{f"{name}_gpu_hours": rate and gpu_hours(n, rate) for name, n in flops.items()},
        "measured": _measured(trials),
        "prediction": study.note("prediction"),
        "running": [
            {
                "run_id": t.spec.run_id,
                "owner": t.owner,
                "alive": t.alive,
                "lease_s": t.lease_s,
                "reason": t.reason,
            }
            for t in running
        ],
        "dead_workers": sorted({t.owner for t in running if not t.alive}),
        "quarantine": _quarantine(trials, recipe),
        "early_ends": dataclasses.asdict(early_ends(trials)),
        "failed": [
            {"run_id": t.spec.run_id, "state": t.state, "reason": t.status_reason}
            for t in trials
            if t.state in ("failed", "lost")
        ],
    }


def _measured(trials: Sequence[Trial]) -> dict[str, float] | None:
    """What the ended runs took by their own records; None where no record says how long.

    A run's seconds are those of its trainer, on however many devices.
    """
    flops = hours = 0.0
    num_runs = 0
    for trial in trials:
        seconds = [row.get("wall_s") for row in trial.records] if trial.finished else []
        known = [s for s in seconds if isinstance(s, int | float) and math.isfinite(s) and s > 0]
        if known:
            num_runs += 1
            flops += trial.flops
            hours += max(known) / SECONDS_PER_HOUR
    if not num_runs:
        return None
    rate = flops / (hours * SECONDS_PER_HOUR)
    return {"runs": num_runs, "flops": flops, "hours": hours, "flops_per_second": rate}


def _quarantine(trials: Sequence[Trial], recipe: Recipe) -> dict[str, Any]:
    """How many rows of the ended runs break a rule of the run table, and the first reasons."""
    rows = rows_of(trials)
    if not rows:
        return {"rows": 0, "reasons": ""}
    try:
        quarantine = table_of(trials, recipe).quarantine
    except DataError as error:  # there is no other row
        return {"rows": len(rows), "reasons": str(error)}
    return {"rows": len(quarantine), "reasons": first_reasons(quarantine)}


def status_lines(status: dict[str, Any]) -> list[str]:
    """The document for people."""
    rate = status["flops_per_second"]
    counts = ", ".join(f"{n} {state}" for state, n in sorted(status["runs"].items())) or "none"
    lines = [
        f"sweep {status['name']}: {status['state']}",
        f"runs: {counts}",
        f"budget: {format_flops(status['spent_flops'], rate)} spent, "
        f"{format_flops(status['reserved_flops'], rate)} reserved, of "
        f"{format_flops(status['budget_flops'], rate)}",
    ]
    if status["measured"] is not None:
        lines.append(_measured_line(status["measured"], status["budget_flops"], rate))
    if status["stop"] is not None:
        lines.append(f"stopped ({status['stop']['kind']}): {status['stop']['reason']}")
    elif status["state"] == "idle":
        lines.append("no worker is alive; the same `bayeslr sweep` command resumes it")
    if status["quarantine"]["rows"]:
        number = counted(status["quarantine"]["rows"], "row")
        lines.append(f"{number} set aside, for they break a rule of the run table:")
        lines += status["quarantine"]["reasons"].splitlines()
    early = EarlyEnds(**status["early_ends"])
    if early.runs:
        lines.append(early.line(rate))
    for run in status["running"]:
        seen = "never" if run["lease_s"] is None else f"{run['lease_s']:.0f} s ago"
        alive = "" if run["alive"] else ", DEAD: will be taken over"
        lines.append(f"running: {run['run_id']} by {run['owner']}, last seen {seen}{alive}")
    lines += [f"{run['state']}: {run['run_id']}: {run['reason']}" for run in status["failed"]]
    if status["prediction"] is not None:
        lines += _prediction_lines(status["prediction"])
    return lines


def _measured_line(
    measured: Mapping[str, float], budget_flops: float, stated_rate: float | None
) -> str:
    """How fast the runs were, and what the budget takes at that pace if it was put in hours."""
    line = (
        f"{counted(measured['runs'], 'ended run')} trained for {measured['hours']:.3g} hours, "
        f"{format_quantity(measured['flops_per_second'])} FLOP/s"
    )
    if stated_rate is None:
        return line
    whole = gpu_hours(budget_flops, measured["flops_per_second"])
    return (
        f"{line} where the recipe says {format_quantity(stated_rate)}: at that pace the whole "
        f"budget takes {whole:.3g}"
    )


def _prediction_lines(prediction: Mapping[str, Any]) -> list[str]:
    """Of the last fit, which has a verdict, or of the one that chose the newest runs."""
    lines = []
    for row in prediction["targets"]:
        if row["lr"] is None:  # the study keeps null for a number that is not finite
            lines.append(f"prediction: none for {row['target_id']}")
        else:
            lines.append(f"prediction {prediction_line(row, prediction['runs'])}")
    if "verdict" in prediction:
        lines.append(f"the last fit: {prediction['verdict']}")
    if prediction.get("advice"):
        lines.append(f"what helps: {prediction['advice']}")
    return lines
