"""What a recipe's ``[options]`` table may say to the proxy trainer, checked."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from bayeslr.errors import SpecError
from bayeslr.specs import MODULE_GROUPS

DATA_KINDS = ("stdlib", "synthetic", "path")
DECAY_SHAPES = ("linear", "one_minus_sqrt")
DEVICES = ("cpu", "cuda")
GROUPS = MODULE_GROUPS


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """Where the tokens come from. Byte data have a vocabulary of 256.

    data: ``stdlib`` (text of the running Python's standard library), ``synthetic`` (a Markov chain
    of known entropy) or ``path`` (a text file, a folder of them, or a .npy or .bin token array).
    val_tokens: tokens of the validation set, the same ones in every run.
    """

    data: str = "stdlib"
    path: str | None = None
    vocab_size: int | None = None
    val_fraction: float = 0.05
    val_tokens: int = 32_768
    synthetic_seed: int = 0
    synthetic_vocab: int = 64
    synthetic_order: int = 2
    synthetic_branching: int = 8
    synthetic_tokens: int = 4_000_000

    def __post_init__(self) -> None:
        _one_of("data", self.data, DATA_KINDS)
        if (self.data == "path") != (self.path is not None):
            raise SpecError(
                f"options: path goes with data = 'path' and only with it, got data = "
                f"{self.data!r} and path = {self.path!r}"
            )
        if not 0 < self.val_fraction < 1:
            raise SpecError(f"options: val_fraction must be in (0, 1), got {self.val_fraction}")
        for name in ("synthetic_order", "synthetic_branching", "synthetic_tokens", "val_tokens"):
            _at_least(name, getattr(self, name), 1)
        if self.vocab_size is not None:
            _at_least("vocab_size", self.vocab_size, 1)
        _at_least("synthetic_vocab", self.synthetic_vocab, self.synthetic_branching)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """What the shape does not say about the network.

    qk_norm is on by default: it bounds attention logits, so that the high-LR side of the valley
    ends in the experts and not in attention, and it is common in current MoE models (OLMoE, Qwen3).
    gates: ``softmax`` (over all experts), ``softmax_topk`` (over the chosen ones), ``sigmoid`` or
    ``sigmoid_topk`` (normalised over the chosen ones); None takes the parametrisation's own.
    bias_rate: step of the auxiliary-loss-free selection bias; 0 switches it off.
    """

    qk_norm: bool = True
    rope_theta: float = 10_000.0
    gates: str | None = None
    balance_coef: float = 0.01
    z_loss_coef: float = 1e-3
    bias_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.gates is not None:
            _one_of("gates", self.gates, GATES)
        for name in ("balance_coef", "z_loss_coef", "bias_rate"):
            _at_least(name, getattr(self, name), 0)
        _above_zero("rope_theta", self.rope_theta)


GATES = ("softmax", "softmax_topk", "sigmoid", "sigmoid_topk")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingOptions:
    """Base point of the parametrisation, and LR multipliers module by module.

    base_shape: the shape at which every rule is the standard one (needed by all but ``sp``).
    base_tokens, base_batch_tokens: horizon and batch at which the LR was tuned.
    horizon_exponent: LR x (tokens / base_tokens) ^ exponent; -0.5, -0.3 and 0 are the hypotheses.
    None is the parametrisation's own: -0.5 for ``complete_mue``, 0 for the others.
    depth_exponent: residual branches x (depth ratio) ^ -exponent under ``completep``.
    """

    base_shape: Mapping[str, Any] | None = None
    base_tokens: float | None = None
    base_batch_tokens: float | None = None
    horizon_exponent: float | None = None
    depth_exponent: float = 1.0
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group, value in self.lr_multipliers.items():
            _one_of("lr_multipliers, group", group, GROUPS)
            _check_type(f"lr_multipliers.{group}", value, "float")
            _above_zero(f"lr_multipliers.{group}", value)
        for name in ("base_tokens", "base_batch_tokens"):
            if getattr(self, name) is not None:
                _above_zero(name, getattr(self, name))
        for name in ("horizon_exponent", "depth_exponent"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise SpecError(f"options: {name} must be finite, got {getattr(self, name)}")
        if self.horizon_exponent and self.base_tokens is None:
            raise SpecError(
                f"options: horizon_exponent = {self.horizon_exponent} needs base_tokens, "
                "the horizon at which the LR was tuned"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """How the run is carried out.

    decay_shape: ``linear`` or ``one_minus_sqrt`` (Haegele et al. 2024), of the WSD decay.
    threads: CPU threads of the child; None shares the machine's cores between ``workers``.
    partial_evals: validation losses taken along the undecayed trunk.
    checkpoint_steps replaces checkpoint_seconds where it is given.
    grad_clip: largest norm of a step's gradient; 1e9 clips none.
    keep_trunk: leave the state before the last decay in the folder of a WSD run (12 bytes a
    parameter), for longer runs to go on from.
    """

    decay_shape: str = "linear"
    grad_clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    partial_evals: int = 4
    device: str = "cpu"
    compile: bool = False
    threads: int | None = None
    workers: int = 1
    checkpoint_seconds: float = 20.0
    checkpoint_steps: int | None = None
    keep_checkpoint: bool = False
    keep_trunk: bool = True

    def __post_init__(self) -> None:
        _one_of("decay_shape", self.decay_shape, DECAY_SHAPES)
        _one_of("device", self.device, DEVICES)
        for name in ("threads", "checkpoint_steps", "workers"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in ("partial_evals", "checkpoint_seconds"):
            _at_least(name, getattr(self, name), 0)
        # Adam divides by adam_eps where a token was never seen; clipped to 0 nothing would move.
        for name in ("grad_clip", "adam_eps"):
            _above_zero(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SpecError(f"options: {name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def num_threads(self) -> int:
        """Threads to use: those asked for, or this process's share of the cores."""
        try:
            cores = len(os.sched_getaffinity(0))
        except AttributeError:  # macOS, Windows
            cores = os.cpu_count() or 1
        return self.threads if self.threads is not None else max(1, cores // self.workers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """All options of the proxy trainer, one flat table in a recipe."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    scaling: ScalingOptions = field(default_factory=ScalingOptions)
    train: TrainOptions = field(default_factory=TrainOptions)

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any]) -> Self:
        """Options from a flat table. Raises: SpecError on an unknown key or a broken rule."""
        parts = {"data": DataOptions, "model": ModelOptions, "scaling": ScalingOptions,
                 "train": TrainOptions}  # fmt: skip
        types = {
            part: {f.name: str(f.type) for f in dataclasses.fields(c)} for part, c in parts.items()
        }
        allowed = {name: wanted for part in types.values() for name, wanted in part.items()}
        unknown = sorted(set(raw) - set(allowed))
        if unknown:
            raise SpecError(
                f"options: unknown key {unknown[0]!r}; allowed keys are "
                f"{', '.join(sorted(allowed))}"
            )
        for name, value in raw.items():
            _check_type(name, value, allowed[name])
        return cls(
            **{part: parts[part](**{k: raw[k] for k in types[part] if k in raw}) for part in parts}
        )


# By the name of a field's type: the types that a value may have, and how a person calls them.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a text"),
    "Mapping[str, Any]": ((Mapping,), "a table"),
    "Mapping[str, float]": ((Mapping,), "a table of numbers"),
    "None": ((type(None),), "left out"),
}


def _check_type(name: str, value: object, wanted: str) -> None:
    kinds = [_TYPES[kind] for kind in wanted.split(" | ")]
    types = [one for allowed, _ in kinds for one in allowed]
    if not isinstance(value, tuple(types)) or (isinstance(value, bool) and bool not in types):
        called = " or ".join(text for _, text in kinds)
        raise SpecError(f"options: {name} must be {called}, got {value!r}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"options: {name} must be one of {', '.join(allowed)}, got {value!r}")


def _above_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise SpecError(f"options: {name} must be finite and > 0, got {value!r}")


def _at_least(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise SpecError(f"options: {name} must be finite and >= {least}, got {value!r}")
