"""Coordinate check: does a training step move every activation as much at any width and depth?

Under a correct parametrisation the change of each module group's activations after a few steps is
of order one at every size, so its log-log slope against the size is near zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayeslr.specs import RunSpec
from bayeslr_runners.moe.data import Corpus, val_batches
from bayeslr_runners.moe.model import Attention, MoeLayer, MoeTransformer, RMSNorm
from bayeslr_runners.moe.options import Options
from bayeslr_runners.moe.shapes import MoeShape
from bayeslr_runners.moe.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Change:
    """Root-mean-square change of one group's activations, over layers, tokens and columns."""

    shape: MoeShape
    seed: int
    group: str
    rms: float


def activation_changes(
    spec: RunSpec,
    corpus: Corpus,
    shapes: Sequence[Mapping[str, Any]],
    *,
    num_steps: int = 5,
    seeds: Sequence[int] = (0,),
) -> list[Change]:
    """Train each shape for a few steps and compare its activations with those at the start.

    spec: run whose LR, parametrisation, batch and options are used; its shape is replaced.
    Router: logits. Experts up: gate and up of every expert on every token. Attention, experts
    down: what they add to the residual stream, before its multiplier. Norm: the last one's output.
    ``stream`` is no module group: it is the residual stream at the end.
    """
    options = Options.from_mapping(spec.options)
    found = []
    for raw in shapes:
        shape = MoeShape.from_mapping(raw)
        n_active, n_total = shape.counts(qk_norm=options.model.qk_norm)
        for seed in seeds:
            run = dataclasses.replace(
                spec, shape=raw, n_active=n_active, n_total=n_total, seed=seed
            )
            trainer = Trainer([run], corpus, options)
            before = _activations(trainer.model, corpus, spec)
            for number in range(num_steps):
                trainer.step(number, 1.0)
            after = _activations(trainer.model, corpus, spec)
            found += [
                Change(shape, seed, group, _rms(before[group], after[group])) for group in before
            ]
    return found


def slopes(changes: Sequence[Change], axis: str) -> dict[str, float]:
    """Log-log slope of each group's change against a shape's ``axis`` (d_model, n_layers, ...)."""
    found = {}
    for group in dict.fromkeys(change.group for change in changes):
        rows = [change for change in changes if change.group == group]
        x = np.log([getattr(row.shape, axis) for row in rows])
        y = np.log([row.rms for row in rows])
        found[group] = float(np.polyfit(x, y, 1)[0])
    return found


def _rms(before: list[Tensor], after: list[Tensor]) -> float:
    squares = [(b - a).square().mean().item() for a, b in zip(before, after, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


@torch.no_grad()
def _activations(model: MoeTransformer, corpus: Corpus, spec: RunSpec) -> dict[str, list[Tensor]]:
    """Activations of each group on a few validation windows, one tensor a layer."""
    input_BS, _ = next(
        val_batches(corpus, val_tokens=8 * spec.seq_len, num_sequences=8, seq_len=spec.seq_len)
    )
    token_BS = torch.from_numpy(input_BS).to(model.embedding.device)
    with _recorded(model) as seen:
        logits_BSV, _ = model(token_BS)
    embedding = nn.functional.embedding(token_BS, model.embedding) * model.embedding_output
    seen |= {"embedding": [embedding], "head": [logits_BSV]}
    return seen


@contextmanager
def _recorded(model: MoeTransformer) -> Iterator[dict[str, list[Tensor]]]:
    seen: dict[str, list[Tensor]] = {}

    def keep(group: str, value: Tensor) -> None:
        seen.setdefault(group, []).append(value)

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        assert isinstance(module, Attention | MoeLayer | RMSNorm)
        if isinstance(module, Attention):
            keep("attention", output)
        elif isinstance(module, MoeLayer):
            x_TD = inputs[0]
            if module.router is not None:
                keep("router", (x_TD @ module.router.t()) * module.router_output)
            keep("expert_up", x_TD @ module.experts_up)
            keep("expert_down", output[0])
        else:
            keep("stream", inputs[0])
            keep("norm", output)

    watched = [m for m in model.modules() if isinstance(m, Attention | MoeLayer)]
    hooks = [module.register_forward_hook(look) for module in [*watched, model.norm]]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
