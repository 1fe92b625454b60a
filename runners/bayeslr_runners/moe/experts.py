"""Token-choice routing and grouped expert matmuls, dropless and without a loop over tokens.

Shape suffixes: T tokens, K chosen experts a token, A = T x K assignments sorted by expert,
E experts, D model width, F expert width (2F: gate and up side by side). In a stack of runs a
leading axis of R members stands before T and before E; its assignments are sorted by member first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    """Assignments of one layer. ``order`` sorts the T x K choices by expert, ``inverse`` undoes it.

    ``token`` is the token of each assignment. ``sizes`` are the assignments of each expert as
    numbers; empty on a GPU, where to read them is to wait for it.
    """

    gate_TK: Tensor
    load_E: Tensor
    order_A: Tensor
    inverse_A: Tensor
    token_A: Tensor
    sizes: list[int]


def gates_and_scores(logits_TE: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Gate of every expert before selection, and the same normalised over experts."""
    if kind.startswith("sigmoid"):
        gate_TE = torch.sigmoid(logits_TE)
        return gate_TE, gate_TE / gate_TE.sum(-1, keepdim=True)
    gate_TE = softmax_over_few(logits_TE)
    return gate_TE, gate_TE


def softmax_over_few(x: Tensor) -> Tensor:
    """Softmax over a last axis of a few entries, taken from row to row of the transposed tensor.

    On the CPU that is twenty times as fast. The result is a transposed view, and what is computed
    from it entry by entry keeps that layout.
    """
    return torch.softmax(x.mT, dim=-2).mT


def route(gate_TE: Tensor, top_k: int, *, bias_E: Tensor | None, normalise: bool) -> Routing:
    """Choose ``top_k`` experts a token; ``bias_E`` takes part in the choice, never in the gate."""
    num_experts = gate_TE.shape[-1]
    choice_TE = gate_TE if bias_E is None else gate_TE + bias_E.unsqueeze(-2)
    expert_TK = choice_TE.detach().topk(top_k, dim=-1).indices
    gate_TK = gate_TE.gather(-1, expert_TK)
    if normalise:
        gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
    members = gate_TE.shape[:-2]
    if members:
        first_expert_R = torch.arange(members[0], device=gate_TE.device) * num_experts
        expert_TK = expert_TK + first_expert_R.view(-1, 1, 1)
    flat_A = expert_TK.reshape(-1)
    order_A = flat_A.argsort(stable=True)
    position_A = torch.arange(len(order_A), device=order_A.device)
    inverse_A = torch.empty_like(order_A).scatter_(0, order_A, position_A)
    load_E = torch.bincount(flat_A, minlength=num_experts * members.numel())
    sizes = [] if use_grouped_mm(load_E) else load_E.tolist()
    token_A = order_A.div(top_k, rounding_mode="floor") if top_k > 1 else order_A
    return Routing(gate_TK, load_E.view(*members, -1), order_A, inverse_A, token_A, sizes)


def use_grouped_mm(x: Tensor) -> bool:
    """Whether PyTorch's own grouped matmul is there and faster: on CUDA, from 2.10."""
    return x.is_cuda and hasattr(F, "grouped_mm")


def load_balance_loss(score_TE: Tensor, load_E: Tensor) -> Tensor:
    """E x sum over experts of (share of assignments) x (mean score), of ONE layer.

    Exactly 1 at uniform routing. Averaging loads over layers first would hide experts that are
    idle in one layer and busy in another. Source: Fedus et al. 2021, eq. 4.
    """
    share_E = load_E.to(score_TE.dtype) / load_E.sum(-1, keepdim=True)
    return score_TE.shape[-1] * (share_E * score_TE.mean(dim=-2)).sum(-1)


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the router logits. Source: Zoph et al. 2022, eq. 5."""
    return torch.logsumexp(logits_TE, dim=-1).square().mean(-1)


def router_entropy(score_TE: Tensor) -> Tensor:
    """Mean over tokens of the entropy of the experts' scores, in nats; of ONE layer."""
    return -torch.xlogy(score_TE, score_TE).sum(-1).mean(-1)


def swiglu_experts(x_TD: Tensor, routing: Routing, up_ED2F: Tensor, down_EFD: Tensor) -> Tensor:
    """Gated sum over each token's experts of SwiGLU(x)."""
    top_k = routing.gate_TK.shape[-1]
    _, hidden_AF = expert_inputs(x_TD, routing, up_ED2F)
    y_AD = grouped_matmul(hidden_AF, down_EFD, routing)
    return apply(_Combine, y_AD, routing.token_A, routing.inverse_A, top_k).view(x_TD.shape)


