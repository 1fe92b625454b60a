"""Validation loss and the state of the network, read without training it.

Shape suffixes as in `model`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bayeslr_runners.moe.data import Corpus, val_batches
from bayeslr_runners.moe.model import Attention, MoeTransformer


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
) -> Measurement:
    """Measure the loss over the validation windows, the same ones in every run.

    The standard error is that of the mean over windows. Runs share the windows, so a difference
    between two runs is much surer than it says.
    """
    losses, loads, entropies = [], [], []
    for input_BS, target_BS in val_batches(
        corpus, val_tokens=val_tokens, num_sequences=batch_sequences, seq_len=seq_len
    ):
        with autocast(device):
            logits, stats = model(torch.from_numpy(input_BS).to(device))
        target = torch.from_numpy(target_BS).to(device)
        token_loss = F.cross_entropy(
            logits.float().flatten(0, 1), target.flatten(), reduction="none"
        )
        losses.append(token_loss.view(target.shape).mean(dim=1))
        if stats:
            loads.append(torch.stack([layer.load_E for layer in stats]))
            entropies.append(torch.stack([layer.entropy for layer in stats]))
    loss_B = torch.cat(losses).double().cpu()
    spread = loss_B.std(correction=1).item() if len(loss_B) > 1 else math.nan
    diagnostics = {"max_attention_logit": max_attention_logit(model, corpus, seq_len, device)}
    if loads:
        load_LE = torch.stack(loads).sum(0).double().cpu()
        entropy_L = torch.stack(entropies).mean(0).double().cpu()
        diagnostics |= load_summary(load_LE)
        diagnostics["router_entropy_min"] = entropy_L.min().item()
    return Measurement(loss_B.mean().item(), spread / math.sqrt(len(loss_B)), diagnostics)


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
) -> float:
    """Largest scaled attention logit over layers, on a few validation windows."""
    input_BS, _ = next(
        val_batches(corpus, val_tokens=4 * seq_len, num_sequences=4, seq_len=seq_len)
    )
    largest: list[torch.Tensor] = []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, Attention)
        q, k, _ = module.queries_keys_values(inputs[0])
        logits = (q @ k.transpose(-1, -2)) * module.scale
        largest.append(logits.tril().abs().max())

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, Attention)]
    try:
        model(torch.from_numpy(input_BS).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(largest).max().item()


def autocast(device: torch.device) -> torch.autocast:
    """Bfloat16 on CUDA, float32 on the CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
