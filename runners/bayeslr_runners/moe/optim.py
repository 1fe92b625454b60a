"""AdamW whose parameter groups follow a parametrisation's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from bayeslr.errors import SpecError, StorageError
from bayeslr_runners.moe.parametrization import Parametrization


def param_groups(
    module: nn.Module,
    naming: Mapping[str, str],
    rules: Parametrization,
    *,
    lr: float,
    weight_decay: float,
    weight_decay_kind: str = "coupled",
    eps: float = 1e-8,
) -> list[dict[str, Any]]:
    """Optimizer parameter groups of any module, one a module group, for ``torch.optim.AdamW``.

    naming: patterns of parameter names (as in `fnmatch`) to module groups; the first match counts.
    weight_decay: with ``coupled`` a step shrinks weights by LR x weight_decay, as PyTorch does;
    with ``independent`` by weight_decay x (LR / peak LR), whatever the LR and the tuned multiplier
    of a group. Where the rules of LR and weight decay make up for each other, as over width under
    ``mup`` and its kin, neither kind changes with the shape; elsewhere the independent one follows
    the product of the two (``complete_mue``: 1 / m_N x rho_B / rho_D, for it scales no decay by
    the width).
    Raises: SpecError if a parameter's name matches no pattern, or a group that the rules lack.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        found.setdefault(group_of(name, naming), []).append(parameter)
    groups = []
    for group, parameters in found.items():
        if group not in rules.groups:
            raise SpecError(
                f"the naming map sends parameters to the module group {group!r}, and the rules "
                f"have {', '.join(rules.groups)} only; name one of these"
            )
        rule = rules.groups[group]
        decay = weight_decay * rule.weight_decay
        if weight_decay_kind == "independent":
            decay /= lr * rule.lr_multiplier
        groups.append(
            {
                "params": parameters,
                "group": group,
                "lr": lr * rule.lr,
                "weight_decay": decay,
                "eps": eps * rule.eps,
            }
        )
    return groups


def group_of(name: str, naming: Mapping[str, str]) -> str:
    """Module group of a parameter. Raises: SpecError if its name matches no pattern."""
    for pattern, group in naming.items():
        if fnmatchcase(name, pattern):
            return group
    raise SpecError(
        f"parameter {name!r} matches none of the naming patterns {', '.join(naming)}; add one"
    )