def expert_inputs(x_TD: Tensor, routing: Routing, up_ED2F: Tensor) -> tuple[Tensor, Tensor]:
    """What the two matrices of each assignment's expert read: (A, D), and (A, F)."""
    top_k = routing.gate_TK.shape[-1]
    x_AD = apply(_Dispatch, x_TD.flatten(0, -2), routing.token_A, routing.inverse_A, top_k)
    gate_A = apply(_Dispatch, routing.gate_TK.reshape(-1, 1), routing.order_A, routing.inverse_A, 1)
    hidden_A2F = grouped_matmul(x_AD, up_ED2F, routing)
    # The gate multiplies the hidden units: its gradient then needs no second grouped matmul.
    if hidden_A2F.is_cuda:
        hidden_AF = swiglu(hidden_A2F) * gate_A.to(hidden_A2F.dtype)
    else:
        hidden_AF = apply(_GatedSwiglu, hidden_A2F, gate_A)
    return x_AD, hidden_AF


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) x up of the two halves of the last axis."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _GatedSwiglu(torch.autograd.Function):
    """SwiGLU times the gate; autograd's own copies the two halves of the gradient together."""

    @staticmethod
    def forward(ctx: Any, hidden_A2F: Tensor, gate_A1: Tensor) -> Tensor:
        gate_AF, up_AF = hidden_A2F.chunk(2, dim=-1)
        silu_AF = F.silu(gate_AF)
        act_AF = silu_AF * up_AF
        ctx.save_for_backward(hidden_A2F, gate_A1, silu_AF, act_AF)
        return act_AF * gate_A1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        hidden_A2F, gate_A1, silu_AF, act_AF = ctx.saved_tensors
        gate_AF, up_AF = hidden_A2F.chunk(2, dim=-1)
        grad_gate_A1 = (grads[0] * act_AF).sum(-1, keepdim=True)
        grad_act_AF = grads[0] * gate_A1
        grad_hidden_A2F = torch.empty_like(hidden_A2F)
        grad_of_gate_AF, grad_of_up_AF = grad_hidden_A2F.chunk(2, dim=-1)
        torch.mul(grad_act_AF, silu_AF, out=grad_of_up_AF)
        torch.ops.aten.silu_backward.grad_input(
            grad_act_AF.mul_(up_AF), gate_AF, grad_input=grad_of_gate_AF
        )
        return grad_hidden_A2F, grad_gate_A1


def grouped_matmul(x_AD: Tensor, weight_EDF: Tensor, routing: Routing) -> Tensor:
    """Each expert's rows of ``x_AD`` times that expert's matrix."""
    if use_grouped_mm(x_AD):
        offsets_E = routing.load_E.flatten().cumsum(0).to(torch.int32)
        x_AD, weight_EDF = x_AD.bfloat16(), weight_EDF.flatten(0, -3).bfloat16()
        out: Tensor = F.grouped_mm(x_AD, weight_EDF, offs=offsets_E)
    else:
        out = apply(_GroupedMatmul, x_AD, weight_EDF, routing.sizes)
    return out


def apply(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    """Typed ``Function.apply``, for functions of one output."""
    out: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return out


class _GroupedMatmul(torch.autograd.Function):
    """One matmul an expert, into one output: autograd's own would copy and zero E times."""

    @staticmethod
    def forward(ctx: Any, x_AD: Tensor, weight_EDF: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x_AD, weight_EDF)
        ctx.sizes = sizes
        out_AF = x_AD.new_empty(x_AD.shape[0], weight_EDF.shape[-1])
        for x, weight, out in zip(
            torch.split(x_AD, sizes), _matrices(weight_EDF), torch.split(out_AF, sizes), strict=True
        ):
            torch.mm(x, weight, out=out)
        return out_AF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_AF,) = grads
        x_AD, weight_EDF = ctx.saved_tensors
        grad_AF = grad_AF.contiguous()
        grad_x_AD, grad_weight_EDF = torch.empty_like(x_AD), torch.empty_like(weight_EDF)
        for x, grad, weight, grad_x, grad_weight in zip(
            torch.split(x_AD, ctx.sizes),
            torch.split(grad_AF, ctx.sizes),
            _matrices(weight_EDF),
            torch.split(grad_x_AD, ctx.sizes),
            _matrices(grad_weight_EDF),
            strict=True,
        ):
            torch.mm(x.t(), grad, out=grad_weight)
            torch.mm(grad, weight.t(), out=grad_x)
        return grad_x_AD, grad_weight_EDF, None


def _matrices(weight_EDF: Tensor) -> list[Tensor]:
    """Each expert's matrix, member by member; a view even where the members lie apart."""
    if weight_EDF.dim() == 3:
        return list(weight_EDF.unbind())
    return [matrix for member_EDF in weight_EDF.unbind() for matrix in member_EDF.unbind()]


class _Dispatch(torch.autograd.Function):
    """Copy each token's row to its K assignments. Its gradient is `_Combine`.

    Both are gathers, so they are deterministic, as a scatter would not be.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_A: Tensor, inverse_A: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_A)
        ctx.top_k = top_k
        return x_TD.index_select(0, token_A)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_A,) = ctx.saved_tensors
        return _sum_of_assignments(grads[0], inverse_A, ctx.top_k), None, None, None


class _Combine(torch.autograd.Function):
    """Sum each token's K assignments. Its gradient is `_Dispatch`."""

    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, token_A: Tensor, inverse_A: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(token_A)
        return _sum_of_assignments(y_AD, inverse_A, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (token_A,) = ctx.saved_tensors
        return grads[0].index_select(0, token_A), None, None, None


def _sum_of_assignments(y_AD: Tensor, inverse_A: Tensor, top_k: int) -> Tensor:
    y_TKD = y_AD.index_select(0, inverse_A).view(-1, top_k, y_AD.shape[1])
    # Term by term: to sum over an axis of a few entries takes the CPU four times as long.
    first, *others = y_TKD.unbind(1)
    for other in others:
        first = first + other
    return first
