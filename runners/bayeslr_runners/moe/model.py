"""A mixture-of-experts transformer decoder.

Shape suffixes: B sequences, S positions, T = B x S tokens, D model width, H heads, C head width,
E experts, K chosen experts a token, F expert width, V vocabulary, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeslr_runners.moe.experts import (
    apply,
    gates_and_scores,
    load_balance_loss,
    route,
    router_z_loss,
    swiglu,
    swiglu_experts,
)
from bayeslr_runners.moe.optim import group_of
from bayeslr_runners.moe.options import ModelOptions
from bayeslr_runners.moe.parametrization import Parametrization
from bayeslr_runners.moe.shapes import MoeShape

# Parameter-name patterns of MoeTransformer by module group, first match wins.
NAMING = {
    "embedding": "embedding",
    "head": "head",
    "*norm*": "norm",
    "*attention.*": "attention",
    "*router": "router",
    "*up": "expert_up",
    "*down": "expert_down",
}


RMS_EPS = 1e-6


class LayerStats(NamedTuple):
    """Router losses and load of one layer; scalars but for ``load_E``."""

    balance_loss: Tensor
    z_loss: Tensor
    load_E: Tensor
    entropy: Tensor


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, with a gain for each of ``sizes``."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Shape kept."""
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], None, RMS_EPS) * self.weight
        return apply(_RMSNorm, x, self.weight)


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

    def __init__(self, shape: MoeShape, rules: Parametrization, options: ModelOptions) -> None:
        super().__init__()
        d = shape.d_model
        self.num_heads = shape.n_heads
        self.scale = rules.attention_scale
        self.rope_theta = options.rope_theta
        self.qkv = nn.Parameter(torch.empty(3 * d, d))
        self.out = nn.Parameter(torch.empty(d, d))
        self.qk_norm = RMSNorm(2, 1, shape.d_head) if options.qk_norm else None

    def queries_keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each (B, H, S, C)."""
        num_sequences, seq_len, width = x_BSD.shape
        qk, v = torch.split(F.linear(x_BSD, self.qkv), [2 * width, width], dim=-1)
        qk_BS2HC = qk.reshape(num_sequences, seq_len, 2, self.num_heads, -1)
        if self.qk_norm is not None:
            qk_BS2HC = self.qk_norm(qk_BS2HC)
        q_BSHC, k_BSHC = rotate(qk_BS2HC, self.rope_theta).unbind(2)
        v_BSHC = v.reshape(k_BSHC.shape)
        return q_BSHC.transpose(1, 2), k_BSHC.transpose(1, 2), v_BSHC.transpose(1, 2)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Shape kept."""
        q, k, v = self.queries_keys_values(x_BSD)
        y_BHSC = F.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, is_causal=True, scale=self.scale
        )
        return F.linear(y_BHSC.transpose(1, 2).reshape(x_BSD.shape), self.out)


class MoeLayer(nn.Module):
    """Routed SwiGLU experts, plus shared ones that every token passes through."""

    def __init__(self, shape: MoeShape, rules: Parametrization, options: ModelOptions) -> None:
        super().__init__()
        d, hidden, num_experts = shape.d_model, shape.d_expert, shape.n_experts
        self.top_k = shape.top_k
        self.gates = options.gates or rules.gates
        self.route_scale, self.output = rules.route_scale, rules.groups["expert_down"].output
        self.router_output = rules.groups["router"].output
        self.router = nn.Parameter(torch.empty(num_experts, d)) if shape.has_router else None
        self.experts_up = nn.Parameter(torch.empty(num_experts, d, 2 * hidden))
        self.experts_down = nn.Parameter(torch.empty(num_experts, hidden, d))
        # Shared experts side by side are one wider expert.
        width = shape.n_shared_experts * hidden
        self.shared_up = nn.Parameter(torch.empty(d, 2 * width)) if width else None
        self.shared_down = nn.Parameter(torch.empty(width, d)) if width else None
        balanced = options.bias_rate > 0 and shape.has_router
        self.register_buffer("selection_bias", torch.zeros(num_experts) if balanced else None)
        self.selection_bias: Tensor | None

    def forward(self, x_TD: Tensor) -> tuple[Tensor, LayerStats | None]:
        """Output of the same shape, and what the router did (None without a router)."""
        if self.router is None:
            out_TD = swiglu(x_TD @ self.experts_up[0]) @ self.experts_down[0]
            stats = None
        else:
            out_TD, stats = self._routed(x_TD, self.router)
        if self.route_scale != 1.0:
            out_TD = out_TD * self.route_scale
        if self.shared_up is not None and self.shared_down is not None:
            out_TD = out_TD + swiglu(x_TD @ self.shared_up) @ self.shared_down
        return out_TD * self.output if self.output != 1.0 else out_TD, stats

    def _routed(self, x_TD: Tensor, router_ED: Tensor) -> tuple[Tensor, LayerStats]:
        # Rounding of router logits changes which experts are chosen: float32, whatever the rest is.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), router_ED.float())
            if self.router_output != 1.0:
                logits_TE = logits_TE * self.router_output
            gate_TE, score_TE = gates_and_scores(logits_TE, self.gates)
            routing = route(
                gate_TE,
                self.top_k,
                bias_E=self.selection_bias,
                normalise=self.gates.endswith("_topk"),
            )
            with torch.no_grad():
                entropy = -torch.xlogy(score_TE, score_TE).sum(-1).mean()
            stats = LayerStats(
                load_balance_loss(score_TE, routing.load_E),
                router_z_loss(logits_TE),
                routing.load_E,
                entropy,
            )
        return swiglu_experts(x_TD, routing, self.experts_up, self.experts_down), stats


