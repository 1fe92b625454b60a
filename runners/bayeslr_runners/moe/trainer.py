"""A network with its optimizer and data: takes steps, is measured, saved and restored.

Shape suffixes as in `model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslr.errors import SpecError
from bayeslr.specs import RunSpec
from bayeslr_runners.moe.data import Corpus, check_lengths, load_corpus, train_batch
from bayeslr_runners.moe.measure import Measurement, autocast, load_summary, measure
from bayeslr_runners.moe.model import NAMING, LayerStats, MoeTransformer
from bayeslr_runners.moe.optim import AdamW, param_groups
from bayeslr_runners.moe.options import Options
from bayeslr_runners.moe.parametrization import parametrization
from bayeslr_runners.moe.shapes import MoeShape


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step showed: loss in nats per token and the norm of its gradient."""

    loss: float
    grad_norm: float
    effective_experts: float | None


class Trainer:
    """Takes optimizer steps of one run. Step number and seed decide the batch of a step."""

    def __init__(self, spec: RunSpec, corpus: Corpus, options: Options) -> None:
        shape = MoeShape.from_mapping(spec.shape)
        rules = parametrization(
            spec.parametrization,
            shape,
            options.scaling,
            tokens=spec.tokens,
            batch_tokens=spec.batch_tokens,
        )
        self.spec, self.corpus, self.options, self.shape = spec, corpus, options, shape
        self.device = torch.device(options.train.device)
        self.model = MoeTransformer(
            shape, rules, options.model, vocab_size=corpus.vocab_size, seed=spec.seed
        ).to(self.device)
        self.forward = torch.compile(self.model) if options.train.compile else self.model
        groups = param_groups(
            self.model,
            NAMING,
            rules,
            lr=spec.lr,
            weight_decay=spec.weight_decay,
            weight_decay_kind=spec.weight_decay_kind,
            eps=options.train.adam_eps,
        )
        beta1, beta2 = (
            1.0 - min(1.0, (1.0 - beta) * rules.one_minus_beta)
            for beta in (options.train.beta1, options.train.beta2)
        )
        self.optimizer = AdamW(groups, beta1=beta1, beta2=beta2)

    @classmethod
    def build(cls, spec: RunSpec) -> Trainer:
        """Trainer of a spec, data loaded. Raises: SpecError if the spec breaks a rule."""
        options = Options.from_mapping(spec.options)
        if options.train.device == "cuda" and not torch.cuda.is_available():
            raise SpecError(
                "options: device is 'cuda', but this PyTorch sees no CUDA device; use 'cpu'"
            )
        corpus = load_corpus(options.data)
        check_lengths(corpus, seq_len=spec.seq_len)
        return cls(spec, corpus, options)

    @property
    def device_name(self) -> str:
        """``cpu``, or the name of the GPU."""
        is_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if is_gpu else "cpu"

    def step(self, number: int, lr_factor: float) -> Step:
        """Take optimizer step ``number`` (from 0) at a share of the peak LR.

        The weights are left alone if the loss or its gradient is not finite.
        """
        spec = self.spec
        input_BS, target_BS = train_batch(
            self.corpus,
            seed=spec.seed,
            step=number,
            num_sequences=spec.batch_tokens // spec.seq_len,
            seq_len=spec.seq_len,
        )
        with autocast(self.device):
            logits_BSV, stats = self.forward(torch.from_numpy(input_BS).to(self.device))
            target_T = torch.from_numpy(target_BS).to(self.device).flatten()
        loss = F.cross_entropy(logits_BSV.float().flatten(0, 1), target_T)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss + self._router_losses(stats))
        norm = self.optimizer.clip_grad(self.options.train.grad_clip)
        effective = None
        if stats:
            load_LE = torch.stack([layer.load_E for layer in stats]).float()
            effective = load_summary(load_LE)["effective_experts_min"]
        result = Step(loss.item(), norm.item(), effective)
        if bool(torch.isfinite(loss + norm)):
            self.optimizer.step(lr_factor)
            self._balance(stats)
        return result

    def measure(self) -> Measurement:
        """Measure the validation loss and the network's state."""
        return measure(
            self.model,
            self.corpus,
            val_tokens=self.options.data.val_tokens,
            batch_sequences=self.spec.batch_tokens // self.spec.seq_len,
            seq_len=self.spec.seq_len,
            device=self.device,
        )

    def state(self) -> dict[str, Any]:
        """A copy of weights, optimizer moments and buffers, on the CPU."""
        return {
            "optimizer": self.optimizer.state(),
            "buffers": {n: b.to("cpu", copy=True) for n, b in self.model.named_buffers()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self.optimizer.restore(state["optimizer"])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(state["buffers"][name])

    def _router_losses(self, stats: list[LayerStats]) -> Tensor:
        options = self.options.model
        total = torch.zeros((), device=self.device)
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
            bias_E += rate * torch.sign(load_E.mean() - load_E)
