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
from bayeslr.units import counted, format_quantity


def status_of(study: Study) -> dict[str, Any]:
    """State of a sweep as one JSON-safe document; nothing is changed."""
    recipe = study.recipe()
    trials = [t for t in study.trials() if not t.void]
    running = [t for t in trials if not t.finished]
    stop = study.note("stop")
    if stop is not None:
        state = "stopped"
    else:
        state = "running" if any(t.alive for t in running) else "idle"
    return {
        "name": recipe.name,
        "state": state,
        "stop": stop,
        "runs": dict(Counter(t.state for t in trials)),
        "budget_flops": recipe.budget_flops,
        "spent_flops": math.fsum(t.flops for t in trials if t.finished),
        "reserved_flops": math.fsum(t.flops for t in running),
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
    counts = ", ".join(f"{n} {state}" for state, n in sorted(status["runs"].items())) or "none"
    lines = [
        f"sweep {status['name']}: {status['state']}",
        f"runs: {counts}",
        f"budget: {format_quantity(status['spent_flops'])} FLOPs spent, "
        f"{format_quantity(status['reserved_flops'])} reserved, of "
        f"{format_quantity(status['budget_flops'])}",
    ]
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
        lines.append(early.line())
    for run in status["running"]:
        seen = "never" if run["lease_s"] is None else f"{run['lease_s']:.0f} s ago"
        alive = "" if run["alive"] else ", DEAD: will be taken over"
        lines.append(f"running: {run['run_id']} by {run['owner']}, last seen {seen}{alive}")
    lines += [f"{run['state']}: {run['run_id']}: {run['reason']}" for run in status["failed"]]
    if status["prediction"] is not None:
        lines += _prediction_lines(status["prediction"])
    return lines


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
