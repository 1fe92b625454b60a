"""NUTS in float64, in coordinates that warm-up makes round, for as long as it takes.

NumPyro's transition is used as it is. What is added around it: windows of warm-up that learn the
coordinates from draws and their gradients together, and one compilation for all windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr.coordinates import Tree, moved
from bayeslr.errors import UntrustworthyFit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bayeslr.coordinates import Dense
    from bayeslr.models.compiled import CompiledModel
    from bayeslr.models.valley import Arrays

    FloatArray = NDArray[np.float64]

# Transitions of a chain between two looks at it, and in each window of warm-up.
WINDOW = 100

# First step of the integrator, of a standard normal's unit.
_FIRST_STEP = 0.2

# How often a start is moved half way to the mode.
_HALVINGS = 20

# What is kept of each transition.
_STATISTICS = ("num_steps", "diverging", "accept_prob")
_KEPT = ("z", "z_grad", *_STATISTICS)


class _Chains:
    """Chains of NUTS on a compiled model, in coordinates about a centre."""

    def __init__(self, compiled: CompiledModel, data: Sequence[Any], num_chains: int,
                 target_accept: float, seed: int) -> None:  # fmt: skip
        import jax

        self.compiled, self.data, self.num_chains = compiled, data, num_chains
        self._begin, self._advance = _transitions(compiled, num_chains, target_accept)
        self._key = jax.random.PRNGKey(seed)
        self._state: Any = None

    def start(self, x: FloatArray, centre: FloatArray, coordinates: Dense | Tree) -> None:
        """Begin at x (chain, parameter); the next window adapts the step."""
        import jax

        self.centre, self.coordinates = centre, coordinates
        # In single precision x moves by a ten-millionth of its way from the centre, always the
        # same for the same z.
        self._model = centre, coordinates.compact(), self.data
        step = _FIRST_STEP
        if self._state is not None:
            step = float(np.mean(self._state.adapt_state.step_size))
        self._key, *keys = jax.random.split(self._key, self.num_chains + 1)
        states = []
        for at, key in zip(x, keys, strict=True):
            energy, gradient = self.compiled.value_and_grad(at, self.data)
            z, pull = coordinates.z(at - centre), coordinates.pull(np.asarray(gradient))
            states.append(self._begin(key, z, energy, pull, step, self._model))
        self._state = jax.tree.map(lambda *leaves: np.stack(leaves), *states)

    def run(self) -> dict[str, FloatArray]:
        """`WINDOW` transitions: x (chain, draw, parameter), and what is kept, in z."""
        import jax

        state, found = self._advance(self._state, *self._model)
        # On the host, as `start` leaves it: an array spread over devices would compile anew.
        self._state, kept = jax.tree.map(np.asarray, (state, found))
        return {**kept, "x": self.centre + self.coordinates.x(kept["z"])}


def _transitions(compiled: CompiledModel, num_chains: int, target_accept: float) -> tuple[Any, Any]:
    """``begin(key, z, energy, gradient, step, model)`` and ``advance(states, *model)``.

    ``model`` is (centre, compact coordinates, data). ``advance`` makes `WINDOW` transitions of
    every chain, the first after ``begin`` adapting the step: warm-up, draws and more draws are one
    compilation.
    """
    import jax
    from numpyro.infer.hmc import hmc
    from numpyro.infer.util import ParamInfo

    key = (num_chains, round(target_accept * 100))
    if key not in compiled.sampler:

        def energy(centre: Any, compact: Any, data: Sequence[Any]) -> Any:
            return lambda z: -compiled.log_density(centre + moved(compact, z), data)

        init, transition = hmc(potential_fn_gen=energy, algo="NUTS")

        def begin(key: Any, z: Any, energy: Any, pull: Any, step: float, model: Any) -> Any:
            return init(
                ParamInfo(z, energy, pull), WINDOW, step, adapt_mass_matrix=False,
                target_accept_prob=target_accept, max_tree_depth=8, model_args=model, rng_key=key,
            )  # fmt: skip

        def window(state: Any, *model: Any) -> Any:
            def once(state: Any, _: None) -> tuple[Any, Any]:
                state = transition(state, model, {})
                return state, {name: getattr(state, name) for name in _KEPT}

            return jax.lax.scan(once, state, None, length=WINDOW)

        axes = (0, None, None, None)
        parallel = num_chains <= jax.local_device_count()
        advance = jax.pmap(window, in_axes=axes) if parallel else jax.jit(jax.vmap(window, axes))
        compiled.sampler[key] = begin, advance
    begin, advance = compiled.sampler[key]
    return begin, advance


def _starts(compiled: CompiledModel, data: Sequence[Any], mode: FloatArray,
            coordinates: Dense | Tree, rng: np.random.Generator, num_chains: int,
            ) -> FloatArray:  # fmt: skip
    """Where the chains begin, (chain, parameter): about the mode, nearer where need be.

    Raises: UntrustworthyFit where the density is no number at the mode itself.
    """
    away = coordinates.x(0.5 * rng.normal(size=(num_chains, compiled.size)))
    for chain in range(num_chains):
        for _ in range(_HALVINGS):
            energy, gradient = compiled.value_and_grad(mode + away[chain], data)
            if np.isfinite(energy) and np.isfinite(np.asarray(gradient)).all():
                break
            away[chain] /= 2.0
        else:
            raise UntrustworthyFit(
                "the posterior's density is no number about its mode, so no chain can begin there; "
                "look for rows that contradict each other (bayeslr check)"
            )
    return np.asarray(mode + away)


def sample(compiled: CompiledModel, arrays: Arrays, mode: FloatArray, coordinates: Dense | Tree,
           renewed: Callable[[FloatArray], Tree], *,
           seed: int, num_warmup: int, num_draws: int, num_chains: int,
           enough: Callable[[dict[str, FloatArray]], bool] = lambda draws: True,
           max_rounds: int = 4, target_accept: float = 0.8,
           progress: Callable[[str], None] = lambda line: None,
           ) -> tuple[dict[str, FloatArray], dict[str, float]]:  # fmt: skip
    """NUTS draws, each (chain, draw, ...), and the sampler's statistics.

    mode, coordinates: where the chains start from, and in which coordinates the posterior is nearly
    round about it. Each window of warm-up but the last ends by making them rounder, by draws and
    gradients; a tree's branches are what ``renewed(draws)`` says, of draws (draw, parameter). After
    ``num_draws`` a chain, ``enough(draws)`` is asked; while it says no, the chains go on window by
    window, up to ``max_rounds`` times as many draws. Counts are rounded up to whole `WINDOW`s.
    Raises: UntrustworthyFit where no chain can begin.
    """
    data = compiled.data(arrays)
    chains = _Chains(compiled, data, num_chains, target_accept, seed)
    x = _starts(compiled, data, mode, coordinates, np.random.default_rng(seed), num_chains)
    num_windows = max(1, -(-num_warmup // WINDOW))
    centre, seen = mode, []
    for i in range(num_windows):
        chains.start(x, centre, coordinates)
        window = chains.run()
        progress(f"warm-up: window {i + 1} of {num_windows}")
        x = window["x"][:, -1]
        if i + 1 < num_windows:
            seen.append((window["x"], coordinates.push(-window["z_grad"])))
            # The first windows are on their way to where the posterior lies.
            at, gradient = (
                np.concatenate([part.reshape(-1, compiled.size) for part in parts])
                for parts in zip(*seen[len(seen) // 2 :], strict=True)
            )
            centre = at.mean(axis=0)
            if isinstance(coordinates, Tree):
                coordinates = renewed(at)
            coordinates = coordinates.rounder(at - centre, gradient)
    found: list[dict[str, FloatArray]] = []
    told: list[dict[str, FloatArray]] = []
    asked = -(-num_draws // WINDOW)
    for _ in range(asked * max_rounds):
        window = chains.run()
        told.append({name: window[name] for name in _STATISTICS})
        found.append(compiled.draws(window["x"], data))
        progress(f"{WINDOW * len(told):,} draws of each of {num_chains} chains")
        if len(told) >= asked:
            draws = {name: np.concatenate([f[name] for f in found], axis=1) for name in found[0]}
            if enough(draws):
                break
    statistics = {
        "divergences": float(sum(np.sum(window["diverging"]) for window in told)),
        "mean_steps": float(np.mean([window["num_steps"] for window in told])),
        "mean_acceptance": float(np.mean([window["accept_prob"] for window in told])),
    }
    return draws, statistics
