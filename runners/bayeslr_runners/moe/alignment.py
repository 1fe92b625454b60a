"""How well a step of the optimizer is aligned with what the matrices read.

Shape suffixes as in `model`; R members, one outside a stack; N fan-in, M fan-out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bayeslr_runners.moe.experts import Routing, expert_inputs, grouped_matmul, swiglu
from bayeslr_runners.moe.model import Attention, MoeLayer

Direction = Callable[[nn.Parameter], Tensor]
"""The step of a parameter, in its shape and on any scale."""


def log_alignment_ratio(x: Tensor, step: Tensor, count: int = 1) -> Tensor:
    """Log to base N of RMS(x step) / (RMS(x) RMS(step)) of each of ``count`` members, (R,).

    x: (..., N), step: (..., N, M), members first. 1 is full alignment: every input lies along the
    one direction that a step of rank one answers to. 1/2 is none: a step that is random to them.
    In Frobenius norms the ratio is N^(value - 1): 1, and 1 / sqrt(N). NaN for a step of zero.
    Source: the log alignment ratio of Everett et al. 2024 (arXiv 2407.05872).
    """
    x_RTN = x.float().reshape(count, -1, x.shape[-1])
    step_RNM = step.float().reshape(count, x.shape[-1], -1)
    most = x_RTN.square().sum((1, 2)) * step_RNM.square().sum((1, 2))
    return _log_ratio((x_RTN @ step_RNM).square().sum((1, 2)), most, x.shape[-1])


def expert_log_alignment_ratio(
    x_AN: Tensor, step_ENM: Tensor, routing: Routing, count: int = 1
) -> Tensor:
    """`log_alignment_ratio` of all experts together, each with the assignments that it got."""
    load_E = routing.load_E.flatten()
    expert_A = torch.repeat_interleave(torch.arange(len(load_E), device=x_AN.device), load_E)

    def by_expert(values: Tensor) -> Tensor:
        square_A = values.float().square().sum(-1)
        return square_A.new_zeros(len(load_E)).index_add_(0, expert_A, square_A)

    answered_E = by_expert(grouped_matmul(x_AN, step_ENM, routing))
    most_E = by_expert(x_AN) * step_ENM.float().square().sum((-2, -1)).flatten()
    answered_R, most_R = (one.view(count, -1).sum(1) for one in (answered_E, most_E))
    return _log_ratio(answered_R, most_R, x_AN.shape[-1])


def step_alignment(
    module: nn.Module, x: Tensor, direction: Direction, count: int = 1
) -> Iterator[tuple[str, Tensor]]:
    """Module group and log alignment ratio (R,) of each matrix of a layer that reads ``x``."""
    if isinstance(module, Attention):
        yield "attention", log_alignment_ratio(x, direction(module.qkv).mT, count)
        yield "attention", log_alignment_ratio(module.attend(x), direction(module.out).mT, count)
    elif isinstance(module, MoeLayer):
        up, down = direction(module.experts_up), direction(module.experts_down)
        if module.router is None:
            hidden = swiglu(x @ module.experts_up.squeeze(-3))
            yield "expert_up", log_alignment_ratio(x, up, count)
            yield "expert_down", log_alignment_ratio(hidden, down, count)
        else:
            yield "router", log_alignment_ratio(x, direction(module.router).mT, count)
            routing, _ = module.route(x, module.router)
            x_AD, hidden_AF = expert_inputs(x, routing, module.experts_up)
            yield "expert_up", expert_log_alignment_ratio(x_AD, up, routing, count)
            yield "expert_down", expert_log_alignment_ratio(hidden_AF, down, routing, count)
        if module.shared_up is not None and module.shared_down is not None:
            hidden = swiglu(x @ module.shared_up)
            yield "expert_up", log_alignment_ratio(x, direction(module.shared_up), count)
            yield "expert_down", log_alignment_ratio(hidden, direction(module.shared_down), count)


def _log_ratio(answered: Tensor, most: Tensor, fan_in: int) -> Tensor:
    """From squared Frobenius norms; the ratio of RMS norms is N times theirs."""
    return 1.0 + 0.5 * torch.log(answered / most) / math.log(max(fan_in, 2))
