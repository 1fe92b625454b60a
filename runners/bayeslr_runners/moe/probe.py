"""What a network does to a few validation windows, always the same ones: the state of its layers.

Shape suffixes as in `model`; R members, one outside a stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bayeslr_runners.moe.alignment import Direction, log_alignment_ratio, step_alignment
from bayeslr_runners.moe.data import Corpus, val_batches
from bayeslr_runners.moe.model import Attention, Block, MoeLayer, MoeTransformer

NUM_WINDOWS = 4


class Probe(NamedTuple):
    """Largest scaled attention logit over layers; RMS of the residual stream behind each block;
    the representation that the head reads; by module group, the log alignment ratio of the step
    (mean over the group's matrices), empty if no step was given.
    """

    attention_logit_R: Tensor
    stream_rms_RL: Tensor
    hidden_RTD: Tensor
    alignment_R: Mapping[str, Tensor]


@torch.no_grad()
def probe(
    model: MoeTransformer,
    corpus: Corpus,
    seq_len: int,
    device: torch.device,
    direction: Direction | None = None,
) -> Probe:
    """Pass the windows through the network. direction: the last step of each of its parameters."""
    count = model.members[0] if model.members else 1
    logits: list[Tensor] = []
    streams: list[Tensor] = []
    hidden: list[Tensor] = []
    alignments: dict[str, list[Tensor]] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if direction is not None:
            for group, ratio_R in step_alignment(module, inputs[0], direction, count):
                alignments.setdefault(group, []).append(ratio_R)
        if isinstance(module, Attention):
            q, k, _ = module.queries_keys_values(inputs[0])
            logit = (q @ k.transpose(-1, -2)) * module.scale
            logits.append(logit.tril().abs().view(count, -1).amax(dim=1))
        elif isinstance(module, Block):
            streams.append(output[0].float().reshape(count, -1).square().mean(dim=1).sqrt())
        elif module is model.norm:
            hidden.append(output.float())

    watched = [m for m in model.modules() if isinstance(m, Attention | MoeLayer | Block)]
    hooks = [module.register_forward_hook(look) for module in [*watched, model.norm]]
    input_BS, _ = next(
        val_batches(
            corpus, val_tokens=NUM_WINDOWS * seq_len, num_sequences=NUM_WINDOWS, seq_len=seq_len
        )
    )
    try:
        model(for_members(input_BS, model.members, device))
    finally:
        for hook in hooks:
            hook.remove()
    if direction is not None:
        alignments["head"] = [log_alignment_ratio(hidden[0], direction(model.head).mT, count)]
    return Probe(
        torch.stack(logits).amax(dim=0),
        torch.stack(streams, dim=1),
        hidden[0].reshape(count, -1, hidden[0].shape[-1]),
        {group: torch.stack(ratios).mean(dim=0) for group, ratios in alignments.items()},
    )


def representation_change(hidden_TD: Tensor, initial_TD: Tensor) -> float:
    """RMS change of the representation since initialisation over its RMS there.

    Of order one at every width where features are learned; towards 0 with the width where they
    are not (Yang and Hu 2021).
    """
    change = (hidden_TD - initial_TD).square().mean() / initial_TD.square().mean()
    return change.sqrt().item()


def effective_rank(hidden_TD: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values, after centring.

    Between 1 and the width. Source: Roy and Vetterli 2007.
    """
    if not bool(torch.isfinite(hidden_TD).all()):
        return float("nan")
    value_D = torch.linalg.svdvals(hidden_TD - hidden_TD.mean(dim=0)).double()
    share_D = value_D / value_D.sum()
    return float((-torch.xlogy(share_D, share_D).sum()).exp())


def for_members(
    token_BS: NDArray[np.int64], members: tuple[int, ...], device: torch.device
) -> Tensor:
    """The same tokens for every member of a stack, (R, B, S)."""
    token = torch.from_numpy(token_BS).to(device)
    return token.expand(*members, *token.shape) if members else token
