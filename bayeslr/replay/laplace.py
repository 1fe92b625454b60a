"""The posterior of a refit that chooses runs: a normal approximation at its mode.

A replay of twenty seeds would spend hours in NUTS merely to choose. The approximation holds the
scales of misfit and noise to their priors and takes about a second; its spread at the targets is
within a fifth of NUTS's on the Step Law tables (docs/log.md). The answer of a replay is by NUTS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bayeslr import sampling
from bayeslr.features import build_design
from bayeslr.models import valley
from bayeslr.models.compiled import compiled_model
from bayeslr.posterior import LOOP_GATE, Posterior, make_posterior
from bayeslr.priors import Prior, as_prior

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bayeslr.runs import RunTable


def normal_posterior(runs: RunTable, prior: str | Prior, *, sizes: Mapping[str, int], seed: int,
                     num_draws: int = 2000) -> Posterior:  # fmt: skip
    """Draws of the normal with the mode and the curvature of the posterior; scales by their priors.

    sizes: least number of runs, slices, cells and shapes to pad to, so that fits of growing tables
    share one compilation.
    Raises: DataError if no run can be used.
    """
    sampling.configure_jax()
    card = as_prior(prior)
    design = build_design(runs)
    own = design.sizes
    padded = sampling.padded({level: max(size, sizes.get(level, 0)) for level, size in own.items()})
    arrays = valley.model_data(design, padded)
    compiled = compiled_model(arrays, card, len(design.families))
    mode, curvature = sampling.find_mode(compiled, arrays, card)
    for name, at in sampling.held(compiled).items():
        curvature = curvature.with_own(at, 1.0 / card[name].scale ** 2)
    z = np.random.default_rng([seed, 20_260_110]).normal(size=(num_draws, compiled.size))
    x = mode + sampling.coordinates_of(compiled, curvature).x(z)
    draws = compiled.draws(x.reshape(2, -1, compiled.size), compiled.data(arrays))
    return make_posterior(
        sampling.unpadded(draws, own), design, runs, card, method="bayes", seed=seed,
        statistics={"divergences": 0.0}, gate=LOOP_GATE,
    )  # fmt: skip
