"""Validation loss and the state of the network, read without training it.

Shape suffixes as in `model`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bayeslr_runners.moe.data import Corpus, val_batches
from bayeslr_runners.moe.model import Attention, MoeTransformer, token_losses


class Measurement(NamedTuple):
    """Mean validation loss in nats per token, its standard error over sequences, diagnostics."""

    loss: float
    loss_se: float
    diagnostics: dict[str, float]


@torch.no_grad()
def measure(
    model: MoeTransformer,
    corpus: Corpus,
    *,
    val_tokens: int,
    batch_sequences: int,
    seq_len: int,
    device: torch.device,
) -> list[Measurement]:
    """Measure the loss over the validation windows, the same ones in every run.

    The standard error is that of the mean over windows. Runs share the windows, so a difference
    between two runs is much surer than it says. Returns one measurement a member of a stack.
    """
    losses, loads, entropies = [], [], []
    for input_BS, target_BS in val_batches(
        corpus, val_tokens=val_tokens, num_sequences=batch_sequences, seq_len=seq_len
    ):
        with autocast(device):
            logits, stats = model(for_members(input_BS, model.members, device))
        target = for_members(target_BS, model.members, device)
        losses.append(token_losses(logits.float(), target).mean(dim=-1))
        if stats:
            loads.append(torch.stack([layer.load_E for layer in stats], dim=-2))
            entropies.append(torch.stack([layer.entropy for layer in stats], dim=-1))
    count = model.members[0] if model.members else 1
    loss_RB = torch.cat(losses, dim=-1).double().cpu().view(count, -1)
    attention_R = max_attention_logit(model, corpus, seq_len, device)
    found = []
    for member, loss_B in enumerate(loss_RB):
        diagnostics = {"max_attention_logit": attention_R[member].item()}
        if loads:
            load_RLE = torch.stack(loads).sum(0).double().cpu()
            entropy_RL = torch.stack(entropies).mean(0).double().cpu().view(count, -1)
            diagnostics |= load_summary(load_RLE.view(count, *load_RLE.shape[-2:])[member])
            diagnostics["router_entropy_min"] = entropy_RL[member].min().item()
        spread = loss_B.std(correction=1).item() if len(loss_B) > 1 else math.nan
        loss_se = spread / math.sqrt(len(loss_B))
        found.append(Measurement(loss_B.mean().item(), loss_se, diagnostics))
    return found


def load_summary(load_LE: torch.Tensor) -> dict[str, float]:
    """Extremes over layers of how evenly experts are used; 1 and E at uniform load."""
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True)
    entropy_L = -torch.xlogy(share_LE, share_LE).sum(dim=1)
    return {
        "max_load": (share_LE.max() * share_LE.shape[1]).item(),
        "effective_experts_min": entropy_L.min().exp().item(),
    }


@torch.no_grad()
def max_attention_logit(
    model: MoeTransformer, corpus: Corpus, seq_len: int, device: torch.device
) -> torch.Tensor:
    """Largest scaled attention logit over layers, on a few validation windows; (R,)."""
    input_BS, _ = next(
        val_batches(corpus, val_tokens=4 * seq_len, num_sequences=4, seq_len=seq_len)
    )
    largest: list[torch.Tensor] = []
    count = model.members[0] if model.members else 1

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, Attention)
        q, k, _ = module.queries_keys_values(inputs[0])
        logits = (q @ k.transpose(-1, -2)) * module.scale
        largest.append(logits.tril().abs().view(count, -1).amax(dim=1))

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, Attention)]
    try:
        model(for_members(input_BS, model.members, device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(largest).amax(dim=0)


def for_members(
    token_BS: NDArray[np.int64], members: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """The same tokens for every member of a stack, (R, B, S)."""
    token = torch.from_numpy(token_BS).to(device)
    return token.expand(*members, *token.shape) if members else token


def autocast(device: torch.device) -> torch.autocast:
    """Bfloat16 on CUDA, float32 on the CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