def stacked_groups(members: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Parameter groups of a stack from its members' own, which share parameters and epsilon.

    LR and weight decay become lists, one value a member.
    """
    return [
        {**groups[0], **{key: [group[key] for group in groups] for key in ("lr", "weight_decay")}}
        for groups in zip(*members, strict=True)
    ]


class AdamW:
    """AdamW over `param_groups`, each group's weights and gradients one flat tensor.

    In a stack (`stacked_groups`) that tensor is (R, n), and each member is clipped by its own norm.
    The parameters become views of the flat weights. The step is PyTorch's own fused one, called
    without ``torch.optim``: its optimizers import the compiler, which costs a short run a second.
    """

    def __init__(self, groups: list[dict[str, Any]], *, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2, self.num_steps = beta1, beta2, 0
        self.lr_factor = 0.0  # of the last step
        self.groups = [_FlatGroup(group) for group in groups]
        self._places = {p: (group, *ends) for group in self.groups for p, ends in group.places()}

    def backward(self, loss: Tensor) -> None:
        """Gradients of a scalar loss, in place of those before."""
        parameters = [parameter for group in self.groups for parameter in group.parameters]
        found = iter(torch.autograd.grad(loss, parameters))
        for group in self.groups:
            flat = [next(found).flatten(group.num_stacked) for _ in group.parameters]
            torch.cat(flat, dim=-1, out=group.grad)

    def clip_grad(self, max_norm: float) -> Tensor:
        """Scale all gradients to a joint norm of ``max_norm`` at most; the norm before that, (R,).

        A scalar outside a stack.
        """
        # Member by member: the order of a sum over one axis depends on the length of the others.
        norm_RG = torch.stack([_row_norms(group.grad) for group in self.groups], dim=-1)
        norm = _row_norms(norm_RG)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).unsqueeze(-1)
        for group in self.groups:
            group.grad.mul_(factor)
        return norm

    @torch.no_grad()
    def step(self, lr_factor: float) -> None:
        """Take a step at a share of each group's peak LR."""
        self.num_steps += 1
        self.lr_factor = lr_factor
        for group in self.groups:
            for lr, weight_decay, row in zip(
                group.peak_lr, group.weight_decay, group.rows, strict=True
            ):
                weights, grad, mean, square = ([one] for one in row)
                # PyTorch counts the step itself.
                done = torch.full((), self.num_steps - 1.0, device=row[0].device)
                adamw(
                    weights, grad, mean, square, [], [done], fused=True, lr=lr * lr_factor,
                    beta1=self.beta1, beta2=self.beta2, weight_decay=weight_decay, eps=group.eps,
                    amsgrad=False, maximize=False,
                )  # fmt: skip

    @torch.no_grad()
    def update_ratios(self) -> list[dict[str, float]]:
        """RMS of the last step over RMS of the weights, by module group; one a member.

        Weight decay is left out: it shrinks, and moves nothing in any direction.
        """
        by_group = {}
        for group in self.groups:
            by_group[group.name] = [
                lr * self.lr_factor * self._step_over_weights(*row, eps=group.eps)
                for lr, row in zip(group.peak_lr, group.rows, strict=True)
            ]
        count = len(next(iter(by_group.values())))
        return [{name: ratios[i] for name, ratios in by_group.items()} for i in range(count)]

    def _step_over_weights(
        self, weights: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *, eps: float
    ) -> float:
        if self.num_steps == 0:
            return 0.0
        step = self._direction(mean, square, eps)
        return float(torch.linalg.vector_norm(step) / torch.linalg.vector_norm(weights))

    @torch.no_grad()
    def direction(self, parameter: nn.Parameter) -> Tensor:
        """The last step of a parameter over its LR, in its shape; without weight decay.

        NaN before the first step.
        """
        group, start, stop = self._places[parameter]
        mean, square = (
            flat[..., start:stop].view(parameter.shape) for flat in (group.mean, group.square)
        )
        return self._direction(mean, square, group.eps)

    def _direction(self, mean: Tensor, square: Tensor, eps: float) -> Tensor:
        step = mean / (1.0 - self.beta1**self.num_steps)
        return step.div_((square / (1.0 - self.beta2**self.num_steps)).sqrt_().add_(eps))

    def state(self, member: int | None = None) -> dict[str, Any]:
        """A copy of weights and moments, on the CPU; of one member of a stack, as if alone."""
        return {
            "num_steps": self.num_steps,
            "lr_factor": self.lr_factor,
            "groups": {
                group.name: {key: group.saved(key, member).to("cpu", copy=True) for key in _SAVED}
                for group in self.groups
            },
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any], member: int | None = None) -> None:
        """Inverse of `state`; the model's weights change with it.

        Raises: StorageError if an earlier version, with other module groups, saved it.
        """
        self.num_steps = state["num_steps"]
        self.lr_factor = state.get("lr_factor", 0.0)
        if state["groups"].keys() != {group.name for group in self.groups}:
            raise StorageError(
                f"the checkpoint holds {', '.join(state['groups'])}, not the module groups of this "
                "version; delete it (checkpoint.pt, trunk.pt) to train the run from its start"
            )
        for group in self.groups:
            for key, saved in state["groups"][group.name].items():
                group.saved(key, member).copy_(saved)


_SAVED = ("weights", "mean", "square")


class _FlatGroup:
    """A module group's weights, gradients and moments, end to end."""

    def __init__(self, group: dict[str, Any]) -> None:
        self.parameters: list[nn.Parameter] = group["params"]
        self.name: str = group["group"]
        self.eps: float = group["eps"]
        # The members of a stack are rows, so that each one's weights lie as they do alone.
        self.num_stacked = 1 if isinstance(group["lr"], list) else 0
        self.peak_lr, self.weight_decay = (
            list[float](group[key] if self.num_stacked else [group[key]])
            for key in ("lr", "weight_decay")
        )
        flat = [p.detach().flatten(self.num_stacked) for p in self.parameters]
        self.weights = torch.cat(flat, dim=-1)
        self.grad, self.mean, self.square = (torch.zeros_like(self.weights) for _ in range(3))
        whole = (self.weights, self.grad, self.mean, self.square)
        self.rows: list[tuple[Tensor, ...]] = [whole]
        if self.num_stacked:
            self.rows = list(zip(*(one.unbind() for one in whole), strict=True))
        sizes = [one.shape[-1] for one in flat]
        for parameter, weights in zip(
            self.parameters, torch.split(self.weights, sizes, dim=-1), strict=True
        ):
            parameter.data = weights.view(parameter.shape)

    def places(self) -> list[tuple[nn.Parameter, tuple[int, int]]]:
        """Each parameter, and where it lies: first entry, and the one behind its last."""
        stops = list(accumulate(p[0].numel() if self.num_stacked else p.numel()
                                for p in self.parameters))  # fmt: skip
        return list(zip(self.parameters, pairwise([0, *stops]), strict=True))

    def saved(self, key: str, member: int | None) -> Tensor:
        """Weights or a moment, in a stack of one member."""
        whole: Tensor = getattr(self, key)
        return whole if member is None else whole[member]


def _row_norms(values: Tensor) -> Tensor:
    """Norm of a vector, or of each row of a matrix as if it were alone."""
    if values.dim() > 1:
        return torch.stack([_row_norms(row) for row in values])
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm
