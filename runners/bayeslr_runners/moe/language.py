"""A seeded synthetic language of known entropy: a sparse Markov chain over tokens.

After each context of ``order`` tokens a few successors share most of the probability, the rest is
uniform over the vocabulary. The uniform part makes the chain ergodic, so its entropy rate exists
and is computed exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bayeslr.errors import SpecError

UNIFORM_SHARE = 0.05
_MAX_CONTEXTS = 2**20
# Chains are sampled side by side; each is long against any window cut out of it.
_MAX_CHAINS, _MIN_LENGTH = 4096, 1024


@dataclass(frozen=True, slots=True)
class MarkovLanguage:
    """Successors and their probabilities, each (num_contexts, branching).

    A context is its tokens read as digits in base ``vocab_size``, the newest last.
    """

    vocab_size: int
    order: int
    successors: NDArray[np.int64]
    probabilities: NDArray[np.float64]

    @classmethod
    def build(cls, *, vocab_size: int, order: int, branching: int, seed: int) -> Self:
        """Draw a language. Raises: SpecError if it has more than 2^20 contexts."""
        num_contexts = vocab_size**order
        if num_contexts > _MAX_CONTEXTS:
            raise SpecError(
                f"options: synthetic_vocab ^ synthetic_order must be at most {_MAX_CONTEXTS}, got "
                f"{vocab_size} ^ {order}"
            )
        rng = np.random.default_rng([seed, 0])
        ranks = rng.random((num_contexts, vocab_size))
        successors = np.argpartition(ranks, branching - 1, axis=1)[:, :branching]
        weights = rng.dirichlet(np.ones(branching), size=num_contexts)
        return cls(vocab_size, order, successors.astype(np.int64), weights)

    def entropy_rate(self) -> float:
        """Nats per token: the conditional entropy averaged over the stationary contexts."""
        return float(self.stationary() @ self._context_entropy())

    def stationary(self) -> NDArray[np.float64]:
        """Stationary probability of each context, by power iteration to 1e-12."""
        num_contexts = len(self.successors)
        share = np.full(num_contexts, 1.0 / num_contexts)
        following = self._following(np.arange(num_contexts)[:, None], self.successors)
        for _ in range(10_000):
            sparse = np.bincount(
                following.ravel(),
                weights=(share[:, None] * self.probabilities).ravel(),
                minlength=num_contexts,
            )
            # A uniform token moves all contexts that share their newer tokens to the same places.
            kept = share.reshape(self.vocab_size, -1).sum(axis=0)
            uniform = np.repeat(kept / self.vocab_size, self.vocab_size)
            new = (1.0 - UNIFORM_SHARE) * sparse + UNIFORM_SHARE * uniform
            if np.abs(new - share).sum() < 1e-12:
                break
            share = new
        normalised: NDArray[np.float64] = new / new.sum()
        return normalised

    def sample(self, num_tokens: int, *, seed: int) -> NDArray[np.uint16]:
        """Tokens of many independent chains, one after another."""
        rng = np.random.default_rng([seed, 1])
        num_chains = max(1, min(_MAX_CHAINS, num_tokens // _MIN_LENGTH))
        length = -(-num_tokens // num_chains)
        context = rng.choice(len(self.successors), size=num_chains, p=self.stationary())
        cumulative = np.cumsum(self.probabilities, axis=1)[:, :-1]
        tokens = np.empty((num_chains, length), dtype=np.uint16)
        for position in range(length):
            pick = (rng.random(num_chains)[:, None] > cumulative[context]).sum(axis=1)
            token = self.successors[context, pick]
            jump = rng.random(num_chains) < UNIFORM_SHARE
            token = np.where(jump, rng.integers(0, self.vocab_size, num_chains), token)
            tokens[:, position] = token
            context = self._following(context, token)
        return tokens.ravel()[:num_tokens]

    def _following(self, context: NDArray[np.int64], token: NDArray[np.int64]) -> NDArray[np.int64]:
        following: NDArray[np.int64] = (context * self.vocab_size + token) % len(self.successors)
        return following

    def _context_entropy(self) -> NDArray[np.float64]:
        background = UNIFORM_SHARE / self.vocab_size
        likely = (1.0 - UNIFORM_SHARE) * self.probabilities + background
        others = self.vocab_size - self.probabilities.shape[1]
        entropy: NDArray[np.float64] = -(likely * np.log(likely)).sum(
            axis=1
        ) - others * background * np.log(background)
        return entropy
