"""Stability and feature learning at the chosen LRs, as the trainer recorded them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bayeslr.compare.arms import Arm
from bayeslr.compare.heldout import Cell
from bayeslr.runs.diagnostics import BOOKKEEPING, FAMILIES, LABELS, label_of

FEATURES = ("representation_change", "effective_rank", *FAMILIES)


def stability_rows(cells: Sequence[Cell], arms: Sequence[Arm], target_id: str) -> dict[str, Any]:
    """Table of one target: names of the arms, and a row a quantity with a value an arm."""
    here = [cell for cell in cells if cell.target_id == target_id]
    chosen = [next(c for c in here if arm.name in c.chosen_by) for arm in arms]
    rows = [
        {
            "key": "ended", "label": "runs that ended well",
            "meaning": "at the choice; on its whole valley",
            "values": [f"{_ended([c])}; {_ended(_valley(here, c))}" for c in chosen],
        },
        {
            "key": "half", "label": "cost of half the LR, nats", "meaning": "",
            "values": [_cost(here, c, 0.5) for c in chosen],
        },
        {
            "key": "twice", "label": "cost of twice the LR, nats", "meaning": "",
            "values": [_cost(here, c, 2.0) for c in chosen],
        },
    ]  # fmt: skip
    found = {name for c in chosen for one in c.diagnostics for name in one} - {*BOOKKEEPING}
    order = [n for n in LABELS if n in found] + sorted(found - set(LABELS))
    for name in order:
        label, meaning = label_of(name)
        values = [_mean(c, name) for c in chosen]
        rows.append({"key": name, "label": label, "meaning": meaning, "values": values})
    return {"arms": [arm.name for arm in arms], "rows": rows}


def _valley(cells: Sequence[Cell], chosen: Cell) -> list[Cell]:
    return [c for c in cells if c.variant == chosen.variant]


def _ended(cells: Sequence[Cell]) -> str:
    states = [state for cell in cells for state in cell.states]
    return f"{sum(state == 'ok' for state in states)} of {len(states)}"


def _cost(cells: Sequence[Cell], chosen: Cell, multiple: float) -> str:
    """Mean loss at a multiple of the choice above that at the choice; a dash where not trained."""
    for cell in _valley(cells, chosen):
        if abs(math.log2(cell.lr / (multiple * chosen.lr))) > 0.02:
            continue
        if not (cell.complete and chosen.complete):
            lost = sorted({state for state in (*cell.states, *chosen.states) if state != "ok"})
            return ", ".join(lost)
        pairs = zip(cell.losses, chosen.losses, strict=True)
        excess = [a - b for a, b in pairs if a is not None and b is not None]
        return f"{sum(excess) / len(excess):+.4f}".replace("-", "−")
    return "-"


def _mean(cell: Cell, name: str) -> str:
    values = [one[name] for one in cell.diagnostics if name in one]
    return f"{sum(values) / len(values):.3g}" if values else "-"
