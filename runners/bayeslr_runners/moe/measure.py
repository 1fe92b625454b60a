"""Validation loss and the state of the network, read without training it.

Shape suffixes as in `model`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from bayeslr_runners.moe.alignment import Direction
from bayeslr_runners.moe.data import Corpus, val_batches
from bayeslr_runners.moe.experts import router_entropy
from bayeslr_runners.moe.losses import token_losses
from bayeslr_runners.moe.model import MoeTransformer
from bayeslr_runners.moe.probe import effective_rank, for_members, probe, representation_change


class Measurement(NamedTuple):
    """Mean validation loss in nats per token, its standard error over sequences, diagnostics."""

    loss: float
    loss_se: float
    diagnostics: dict[str, Any]


@torch.no_grad()
def measure(
    model: MoeTransformer,
    corpus: Corpus,
    *,
    val_tokens: int,
    batch_sequences: int,
    seq_len: int,
    device: torch.device,
    initial_RTD: torch.Tensor,
    direction: Direction | None,
) -> list[Measurement]:
    """Measure the loss over the validation windows, the same ones in every run.

    The standard error is that of the mean over windows. Runs share the windows, so a difference
    between two runs is much surer than it says. Returns one measurement a member of a stack.
    initial_RTD: the representation at initialisation, as `probe` gives it.
    direction: the last step of each parameter; without it nothing is said of alignment.
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
            entropies.append(
                torch.stack([router_entropy(layer.score_TE) for layer in stats], dim=-1)
            )
    count = model.members[0] if model.members else 1
    loss_RB = torch.cat(losses, dim=-1).double().cpu().view(count, -1)
    state = probe(model, corpus, seq_len, device, direction)
    found = []
    for member, loss_B in enumerate(loss_RB):
        hidden_TD = state.hidden_RTD[member]
        diagnostics = {
            "max_attention_logit": state.attention_logit_R[member].item(),
            "activation_rms": state.stream_rms_RL[member].tolist(),
            "representation_change": representation_change(hidden_TD, initial_RTD[member]),
            "effective_rank": effective_rank(hidden_TD),
            "update_alignment": {
                group: ratio_R[member].item() for group, ratio_R in state.alignment_R.items()
            },
        }
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
    return {
        "max_load": (share_LE.max() * share_LE.shape[1]).item(),
        "effective_experts_min": effective_experts(load_LE).min().item(),
    }


def effective_experts(load_LE: torch.Tensor) -> torch.Tensor:
    """Exponential of the load's entropy in each layer; of any leading axes."""
    share_LE = load_LE / load_LE.sum(dim=-1, keepdim=True)
    return (-torch.xlogy(share_LE, share_LE).sum(dim=-1)).exp()


def autocast(device: torch.device) -> torch.autocast:
    """Bfloat16 on CUDA, float32 on the CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
