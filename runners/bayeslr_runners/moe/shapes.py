"""Shape of a mixture-of-experts transformer, checked, with its parameter counts by arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from bayeslr.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeShape:
    """Widths, depth and experts of a decoder; a dense model has ``n_experts = top_k = 1``.

    ``d_expert`` is the hidden width of each SwiGLU expert, routed or shared.
    """

    d_model: int
    n_layers: int
    n_heads: int
    d_expert: int
    n_experts: int = 1
    top_k: int = 1
    n_shared_experts: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        where = f"shape {self.name or 'without name'}"
        for key in ("d_model", "n_layers", "n_heads", "d_expert", "n_experts", "top_k"):
            _whole(where, key, getattr(self, key), least=1)
        _whole(where, "n_shared_experts", self.n_shared_experts, least=0)
        if self.d_model % (2 * self.n_heads):
            raise SpecError(
                f"{where}: d_model ({self.d_model}) must be a multiple of 2 x n_heads "
                f"({2 * self.n_heads}), because rotary positions pair up the columns of a head"
            )
        if self.top_k > self.n_experts:
            raise SpecError(
                f"{where}: top_k ({self.top_k}) must not exceed n_experts ({self.n_experts})"
            )

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any]) -> Self:
        """Shape from a recipe's table. Raises: SpecError on an unknown or a missing key."""
        where = f"shape {raw.get('name', 'without name')}"
        fields = dataclasses.fields(cls)
        unknown = sorted(set(raw) - {f.name for f in fields})
        if unknown:
            raise SpecError(
                f"{where}: unknown key {unknown[0]!r}; allowed keys are "
                f"{', '.join(sorted(f.name for f in fields))}"
            )
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in raw]
        if missing:
            raise SpecError(f"{where}: key {missing[0]!r} is missing")
        return cls(**raw)

    @property
    def d_head(self) -> int:
        """Width of an attention head."""
        return self.d_model // self.n_heads

    @property
    def arch(self) -> str:
        """``moe`` or ``dense``, as in the run table."""
        return "moe" if self.n_experts > 1 else "dense"

    @property
    def has_router(self) -> bool:
        """Whether tokens are routed; one expert needs no router."""
        return self.n_experts > 1

    @property
    def active_expert_width(self) -> int:
        """Hidden width that a token passes through, shared experts included."""
        return (self.top_k + self.n_shared_experts) * self.d_expert

    def counts(self, *, qk_norm: bool = True, vocab_size: int | None = None) -> tuple[int, int]:
        """Active and total parameters.

        Without ``vocab_size`` neither embedding nor head is counted (``non_embedding``, as in
        Kaplan et al. 2020); with it, both are (``total``; they are not tied). The router counts as
        active in full.
        """
        d = self.d_model
        expert = 3 * d * self.d_expert
        layer = 4 * d * d + 2 * d + (2 * self.d_head if qk_norm else 0)
        layer += self.n_experts * d if self.has_router else 0
        layer += self.n_shared_experts * expert
        shared = self.n_layers * layer + d
        shared += 2 * vocab_size * d if vocab_size is not None else 0
        return (
            shared + self.n_layers * self.top_k * expert,
            shared + self.n_layers * self.n_experts * expert,
        )


def _whole(where: str, key: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SpecError(f"{where}: {key} must be a whole number >= {least}, got {value!r}")
