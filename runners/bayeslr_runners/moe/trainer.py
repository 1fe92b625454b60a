"""A network with its optimizer and data: takes steps, is measured, saved and restored.

Shape suffixes as in `model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayeslr.errors import SpecError
from bayeslr.specs import RunSpec
from bayeslr_runners.moe.alignment import Direction
from bayeslr_runners.moe.data import Corpus, check_lengths, load_corpus, train_batch
from bayeslr_runners.moe.measure import Measurement, autocast, effective_experts, measure
from bayeslr_runners.moe.model import NAMING, LayerStats, MoeTransformer
from bayeslr_runners.moe.optim import AdamW, param_groups, stacked_groups
from bayeslr_runners.moe.options import Options
from bayeslr_runners.moe.parametrization import rules_of
from bayeslr_runners.moe.probe import probe
from bayeslr_runners.moe.shapes import MoeShape


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step showed: loss in nats per token and the norm of its gradient."""

    loss: float
    grad_norm: float
    effective_experts: float | None


class Trainer:
    """Takes optimizer steps of one run, or of a stack of runs that share all but what `stack` says.

    Step number and seed decide the batch of a step. A stack is one program: every tensor has a
    leading axis of R members, which never meet. What is returned is a list, one item a run.
    stacked: give a single run that axis too. On a CPU it then takes the steps that it takes among
    others, to the bit, for a few per cent more time (docs/log.md).
    Raises: SpecError if the device that the options name is not there.
    """

    def __init__(
        self, specs: Sequence[RunSpec], corpus: Corpus, options: Options, *, stacked: bool = False
    ) -> None:
        spec = specs[0]
        if options.train.device == "cuda" and not torch.cuda.is_available():
            raise SpecError(
                "options: device is 'cuda', but this PyTorch sees no CUDA device; use 'cpu'"
            )
        self.stacked = stacked or len(specs) > 1
        shape = MoeShape.from_mapping(spec.shape)
        rules = [rules_of(one) for one in specs]
        self.specs, self.corpus, self.options, self.shape = tuple(specs), corpus, options, shape
        self.device = torch.device(options.train.device)
        self._rules = rules[0]
        self._initial_RTD: Tensor | None = None
        self._initial_losses: list[float] | None = None
        self.model = self._initial_model()
        loss = self.model.loss
        self.loss = torch.compile(loss) if options.train.compile else loss
        groups = [
            param_groups(
                self.model,
                NAMING,
                one_rules,
                lr=one.lr,
                weight_decay=one.weight_decay,
                weight_decay_kind=one.weight_decay_kind,
                eps=options.train.adam_eps,
            )
            for one, one_rules in zip(specs, rules, strict=True)
        ]
        beta1, beta2 = (
            1.0 - min(1.0, (1.0 - beta) * rules[0].one_minus_beta)
            for beta in (options.train.beta1, options.train.beta2)
        )
        self.optimizer = AdamW(
            stacked_groups(groups) if self.stacked else groups[0], beta1=beta1, beta2=beta2
        )

    @classmethod
    def build(cls, *specs: RunSpec, stacked: bool = False) -> Trainer:
        """Trainer of one or more specs, data loaded. Raises: SpecError if one breaks a rule."""
        options = Options.from_mapping(specs[0].options)
        corpus = load_corpus(options.data)
        check_lengths(corpus, seq_len=specs[0].seq_len)
        return cls(specs, corpus, options, stacked=stacked)

    def keeping(self, members: Sequence[int]) -> Trainer:
        """The same runs without the others, where they are."""
        states = self.state()
        kept = [self.specs[member] for member in members]
        smaller = Trainer(kept, self.corpus, self.options, stacked=self.stacked)
        smaller.restore([states[member] for member in members])
        return smaller

    @property
    def device_name(self) -> str:
        """``cpu``, or the name of the GPU."""
        is_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if is_gpu else "cpu"

    @property
    def num_threads(self) -> int:
        """CPU threads of this process."""
        return torch.get_num_threads()

    def step(self, number: int, lr_factor: float) -> list[Step]:
        """Take optimizer step ``number`` (from 0) at a share of the peak LR.

        A single run's weights are left alone if its loss or gradient is not finite; in a stack the
        others' are not touched by it, and it is for the caller to go on without that member.
        """
        input_BS, target_BS = self._batch(number)
        with autocast(self.device):
            loss, stats = self.loss(input_BS, target_BS)
        self.optimizer.backward((loss + self._router_losses(stats)).sum())
        norm = self.optimizer.clip_grad(self.options.train.grad_clip)
        effective: list[float | None] = [None] * len(self.specs)
        if stats:
            load_LE = torch.stack([layer.load_E for layer in stats], dim=-2)
            effective = effective_experts(load_LE).amin(-1).flatten().tolist()
        if self.model.members or bool(torch.isfinite(loss + norm)):
            self.optimizer.step(lr_factor)
            self._balance(stats)
        return [
            Step(*values)
            for values in zip(
                loss.flatten().tolist(), norm.flatten().tolist(), effective, strict=True
            )
        ]

    def measure(self) -> list[Measurement]:
        """Measure the validation loss and the network's state."""
        measured = self._measured(self.model, self.optimizer.direction)
        for one, ratios in zip(measured, self.optimizer.update_ratios(), strict=True):
            one.diagnostics["update_ratio"] = ratios
        return measured

    def initial_loss(self, member: int) -> float:
        """Validation loss of a run before its first step."""
        if self._initial_losses is None:
            measured = self._measured(self._initial_model(), None)
            self._initial_losses = [one.loss for one in measured]
        return self._initial_losses[member]

    def _measured(self, model: MoeTransformer, direction: Direction | None) -> list[Measurement]:
        spec = self.specs[0]
        if self._initial_RTD is None:  # from the seeds: a resumed run has left it behind
            state = probe(self._initial_model(), self.corpus, spec.seq_len, self.device)
            self._initial_RTD = state.hidden_RTD
        return measure(
            model,
            self.corpus,
            val_tokens=self.options.data.val_tokens,
            batch_sequences=spec.batch_tokens // spec.seq_len,
            seq_len=spec.seq_len,
            device=self.device,
            initial_RTD=self._initial_RTD,
            direction=direction,
        )

    def state(self) -> list[dict[str, Any]]:
        """A copy of weights, optimizer moments and buffers of each run, on the CPU, as if alone."""
        return [
            {
                "optimizer": self.optimizer.state(member),
                "buffers": {
                    name: (buffer if member is None else buffer[member]).to("cpu", copy=True)
                    for name, buffer in self.model.named_buffers()
                },
            }
            for member in self._members()
        ]

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Inverse of `state`."""
        for member, state in zip(self._members(), states, strict=True):
            self.optimizer.restore(state["optimizer"], member)
            for name, buffer in self.model.named_buffers():
                (buffer if member is None else buffer[member]).copy_(state["buffers"][name])

    def _initial_model(self) -> MoeTransformer:
        seeds = [one.seed for one in self.specs]
        return MoeTransformer(
            self.shape,
            self._rules,
            self.options.model,
            vocab_size=self.corpus.vocab_size,
            seed=seeds if self.stacked else seeds[0],
        ).to(self.device)

    def _members(self) -> Sequence[int | None]:
        return range(len(self.specs)) if self.model.members else [None]

    def _batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step; members of one seed see the same ones."""
        spec = self.specs[0]
        by_seed = {
            seed: train_batch(
                self.corpus,
                seed=seed,
                step=number,
                num_sequences=spec.batch_tokens // spec.seq_len,
                seq_len=spec.seq_len,
            )
            for seed in dict.fromkeys(one.seed for one in self.specs)
        }
        sides = []
        for side in (0, 1):
            tokens = [torch.from_numpy(by_seed[one.seed][side]) for one in self.specs]
            together = torch.stack(tokens) if self.model.members else tokens[0]
            sides.append(together.to(self.device))
        return sides[0], sides[1]

    def _router_losses(self, stats: list[LayerStats]) -> Tensor:
        options = self.options.model
        total = torch.zeros(self.model.members, device=self.device)
        for layer in stats:
            total = total + options.balance_coef * layer.balance_loss
            total = total + options.z_loss_coef * layer.z_loss
        return total

    @torch.no_grad()
    def _balance(self, stats: list[LayerStats]) -> None:
        """Shift each selection bias towards an even load. Source: Wang et al. 2024 (2408.15664)."""
        rate = self.options.model.bias_rate
        if rate == 0:
            return
        biases = [b for name, b in self.model.named_buffers() if name.endswith("selection_bias")]
        for bias_E, layer in zip(biases, stats, strict=True):
            load_E = layer.load_E.to(bias_E.dtype)
            bias_E += rate * torch.sign(load_E.mean(-1, keepdim=True) - load_E)
