"""The one table of transfer rules: what each module group gets at a shape, against a base shape.

At the base shape every parametrisation has the LR, weight decay and epsilon of ``sp``, so a base LR
means the same thing everywhere. Rules, with m_N width, m_F expert-width and m_L depth ratios
(init std, LR, weight decay, epsilon):

================== ======================================= ====================================
group              mup and completep (2505.01618, table 1) moe_fixed_sparsity (2601.20205)
================== ======================================= ====================================
embedding          const, 1, 1, 1                          const, 1, 1, 1/m_N
attention          d^-1/2, 1/m_N, m_N, 1/m_N               the same
router             m_N^-1/2, 1/m_N, m_N, 1/m_N             m_N^-1, 1/m_N, m_N, 1/m_N
expert up, gate    d^-1/2, 1/m_N, m_N, 1/m_N               the same
expert down        F^-1/2, 1/m_F, m_F, 1/m_N               d^1/2 / F, 1/m_F, m_F, 1/m_N
norm in a block    1, 1, none, 1/m_N                       the same
final norm         1, 1, none, 1                           the same
head               const, 1, 1, 1; output x 1/m_N          the same
residual branch    completep: x m_L^-a                     x 1/m_L; routed sum x 1/top_k
================== ======================================= ====================================

``completep`` also multiplies LR by m_L^(a-1) and epsilon by m_L^-a inside the blocks. The norm
before the head has rules of its own, and the LR multiplier of the others.
``complete_mue`` (2605.23893): LR 1/m_N and std m_N^-1/2 for every matrix; with H the active expert
width, expert down has std H^1/2 / d and its output is multiplied by d / H; sigmoid gates normalised
over the chosen experts, routed sum x top_k; LR and weight decay x sqrt(rho_B / rho_D), epsilon and
1 / (1 - beta) by its inverse and its inverse square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from bayeslr.errors import SpecError
from bayeslr.specs import RunSpec
from bayeslr_runners.moe.options import Options, ScalingOptions
from bayeslr_runners.moe.shapes import MoeShape

# Std of the embedding, as in the standard parametrisation of Everett et al. 2024. With the 0.02 of
# GPT-2, networks this small are a tenth of a nat behind after 200k tokens (docs/log.md).
EMBEDDING_STD = 1.0
# Std of head and router times the square root of their fan-in, so of the logits at the start: small
# against 1, so that the first loss is ln(vocabulary) and the first routing nearly uniform.
LOGIT_STD = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRule:
    """What one module group gets. ``init_std`` is absolute, the rest multiply the base value.

    ``weight_decay`` multiplies the coefficient of decay coupled to the LR (as in PyTorch's AdamW).
    ``lr_multiplier`` is what of ``lr`` was tuned, and is no rule.
    """

    init_std: float
    lr: float = 1.0
    lr_multiplier: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    output: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Parametrization:
    """Rules of every group and of ``final_norm``, with what belongs to no single group.

    ``residual`` multiplies what a block's attention and experts add to the stream, ``route_scale``
    the gated sum over a token's routed experts.
    """

    groups: dict[str, GroupRule]
    attention_scale: float
    residual: float = 1.0
    gates: str
    route_scale: float = 1.0
    one_minus_beta: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ratios:
    """A shape beside its base: width, expert width, depth, head width; tokens and batch."""

    shape: MoeShape
    base: MoeShape
    tokens: float = 1.0
    batch: float = 1.0

    @property
    def width(self) -> float:
        return self.shape.d_model / self.base.d_model

    @property
    def expert(self) -> float:
        return self.shape.d_expert / self.base.d_expert

    @property
    def depth(self) -> float:
        return self.shape.n_layers / self.base.n_layers

    @property
    def mup_attention_scale(self) -> float:
        """1 / d_head, times what makes it 1 / sqrt(d_head) at the base."""
        return math.sqrt(self.base.d_head) / self.shape.d_head


def parametrization(
    name: str,
    shape: MoeShape,
    scaling: ScalingOptions,
    *,
    tokens: float | None = None,
    batch_tokens: float | None = None,
) -> Parametrization:
    """Rules for a shape under a named parametrisation.

    tokens, batch_tokens: of the run, for the horizon and batch rules.
    Raises: SpecError on an unknown name, a missing base shape, or a base the rules exclude.
    """
    if name not in _RULES:
        raise SpecError(f"parametrization must be one of {', '.join(_RULES)}, got {name!r}")
    if scaling.base_shape is None and name != "sp":
        raise SpecError(
            f"parametrization {name!r} needs options.base_shape: the shape whose LR is carried over"
        )
    base = shape if scaling.base_shape is None else MoeShape.from_mapping(scaling.base_shape)
    ratios = _Ratios(
        shape=shape,
        base=base,
        tokens=_ratio(tokens, scaling.base_tokens),
        batch=_ratio(batch_tokens, scaling.base_batch_tokens),
    )
    rules = _RULES[name](ratios, scaling)
    exponent = scaling.horizon_exponent
    if exponent is None:
        exponent = -0.5 if name == "complete_mue" else 0.0
    horizon = ratios.tokens**exponent
    groups = {}
    for group, rule in rules.groups.items():
        tuned = scaling.lr_multipliers.get("norm" if group == "final_norm" else group, 1.0)
        groups[group] = replace(rule, lr=rule.lr * horizon * tuned, lr_multiplier=tuned)
    return replace(rules, groups=groups)


def rules_of(spec: RunSpec, *, tokens: float | None = None) -> Parametrization:
    """Rules of a run. tokens: as if it went so far, instead of to its longest horizon."""
    return parametrization(
        spec.parametrization,
        MoeShape.from_mapping(spec.shape),
        Options.from_mapping(spec.options).scaling,
        tokens=spec.tokens if tokens is None else tokens,
        batch_tokens=spec.batch_tokens,
    )


def depends_on_horizon(spec: RunSpec) -> bool:
    """Whether a run to another horizon has another LR or other betas from its first step on."""
    return rules_of(spec) != rules_of(spec, tokens=2 * spec.tokens)


def _sp(ratios: _Ratios, scaling: ScalingOptions) -> Parametrization:
    shape = ratios.shape
    return Parametrization(
        groups={
            "embedding": GroupRule(init_std=EMBEDDING_STD),
            "attention": GroupRule(init_std=shape.d_model**-0.5),
            "router": GroupRule(init_std=LOGIT_STD * shape.d_model**-0.5),
            "expert_up": GroupRule(init_std=shape.d_model**-0.5),
            "expert_down": GroupRule(init_std=shape.d_expert**-0.5),
            "norm": GroupRule(init_std=0.0, weight_decay=0.0),
            "final_norm": GroupRule(init_std=0.0, weight_decay=0.0),
            "head": GroupRule(init_std=LOGIT_STD * shape.d_model**-0.5),
        },
        attention_scale=shape.d_head**-0.5,
        # Normalised over a single chosen expert the gate would be 1 and the router untrained.
        gates="softmax" if shape.top_k == 1 else "softmax_topk",
    )


def _mup(ratios: _Ratios, scaling: ScalingOptions) -> Parametrization:
    base = _sp(ratios, scaling)
    width, expert = ratios.width, ratios.expert
    hidden = {"lr": 1 / width, "weight_decay": width, "eps": 1 / width}
    groups = base.groups | {
        "attention": replace(base.groups["attention"], **hidden),
        "router": replace(base.groups["router"], **hidden),
        "expert_up": replace(base.groups["expert_up"], **hidden),
        "expert_down": replace(
            base.groups["expert_down"], lr=1 / expert, weight_decay=expert, eps=1 / width
        ),
        "norm": replace(base.groups["norm"], eps=1 / width),
        "head": replace(
            base.groups["head"],
            init_std=LOGIT_STD * ratios.base.d_model**-0.5,
            output=1 / width,
        ),
    }
    return replace(base, groups=groups, attention_scale=ratios.mup_attention_scale)


def _completep(ratios: _Ratios, scaling: ScalingOptions) -> Parametrization:
    return _with_depth(_mup(ratios, scaling), ratios.depth, scaling.depth_exponent)


def _with_depth(rules: Parametrization, depth: float, exponent: float) -> Parametrization:
    groups = dict(rules.groups)
    for name in ("attention", "router", "expert_up", "expert_down", "norm"):
        rule = groups[name]
        groups[name] = replace(
            rule, lr=rule.lr * depth ** (exponent - 1), eps=rule.eps * depth**-exponent
        )
    return replace(rules, groups=groups, residual=depth**-exponent)


def _moe_fixed_sparsity(ratios: _Ratios, scaling: ScalingOptions) -> Parametrization:
    shape, base = ratios.shape, ratios.base
    if shape.top_k * base.n_experts != base.top_k * shape.n_experts:
        raise SpecError(
            "parametrization 'moe_fixed_sparsity' holds at a fixed share of active experts, but "
            f"the shape has {shape.top_k} of {shape.n_experts} and base_shape {base.top_k} of "
            f"{base.n_experts}; use 'complete_mue' where the share changes"
        )
    rules = _with_depth(_mup(ratios, scaling), ratios.depth, 1.0)
    groups = dict(rules.groups)
    groups["embedding"] = replace(groups["embedding"], eps=1 / ratios.width)
    groups["router"] = replace(
        groups["router"], init_std=groups["router"].init_std * ratios.width**-0.5
    )
    groups["expert_down"] = replace(
        groups["expert_down"],
        init_std=base.d_expert**-0.5 * ratios.width**0.5 / ratios.expert,
    )
    return replace(rules, groups=groups, gates="sigmoid", route_scale=1 / shape.top_k)


def _complete_mue(ratios: _Ratios, scaling: ScalingOptions) -> Parametrization:
    shape, width = ratios.shape, ratios.width
    rules = _mup(ratios, scaling)
    active = shape.active_expert_width
    steps = ratios.batch / ratios.tokens
    groups = {}
    for name, rule in rules.groups.items():
        is_hidden = name in ("attention", "router", "expert_up", "expert_down")
        groups[name] = replace(
            rule,
            # The tokens' part of the LR rule, rho_D^-1/2, is the horizon exponent.
            lr=(1 / width if is_hidden else rule.lr) * ratios.batch**0.5,
            weight_decay=steps**0.5 if rule.weight_decay else 0.0,
            eps=rule.eps * steps**-0.5,
        )
    groups["expert_down"] = replace(
        groups["expert_down"],
        init_std=active**0.5 / shape.d_model,
        output=shape.d_model / active,
    )
    return replace(
        rules,
        groups=groups,
        gates="sigmoid_topk",
        route_scale=float(shape.top_k),
        one_minus_beta=steps,
    )


def _ratio(value: float | None, base: float | None) -> float:
    return 1.0 if value is None or base is None else value / base


_RULES: dict[str, Callable[[_Ratios, ScalingOptions], Parametrization]] = {
    "sp": _sp,
    "mup": _mup,
    "completep": _completep,
    "moe_fixed_sparsity": _moe_fixed_sparsity,
    "complete_mue": _complete_mue,
}
PARAMETRIZATIONS = tuple(_RULES)
SOURCES = {
    "sp": "PyTorch's AdamW and fan-in initialisation, with the embedding of Everett et al. 2024 "
    "(arXiv 2407.05872)",
    "mup": "arXiv 2505.01618, table 1, without its depth terms",
    "completep": "arXiv 2505.01618, table 1",
    "moe_fixed_sparsity": "arXiv 2601.20205; holds at a fixed share of active experts",
    "complete_mue": "arXiv 2605.23893; the share of active experts may change",
}