class Block(nn.Module):
    """Attention, then experts, each on the normalised residual stream."""

    def __init__(self, shape: MoeShape, rules: Parametrization, options: ModelOptions) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.d_model)
        self.attention = Attention(shape, rules, options)
        self.moe_norm = RMSNorm(shape.d_model)
        self.moe = MoeLayer(shape, rules, options)
        self.residual = rules.residual

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, LayerStats | None]:
        """Output of the same shape, and what the router did."""
        attended_BSD = self.attention(self.attention_norm(x_BSD))
        x_BSD = torch.add(x_BSD, attended_BSD, alpha=self.residual)
        y_TD, stats = self.moe(self.moe_norm(x_BSD).flatten(0, 1))
        return torch.add(x_BSD, y_TD.view_as(x_BSD), alpha=self.residual), stats


class MoeTransformer(nn.Module):
    """Decoder over token ids; embedding and head are not tied."""

    def __init__(
        self,
        shape: MoeShape,
        rules: Parametrization,
        options: ModelOptions,
        *,
        vocab_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, shape.d_model))
        self.blocks = nn.ModuleList(Block(shape, rules, options) for _ in range(shape.n_layers))
        self.norm = RMSNorm(shape.d_model)
        self.head = nn.Parameter(torch.empty(vocab_size, shape.d_model))
        self.embedding_output = rules.groups["embedding"].output
        self.head_output = rules.groups["head"].output
        self._initialise(rules, seed)

    @torch.no_grad()
    def _initialise(self, rules: Parametrization, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            group = group_of(name, NAMING)
            if group == "norm":
                parameter.fill_(1.0)
            else:
                std = rules.groups[group].init_std
                parameter.normal_(0.0, std, generator=generator)

    def forward(self, token_BS: Tensor) -> tuple[Tensor, list[LayerStats]]:
        """Logits (B, S, V), and what each router did."""
        x_BSD = F.embedding(token_BS, self.embedding)
        if self.embedding_output != 1.0:
            x_BSD = x_BSD * self.embedding_output
        stats = []
        for block in self.blocks:
            x_BSD, layer_stats = block(x_BSD)
            if layer_stats is not None:
                stats.append(layer_stats)
        logits_BSV = F.linear(self.norm(x_BSD), self.head)
        if self.head_output != 1.0:
            logits_BSV = logits_BSV * self.head_output
        return logits_BSV, stats


def rotate(x_BS2HC: Tensor, theta: float) -> Tensor:
    """Turn neighbouring columns by an angle that grows with the position."""
    seq_len, d_head = x_BS2HC.shape[1], x_BS2HC.shape[-1]
    device = x_BS2HC.device
    frequency = theta ** -(torch.arange(0, d_head, 2, device=device).float() / d_head)
    angle = torch.outer(torch.arange(seq_len, device=device).float(), frequency)
    turn = torch.polar(torch.ones_like(angle), angle).view(seq_len, 1, 1, -1)
    pairs = torch.view_as_complex(x_BS2HC.float().reshape(*x_BS2HC.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)
