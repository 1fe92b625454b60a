"""A mixture-of-experts transformer decoder.

Shape suffixes: B sequences, S positions, T = B x S tokens, D model width, H heads, C head width,
E experts, K chosen experts a token, F expert width, V vocabulary, L layers. The same network can
be a stack of R members that never meet: then every tensor and parameter has a leading axis R.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeslr_runners.moe.experts import (
    Routing,
    apply,
    gates_and_scores,
    load_balance_loss,
    route,
    router_z_loss,
    swiglu,
    swiglu_experts,
)
from bayeslr_runners.moe.losses import head_loss, token_losses
from bayeslr_runners.moe.optim import group_of
from bayeslr_runners.moe.options import ModelOptions
from bayeslr_runners.moe.parametrization import Parametrization
from bayeslr_runners.moe.shapes import MoeShape

# Parameter-name patterns of MoeTransformer by module group, first match wins.
NAMING = {
    "embedding": "embedding",
    "head": "head",
    "norm.*": "final_norm",
    "*norm*": "norm",
    "*attention.*": "attention",
    "*router": "router",
    "*up": "expert_up",
    "*down": "expert_down",
}


RMS_EPS = 1e-6


class LayerStats(NamedTuple):
    """What a layer's router did: its losses (scalars), the load, and the scores of all experts."""

    balance_loss: Tensor
    z_loss: Tensor
    load_E: Tensor
    score_TE: Tensor


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, with a gain for each of ``sizes``."""

    def __init__(self, *sizes: int, members: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.num_stacked = len(members)
        self.weight = nn.Parameter(torch.empty(*members, *sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Shape kept."""
        weight: Tensor = self.weight
        if self.num_stacked:
            between = (1,) * (x.dim() - weight.dim())
            weight = weight.view(weight.shape[:1] + between + weight.shape[1:])
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], None, RMS_EPS) * weight
        return apply(_RMSNorm, x, weight)


