"""Transfer rules of a shape against a base shape, as a document to print; loads no PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bayeslr.errors import SpecError
from bayeslr_runners.moe.options import ScalingOptions
from bayeslr_runners.moe.parametrization import SOURCES, parametrization
from bayeslr_runners.moe.shapes import MoeShape

RUN_KEYS = ("tokens", "batch_tokens")


def transfer_rules(
    name: str, scaling: ScalingOptions, base: Mapping[str, Any], target: Mapping[str, Any]
) -> dict[str, Any]:
    """What every module group gets at ``target`` under a parametrisation based on ``base``.

    base, target: keys of a shape, and ``tokens`` and ``batch_tokens`` of the run where the rules
    of horizon and batch are wanted. What ``target`` leaves out is as in ``base``, but for the
    number of heads and the expert width, which follow d_model.
    Returns: JSON values. ``init_std`` and the multiplier of the output are absolute; LR, weight
    decay (coupled to the LR) and epsilon are multipliers of the base's.
    Raises: SpecError if a key or a rule is broken, or the tokens or batch of the target have none
    to be compared with.
    """
    base_shape = MoeShape.from_mapping(_shape_part(base))
    full_target = completed(base, target)
    scaling = dataclasses.replace(
        scaling,
        base_shape=_shape_part(base),
        base_tokens=base.get("tokens", scaling.base_tokens),
        base_batch_tokens=base.get("batch_tokens", scaling.base_batch_tokens),
    )
    for key in RUN_KEYS:
        if key in target and getattr(scaling, f"base_{key}") is None:
            raise SpecError(
                f"the target has {key} ({target[key]}) but the base has none, so what depends on "
                f"their ratio cannot be told; give the {key} at which the LR was tuned in the base"
            )
    shape = MoeShape.from_mapping(_shape_part(full_target))
    at_base, at_target = (
        parametrization(
            name, one, scaling, tokens=run.get("tokens"), batch_tokens=run.get("batch_tokens")
        )
        for one, run in ((base_shape, base), (shape, full_target))
    )
    groups = {
        group: {"base_init_std": at_base.groups[group].init_std, **dataclasses.asdict(rule)}
        for group, rule in at_target.groups.items()
    }
    n_active, n_total = shape.counts()
    return {
        "parametrization": name,
        "source": SOURCES[name],
        "base": dict(base),
        "target": {**full_target, "n_active": n_active, "n_total": n_total},
        "groups": groups,
        "residual": at_target.residual,
        "attention_scale": at_target.attention_scale,
        "base_attention_scale": at_base.attention_scale,
        "gates": at_target.gates,
        "route_scale": at_target.route_scale,
        "one_minus_beta": at_target.one_minus_beta,
    }


def completed(base: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """The target with every key: head width and the ratio of expert to model width are kept."""
    full = {**base, **target}
    for key in ("n_heads", "d_expert"):
        if key not in target and key in base and "d_model" in target:
            full[key] = max(1, round(base[key] * target["d_model"] / base["d_model"]))
    return full


def _shape_part(point: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in point.items() if key not in RUN_KEYS}
