"""Which runs can be trained as one program; loads no PyTorch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from bayeslr.errors import SpecError
from bayeslr.specs import RunSpec

# What the members of a stack may differ in, and the only option that they may.
FREE = ("run_id", "family", "lr", "weight_decay", "seed")
FREE_OPTION = "lr_multipliers"


def stack_key(spec: RunSpec) -> str:
    """Equal for runs that can be members of one stack: all but LR, weight decay and seed is shared.

    LR multipliers of module groups may differ too; family and run_id are names.
    """
    values = dataclasses.asdict(spec)
    for name in FREE:
        del values[name]
    values["options"] = {k: v for k, v in values["options"].items() if k != FREE_OPTION}
    return json.dumps(values, sort_keys=True)


def check_stack(specs: Sequence[RunSpec]) -> None:
    """Raise SpecError if the runs cannot be trained as one program."""
    if len({spec.run_id for spec in specs}) < len(specs):
        raise SpecError("a stack: two of its runs have the same run_id")
    first = json.loads(stack_key(specs[0]))
    for spec in specs[1:]:
        values = json.loads(stack_key(spec))
        for name in first:
            if values[name] != first[name]:
                raise SpecError(
                    f"runs {specs[0].run_id} and {spec.run_id} cannot be trained as one program: "
                    f"{name} is {first[name]!r} and {values[name]!r}; members of a stack may "
                    "differ in lr, weight_decay, seed and lr_multipliers alone"
                )
