"""The run's record file: JSON lines, appended whole or not at all, never twice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bayeslr.errors import StorageError
from bayeslr.specs import RunSpec
from bayeslr.units import train_flops
from bayeslr_runners.moe.data import Corpus
from bayeslr_runners.moe.measure import Measurement
from bayeslr_runners.moe.shapes import MoeShape

SOURCE = "bayeslr_runners.moe"
_FROM_SPEC = (
    "run_id", "family", "parametrization", "optimizer", "schedule", "warmup_tokens",
    "decay_fraction", "final_lr_fraction", "lr", "weight_decay", "weight_decay_kind", "n_active",
    "n_total", "param_convention", "batch_tokens", "seq_len", "seed",
)  # fmt: skip


class RecordLog:
    """Appends rows of the run table to a file.

    A last line that a killed process left torn is cut off on opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = _repair(path)

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a row, unless the run already has one of its status at the same tokens.

        A resumed run passes again through what it did after its last checkpoint; the first
        measurement stands. Numbers that JSON cannot say become null.
        Raises: StorageError if the disk refuses; the file is then as it was.
        """
        if any(all(old[key] == values[key] for key in ("tokens", "status")) for old in self.rows):
            return
        row = dict(finite(values))
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, before)
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}; free some space and start the run "
                "again, it goes on from its last checkpoint"
            ) from error
        self.rows.append(row)


def build_row(
    spec: RunSpec,
    *,
    status: str,
    tokens: int,
    planned_tokens: int,
    flops_tokens: int,
    schedule_state: str,
    wall_s: float,
    corpus: Corpus,
    device: str,
    diagnostics: Mapping[str, Any],
    status_reason: str = "",
    measured: Measurement | None = None,
    trunk_tokens: int | None = None,
) -> dict[str, Any]:
    """A row of the run table.

    tokens: the horizon asked for where it was reached; what was seen differs from it by at most
    half a batch, and stands in the diagnostics.
    flops_tokens: passed through the network on the way there, decay branches left behind aside.
    trunk_tokens: where the trunk stands that was kept, if one was.
    """
    shape = MoeShape.from_mapping(spec.shape)
    copied = {key: getattr(spec, key) for key in _FROM_SPEC}
    kept = {} if trunk_tokens is None else {"trunk_tokens": trunk_tokens}
    return {
        **copied,
        **kept,
        "arch": shape.arch,
        "d_model": shape.d_model,
        "n_layers": shape.n_layers,
        "n_experts": shape.n_experts,
        "top_k": shape.top_k,
        "tokens": tokens,
        "planned_tokens": planned_tokens,
        "loss": measured.loss if measured else None,
        "loss_kind": "val",
        "loss_se": measured.loss_se if measured else None,
        "status": status,
        "status_reason": status_reason,
        "flops": train_flops(spec.n_active, flops_tokens),
        "wall_s": round(wall_s, 3),
        "device": device,
        "source": SOURCE,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "schedule_state": schedule_state,
        "data_fingerprint": corpus.fingerprint,
        "diagnostics": {**diagnostics, **(measured.diagnostics if measured else {})},
    }


def finite(value: Any) -> Any:
    """The same value with None for each NaN or infinity, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _repair(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise StorageError(
            f"{path} holds a line that is not JSON: {error}; move the file away to start afresh"
        ) from error
