"""What trainers record of a run beside its loss: the column ``diagnostics``, a mapping a row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

DIAGNOSTICS = "diagnostics"

# Names that the trainer gives, in the order of tables; what is not here follows as it is called.
LABELS = {
    "loss_spikes": ("loss spikes", "how many"),
    "spike_height": ("highest spike, nats", "above the level before it"),
    "spike_steps": ("longest spike, steps", ""),
    "grad_norm": ("gradient norm", "before clipping, before the decay"),
    "train_loss": ("training loss", "smoothed, at the end"),
    "max_attention_logit": ("largest attention logit", ""),
    "max_load": ("largest load of an expert", "1 is even"),
    "effective_experts_min": ("experts in effect", "least of the layers"),
    "router_entropy_min": ("router entropy, nats", "least of the layers"),
    "representation_change": (
        "change of the representation",
        "since initialisation, relative: features are learnt where it is of order 1",
    ),
    "effective_rank": ("effective rank of it", "at the end"),
}
FAMILIES = {
    "activation_rms": ("RMS of activations", "at the end"),
    "update_ratio": ("update over weight", "RMS, one step before the decay"),
    "update_alignment": ("alignment of updates", "log alignment ratio: 1 full, 1/2 random"),
}
OF_THE_TRUNK = ("grad_norm", "update_ratio")
"""Diagnostics that fade with the LR: at the end of the decay they say nothing of the choice."""

BOOKKEEPING = ("tokens_seen", "tokens_trained", "threads")


def label_of(name: str) -> tuple[str, str]:
    """What a flat name is called, and what it means."""
    if name in LABELS:
        return LABELS[name]
    stem, _, part = name.partition(".")
    label, meaning = FAMILIES.get(stem, (stem.replace("_", " "), ""))
    return (f"{label}, {part.replace('.', ', ')}" if part else label), meaning


def read_diagnostics(cell: Any) -> dict[str, float]:
    """Numbers of a row's diagnostics, a mapping or its JSON text, by flat name; else none."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:  # a column of the user's that is only called so
            return {}
    return dict(_flat(cell)) if isinstance(cell, Mapping) else {}


def _flat(value: Mapping[str, Any], path: str = "") -> list[tuple[str, float]]:
    """Numbers of a nested mapping, with dotted names; lists are by layer, counted from 1."""
    found: list[tuple[str, float]] = []
    for key, entry in value.items():
        name = f"{path}.{key}".strip(".")
        if isinstance(entry, Mapping):
            found += _flat(entry, name)
        elif isinstance(entry, list | tuple):
            found += _flat({f"layer {i}": one for i, one in enumerate(entry, 1)}, name)
        elif isinstance(entry, int | float) and math.isfinite(entry):
            found.append((name, float(entry)))
    return found
