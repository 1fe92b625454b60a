"""Which runs can be trained as one program; loads no PyTorch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from bayeslr.errors import SpecError
from bayeslr.specs import RunSpec
from bayeslr_runners.moe.options import Options

# What the members of a stack may differ in (those that go on from other runs each have their own),
# and the only option that they may.
FREE = ("run_id", "family", "lr", "weight_decay", "seed", "continues")
FREE_OPTION = "lr_multipliers"

MAX_CPU_WIDTH = 96
"""Width above which a stack on a CPU only keeps its runs waiting for each other. On one core two to
eight members took 1.2 to 1.4 times less time than one by one at width 32, 1.03 to 1.07 at 96,
0.98 to 1.02 at 128 and 0.95 to 1.02 at 256 (docs/log.md)."""


def stack_key(spec: RunSpec) -> str:
    """Equal for runs that are better trained as one program: all but what is `FREE` is shared.

    LR multipliers of module groups may differ too; family and run_id are names.
    """
    on_cpu = Options.from_mapping(spec.options).train.device == "cpu"
    alone = on_cpu and spec.shape.get("d_model", 0) > MAX_CPU_WIDTH
    return json.dumps([_shared(spec), spec.run_id if alone else None], sort_keys=True)


def check_stack(specs: Sequence[RunSpec]) -> None:
    """Raise SpecError if the runs cannot be trained as one program."""
    if len({spec.run_id for spec in specs}) < len(specs):
        raise SpecError("a stack: two of its runs have the same run_id")
    first = _shared(specs[0])
    for spec in specs[1:]:
        values = _shared(spec)
        for name in first:
            if values[name] != first[name]:
                raise SpecError(
                    f"runs {specs[0].run_id} and {spec.run_id} cannot be trained as one program: "
                    f"{name} is {first[name]!r} and {values[name]!r}; members of a stack may "
                    "differ in lr, weight_decay, seed and lr_multipliers alone"
                )


def _shared(spec: RunSpec) -> dict[str, Any]:
    """What all members of a stack have in common."""
    values = {k: v for k, v in dataclasses.asdict(spec).items() if k not in FREE}
    values["options"] = {k: v for k, v in values["options"].items() if k != FREE_OPTION}
    return values
