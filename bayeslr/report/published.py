"""Published laws as reference lines: what others would choose, each with its source.

Shown beside the posterior, never used by it: priors are in the prior cards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PublishedLaw:
    """A peak LR from active parameters, total parameters and tokens; all non-embedding counts."""

    label: str
    source: str
    formula: str
    law: Callable[[FloatArray, FloatArray, FloatArray], FloatArray]

    def __call__(self, n_active: ArrayLike, n_total: ArrayLike, tokens: ArrayLike) -> FloatArray:
        """Peak LR, of the shape to which the arguments broadcast."""
        counts = (np.asarray(value, dtype=float) for value in (n_active, n_total, tokens))
        return self.law(*np.broadcast_arrays(*counts))


def _flops(n_active: FloatArray, tokens: FloatArray) -> FloatArray:
    # The papers count non-embedding FLOPs a token; 6 N is within a few tenths of it in ln.
    return 6.0 * n_active * tokens


# The six whose recipe resembles a present-day pre-training run (AdamW or Muon, annealed schedule,
# batch chosen along with the LR). Their batch is the one that each paper found best.
PUBLISHED_LAWS = (
    PublishedLaw(
        "DeepSeek", "arXiv 2401.02954", "0.3118 C^-0.1250",
        lambda n, _, d: 0.3118 * _flops(n, d) ** -0.1250,
    ),
    PublishedLaw(
        "Step Law", "arXiv 2503.04715", "1.79 N_total^-0.713 D^0.307",
        lambda _, t, d: 1.79 * t**-0.713 * d**0.307,
    ),
    PublishedLaw(
        "Ling MoE", "arXiv 2507.17702", "1.1576 C^-0.1529",
        lambda n, _, d: 1.1576 * _flops(n, d) ** -0.1529,
    ),
    PublishedLaw(
        "Ling sparsity (Muon)", "arXiv 2609.08690", "0.8343 C^-0.1385 (N_active/N_total)^0.1361",
        lambda n, t, d: 0.8343 * _flops(n, d) ** -0.1385 * (n / t) ** 0.1361,
    ),
    PublishedLaw(
        "Moonlight", "arXiv 2502.16982", "0.0127 C^-0.057",
        lambda n, _, d: 0.0127 * _flops(n, d) ** -0.057,
    ),
    PublishedLaw(
        "OpenEuroLLM", "arXiv 2608.28308", "0.3714 N_active^-0.417 D^0.086",
        lambda n, _, d: 0.371396 * n**-0.417 * d**0.086,
    ),
)  # fmt: skip


# By parameter of the prior cards: (name, value, source). Values are as the source states them; at
# fixed batch the token exponent is lower than at the best batch.
PUBLISHED_EXPONENTS: dict[str, tuple[tuple[str, float, str], ...]] = {
    "lr_n_active": (
        ("Zhou", -0.22, "arXiv 2601.05049"), ("Bjorck", -0.23, "arXiv 2409.19913"),
        ("Porian", -0.36, "arXiv 2406.19146"), ("OpenEuroLLM", -0.42, "arXiv 2608.28308"),
        ("Step Law", -0.71, "arXiv 2503.04715"), ("Joint MoE", -0.81, "arXiv 2502.05172"),
    ),
    "lr_sparsity": (("Ling sparsity", 0.136, "arXiv 2609.08690"),),
    "lr_tokens": (
        ("Scion", -0.28, "arXiv 2510.03871"), ("OpenEuroLLM", 0.086, "arXiv 2608.28308"),
        ("Step Law", 0.307, "arXiv 2503.04715"),
    ),
    "lr_batch_below": (
        ("square root", 0.5, "arXiv 2405.14578"), ("Scion", 0.62, "arXiv 2510.03871"),
        ("OpenEuroLLM", 0.86, "arXiv 2608.28308"),
    ),
    "best_batch_tokens": (
        ("Power Lines", 0.383, "arXiv 2505.13738"), ("Scion", 0.45, "arXiv 2510.03871"),
        ("OpenEuroLLM", 0.46, "arXiv 2608.28308"), ("Zhang", 0.47, "arXiv 2410.21676"),
        ("Ling sparsity", 0.518, "arXiv 2609.08690"), ("Schaipp", 0.566, "arXiv 2607.01487"),
        ("Step Law", 0.571, "arXiv 2503.04715"),
    ),
    "loss_exponent_n_active": (("Chinchilla", 0.34, "arXiv 2203.15556"),),
    "loss_exponent_tokens": (("Chinchilla", 0.28, "arXiv 2203.15556"),),
}  # fmt: skip
