"""Cross-entropy of the next token, of each token or as the mean that is trained on.

Shape suffixes as in `model`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslr_runners.moe.experts import apply

CHUNK_LOGITS = 1 << 18
"""Logits that are held at a time: 1 MB, so that they stay in a core's cache."""


def token_losses(logits_BSV: Tensor, target_BS: Tensor) -> Tensor:
    """Loss of each token in nats, in the shape of the targets."""
    losses = F.cross_entropy(logits_BSV.flatten(0, -2), target_BS.flatten(), reduction="none")
    return losses.view(target_BS.shape)


def head_loss(x_BSD: Tensor, head_VD: Tensor, target_BS: Tensor, scale: float) -> Tensor:
    """Mean loss in nats of the logits ``scale`` x head x, of each member of a stack; for the CPU.

    The logits are never there all at once: a chunk of them is made, turned into its part of the
    loss and of the gradients, and forgotten.
    """
    members = head_VD.shape[:-2]
    head_RVD = head_VD if members else head_VD.unsqueeze(0)
    x_RTD = x_BSD.reshape(len(head_RVD), -1, x_BSD.shape[-1])
    target_RT1 = target_BS.reshape(len(head_RVD), -1, 1)
    return apply(_HeadLoss, x_RTD, head_RVD, target_RT1, scale).view(members)


class _HeadLoss(torch.autograd.Function):
    """The gradients are ready with the loss; the backward pass has only to scale them."""

    @staticmethod
    def forward(
        ctx: Any, x_RTD: Tensor, head_RVD: Tensor, target_RT1: Tensor, scale: float
    ) -> Tensor:
        num_tokens = x_RTD.shape[1]
        rows = max(1, CHUNK_LOGITS // head_RVD.shape[1])
        grad_x_RTD, grad_head_RVD = torch.empty_like(x_RTD), torch.zeros_like(head_RVD)
        losses = []
        for x_TD, head_VD, target_T1, grad_x_TD, grad_head_VD in zip(
            x_RTD, head_RVD * scale, target_RT1, grad_x_RTD, grad_head_RVD, strict=True
        ):
            total = x_RTD.new_zeros(())
            for x, target, grad_x in zip(
                x_TD.split(rows), target_T1.split(rows), grad_x_TD.split(rows), strict=True
            ):
                power_TV = x @ head_VD.T
                largest_T1 = power_TV.amax(-1, keepdim=True)
                wanted_T1 = power_TV.gather(-1, target)
                sum_T1 = power_TV.sub_(largest_T1).exp_().sum(-1, keepdim=True)
                total += (sum_T1.log() + largest_T1 - wanted_T1).sum()
                grad_TV = power_TV.mul_(1.0 / (num_tokens * sum_T1))
                grad_TV.scatter_add_(-1, target, torch.full_like(sum_T1, -1.0 / num_tokens))
                torch.mm(grad_TV, head_VD, out=grad_x)
                grad_head_VD.addmm_(grad_TV.T, x, alpha=scale)
            losses.append(total / num_tokens)
        ctx.save_for_backward(grad_x_RTD, grad_head_RVD)
        return torch.stack(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x_RTD, grad_head_RVD = ctx.saved_tensors
        grad_R11 = grads[0].view(-1, 1, 1)
        return grad_x_RTD * grad_R11, grad_head_RVD * grad_R11, None, None