class _RMSNorm(torch.autograd.Function):
    """On the CPU, PyTorch runs its own as a dozen small operations, twice as slow as this."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(RMS_EPS).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        out: Tensor = unit * weight
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        unit, scale, weight = ctx.saved_tensors
        grad_weight = (grad * unit).sum_to_size(weight.shape)
        grad_unit = grad * weight
        mean = (grad_unit * unit).mean(dim=-1, keepdim=True)
        return grad_unit.addcmul_(unit, mean, value=-1.0).mul_(scale), grad_weight


class Attention(nn.Module):
    """Causal self-attention with rotary positions and, if asked, normalised queries and keys."""

    def __init__(
        self,
        shape: MoeShape,
        rules: Parametrization,
        options: ModelOptions,
        members: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        d = shape.d_model
        self.num_heads = shape.n_heads
        self.scale = rules.attention_scale
        self.rope_theta = options.rope_theta
        self.qkv = nn.Parameter(torch.empty(*members, 3 * d, d))
        self.out = nn.Parameter(torch.empty(*members, d, d))
        self.qk_norm = RMSNorm(2, 1, shape.d_head, members=members) if options.qk_norm else None

    def queries_keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each (B, H, S, C); a stack's members side by side.

        They are R x B sequences then.
        """
        width = x_BSD.shape[-1]
        qk, v = torch.split(linear(x_BSD, self.qkv), [2 * width, width], dim=-1)
        qk_BS2HC = qk.reshape(*qk.shape[:-1], 2, self.num_heads, -1)
        if self.qk_norm is not None:
            qk_BS2HC = self.qk_norm(qk_BS2HC)
        q_BSHC, k_BSHC = rotate(qk_BS2HC.flatten(0, -5), self.rope_theta).unbind(2)
        v_BSHC = v.reshape(k_BSHC.shape)
        return q_BSHC.transpose(1, 2), k_BSHC.transpose(1, 2), v_BSHC.transpose(1, 2)

    def attend(self, x_BSD: Tensor) -> Tensor:
        """Values that each position attends to, heads side by side: what ``out`` reads."""
        q, k, v = self.queries_keys_values(x_BSD)
        y_BHSC = F.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, is_causal=True, scale=self.scale
        )
        return y_BHSC.transpose(1, 2).reshape(x_BSD.shape)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Shape kept."""
        return linear(self.attend(x_BSD), self.out)


class MoeLayer(nn.Module):
    """Routed SwiGLU experts, plus shared ones that every token passes through."""

    def __init__(
        self,
        shape: MoeShape,
        rules: Parametrization,
        options: ModelOptions,
        members: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        d, hidden, num_experts = shape.d_model, shape.d_expert, shape.n_experts
        self.top_k = shape.top_k
        self.gates = options.gates or rules.gates
        self.route_scale, self.output = rules.route_scale, rules.groups["expert_down"].output
        self.router_output = rules.groups["router"].output
        self.router: nn.Parameter | None = None
        if shape.has_router:
            self.router = nn.Parameter(torch.empty(*members, num_experts, d))
        self.experts_up = nn.Parameter(torch.empty(*members, num_experts, d, 2 * hidden))
        self.experts_down = nn.Parameter(torch.empty(*members, num_experts, hidden, d))
        # Shared experts side by side are one wider expert.
        width = shape.n_shared_experts * hidden
        self.shared_up = nn.Parameter(torch.empty(*members, d, 2 * width)) if width else None
        self.shared_down = nn.Parameter(torch.empty(*members, width, d)) if width else None
        balanced = options.bias_rate > 0 and shape.has_router
        bias_E = torch.zeros(*members, num_experts) if balanced else None
        self.register_buffer("selection_bias", bias_E)
        self.selection_bias: Tensor | None

    def forward(self, x_TD: Tensor) -> tuple[Tensor, LayerStats | None]:
        """Output of the same shape, and what the router did (None without a router)."""
        if self.router is None:
            up_DF, down_FD = self.experts_up.squeeze(-3), self.experts_down.squeeze(-3)
            out_TD = swiglu(x_TD @ up_DF) @ down_FD
            stats = None
        else:
            routing, stats = self.route(x_TD, self.router)
            out_TD = swiglu_experts(x_TD, routing, self.experts_up, self.experts_down)
        if self.route_scale != 1.0:
            out_TD = out_TD * self.route_scale
        if self.shared_up is not None and self.shared_down is not None:
            out_TD = out_TD + swiglu(x_TD @ self.shared_up) @ self.shared_down
        return out_TD * self.output if self.output != 1.0 else out_TD, stats

    def route(self, x_TD: Tensor, router_ED: Tensor) -> tuple[Routing, LayerStats]:
        """Which experts each token goes to, and what the router did."""
        # Rounding of router logits changes which experts are chosen: float32, whatever the rest is.
        with torch.autocast(x_TD.device.type, enabled=False):
            # Experts first in memory: sums over them then run along the tokens.
            logits_TE = linear(x_TD.float(), router_ED.float()).mT.contiguous().mT
            if self.router_output != 1.0:
                logits_TE = logits_TE * self.router_output
            gate_TE, score_TE = gates_and_scores(logits_TE, self.gates)
            routing = route(
                gate_TE,
                self.top_k,
                bias_E=self.selection_bias,
                normalise=self.gates.endswith("_topk"),
            )
            stats = LayerStats(
                load_balance_loss(score_TE, routing.load_E),
                router_z_loss(logits_TE),
                routing.load_E,
                score_TE.detach(),
            )
        return routing, stats


class Block(nn.Module):
    """Attention, then experts, each on the normalised residual stream."""

    def __init__(
        self,
        shape: MoeShape,
        rules: Parametrization,
        options: ModelOptions,
        members: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.d_model, members=members)
        self.attention = Attention(shape, rules, options, members)
        self.moe_norm = RMSNorm(shape.d_model, members=members)
        self.moe = MoeLayer(shape, rules, options, members)
        self.residual = rules.residual

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, LayerStats | None]:
        """Output of the same shape, and what the router did."""
        attended_BSD = self.attention(self.attention_norm(x_BSD))
        x_BSD = torch.add(x_BSD, attended_BSD, alpha=self.residual)
        y_TD, stats = self.moe(self.moe_norm(x_BSD).flatten(-3, -2))
        return torch.add(x_BSD, y_TD.view_as(x_BSD), alpha=self.residual), stats


class MoeTransformer(nn.Module):
    """Decoder over token ids; embedding and head are not tied.

    seed: one, or several for a stack with a member a seed; each starts as it would alone.
    """

    def __init__(
        self,
        shape: MoeShape,
        rules: Parametrization,
        options: ModelOptions,
        *,
        vocab_size: int,
        seed: int | Sequence[int],
    ) -> None:
        super().__init__()
        members = () if isinstance(seed, int) else (len(seed),)
        self.members = members
        self.embedding = nn.Parameter(torch.empty(*members, vocab_size, shape.d_model))
        self.blocks = nn.ModuleList(
            Block(shape, rules, options, members) for _ in range(shape.n_layers)
        )
        self.norm = RMSNorm(shape.d_model, members=members)
        self.head = nn.Parameter(torch.empty(*members, vocab_size, shape.d_model))
        self.embedding_output = rules.groups["embedding"].output
        self.head_output = rules.groups["head"].output
        self._initialise(rules, [seed] if isinstance(seed, int) else seed)

    @torch.no_grad()
    def _initialise(self, rules: Parametrization, seeds: Sequence[int]) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for name, parameter in self.named_parameters():
            group = group_of(name, NAMING)
            std = rules.groups[group].init_std
            for one, generator in zip(
                parameter if self.members else [parameter], generators, strict=True
            ):
                if group in ("norm", "final_norm"):
                    one.fill_(1.0)
                else:
                    one.normal_(0.0, std, generator=generator)

    def forward(self, token_BS: Tensor) -> tuple[Tensor, list[LayerStats]]:
        """Logits (B, S, V), and what each router did."""
        x_BSD, stats = self._represent(token_BS)
        logits_BSV = linear(x_BSD, self.head)
        if self.head_output != 1.0:
            logits_BSV = logits_BSV * self.head_output
        return logits_BSV, stats

    def loss(self, token_BS: Tensor, target_BS: Tensor) -> tuple[Tensor, list[LayerStats]]:
        """Mean loss in nats per token, of each member of a stack, and what each router did."""
        if token_BS.is_cuda:
            logits_BSV, stats = self(token_BS)
            return token_losses(logits_BSV.float(), target_BS).flatten(-2).mean(-1), stats
        x_BSD, stats = self._represent(token_BS)
        return head_loss(x_BSD, self.head, target_BS, self.head_output), stats

    def _represent(self, token_BS: Tensor) -> tuple[Tensor, list[LayerStats]]:
        """What the head reads (B, S, D), and what each router did."""
        x_BSD = embed(token_BS, self.embedding)
        if self.embedding_output != 1.0:
            x_BSD = x_BSD * self.embedding_output
        stats = []
        for block in self.blocks:
            x_BSD, layer_stats = block(x_BSD)
            if layer_stats is not None:
                stats.append(layer_stats)
        return self.norm(x_BSD), stats


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``x`` times the transposed matrix; in a stack, each member's times its own."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    out: Tensor = torch.bmm(x.flatten(1, -2), weight.mT)
    return out.view(*x.shape[:-1], -1)


def embed(token: Tensor, weight: Tensor) -> Tensor:
    """Rows of the embedding; in a stack, each member's own."""
    if weight.dim() == 2:
        return F.embedding(token, weight)
    num_members, vocab_size, _ = weight.shape
    first_row_R = torch.arange(num_members, device=token.device) * vocab_size
    return F.embedding(token + first_row_R.view(-1, 1, 1), weight.flatten(0, 1))


def rotate(x_BS2HC: Tensor, theta: float) -> Tensor:
    """Turn neighbouring columns by an angle that grows with the position."""
    seq_len, d_head = x_BS2HC.shape[1], x_BS2HC.shape[-1]
    turn = _turns(seq_len, d_head, theta, x_BS2HC.device)
    pairs = torch.view_as_complex(x_BS2HC.float().reshape(*x_BS2HC.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


@functools.lru_cache(maxsize=8)
def _turns(seq_len: int, d_head: int, theta: float, device: torch.device) -> Tensor:
    """Unit complex numbers by position and pair of columns, (S, 1, 1, C / 2)."""
    frequency = theta ** -(torch.arange(0, d_head, 2, device=device).float() / d_head)
    angle = torch.outer(torch.arange(seq_len, device=device).float(), frequency)
    return torch.polar(torch.ones_like(angle), angle).view(seq_len, 1, 1, -1)
