"""AdamW whose parameter groups follow a parametrisation's table; for any torch module."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from bayeslr.errors import SpecError
from bayeslr_runners.moe.options import TrainOptions
from bayeslr_runners.moe.parametrization import Parametrization


def param_groups(
    module: nn.Module,
    naming: Mapping[str, str],
    rules: Parametrization,
    *,
    lr: float,
    weight_decay: float,
    weight_decay_kind: str = "coupled",
    eps: float = 1e-8,
) -> list[dict[str, Any]]:
    """Optimizer parameter groups of any module, one a module group, for ``torch.optim.AdamW``.

    naming: patterns of parameter names (as in `fnmatch`) to module groups; the first match counts.
    weight_decay: with ``coupled`` a step shrinks weights by LR x weight_decay, as PyTorch does;
    with ``independent`` by weight_decay x (LR / peak LR), whatever the LR. The LR rule of a group
    changes the coupled shrinkage and its weight-decay rule makes up for it, so the independent one
    follows the product of the two.
    Raises: SpecError if a parameter's name matches no pattern.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        found.setdefault(group_of(name, naming), []).append(parameter)
    groups = []
    for group, parameters in found.items():
        rule = rules.groups[group]
        decay = weight_decay * rule.weight_decay
        if weight_decay_kind == "independent":
            decay /= lr
        groups.append(
            {
                "params": parameters,
                "group": group,
                "lr": lr * rule.lr,
                "peak_lr": lr * rule.lr,
                "weight_decay": decay,
                "eps": eps * rule.eps,
            }
        )
    return groups


def group_of(name: str, naming: Mapping[str, str]) -> str:
    """Module group of a parameter. Raises: SpecError if its name matches no pattern."""
    for pattern, group in naming.items():
        if fnmatchcase(name, pattern):
            return group
    raise SpecError(
        f"parameter {name!r} matches none of the naming patterns {', '.join(naming)}; add one"
    )


def build_adamw(
    groups: list[dict[str, Any]], rules: Parametrization, options: TrainOptions
) -> torch.optim.AdamW:
    """AdamW over `param_groups`, with the betas that the parametrisation asks for."""
    beta1, beta2 = (
        1.0 - min(1.0, (1.0 - beta) * rules.one_minus_beta)
        for beta in (options.beta1, options.beta2)
    )
    return torch.optim.AdamW(groups, betas=(beta1, beta2), fused=True)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's LR to a share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
