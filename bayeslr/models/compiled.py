"""The valley model as JAX functions of one flat vector: its log density, draws of what it reports.

Compiled once with its data as arguments, so that every table of the same padded sizes reuses it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr.models import valley
from bayeslr.priors import OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bayeslr.priors import Prior

    FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CompiledModel:
    """A model as JAX functions of one flat vector and of its data.

    names, shapes: value variables in order. ``log_density(x, data)`` is a scalar, ``outputs(x,
    data)`` the reported variables by name for x (draw, parameter), ``spreads(x, data)`` the means
    and sds of the effects' entries at one x, NAME_mean and NAME_spread.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    start: FloatArray
    log_density: Callable[[Any, Sequence[Any]], Any]
    outputs: Callable[[Any, Sequence[Any]], dict[str, Any]]
    spreads: Callable[[Any, Sequence[Any]], dict[str, Any]]
    value_and_grad: Callable[[Any, Sequence[Any]], Any]
    sampler: dict[tuple[int, ...], Any]

    def data(self, arrays: valley.Arrays) -> tuple[Any, ...]:
        """The arrays as its functions take them, on the device."""
        import jax.numpy as jnp

        return tuple(jnp.asarray(values) for values in arrays.values())

    def draws(self, x: FloatArray, data: Sequence[Any]) -> dict[str, FloatArray]:
        """Reported variables by name, each (chain, draw, ...), at x (chain, draw, parameter)."""
        found = self.outputs(x.reshape(-1, self.size), data)
        return {
            name: np.asarray(values).reshape(x.shape[:2] + values.shape[1:])
            for name, values in found.items()
        }

    @property
    def size(self) -> int:
        """Number of unconstrained parameters."""
        return len(self.start)

    def index(self, name: str) -> NDArray[np.int64]:
        """Positions of a value variable in the flat vector."""
        offset = 0
        for candidate, shape in zip(self.names, self.shapes, strict=True):
            size = int(np.prod(shape))
            if candidate == name:
                return np.arange(offset, offset + size)
            offset += size
        raise KeyError(name)


def compile_model(arrays: valley.Arrays, prior: Prior, num_families: int) -> CompiledModel:
    """Compile the valley model; the arrays give shapes only."""
    import jax
    import jax.numpy as jnp
    from pytensor.graph.fg import FunctionGraph
    from pytensor.graph.replace import graph_replace
    from pytensor.link.jax.dispatch import jax_funcify

    model = valley.build(arrays, prior, num_families)
    shared = [model[name] for name in arrays]
    inputs = [variable.type.clone(shape=variable.type.shape)() for variable in shared]
    values = list(model.value_vars)
    transformed = model.unobserved_value_vars
    names_out = [variable.name for variable in transformed]
    reported = {*prior.parameters, *OUTPUTS}
    of_effects = {f"{effect}_{what}" for effect in valley.EFFECTS for what in ("mean", "spread")}
    graphs = graph_replace(
        [model.logp(), *transformed], dict(zip(shared, inputs, strict=True)), strict=False
    )
    graph = FunctionGraph(inputs=[*values, *inputs], outputs=graphs, clone=True)
    from pytensor.compile.mode import get_mode

    with warnings.catch_warnings():
        # PyTensor says that it has no BLAS of its own, which JAX does not use, and that JAX cannot
        # raise for a negative scale; no scale here can be negative.
        for message in ("PyTensor could not link to a BLAS", "Skipping Check"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        get_mode("JAX").optimizer.rewrite(graph)
        function = jax_funcify(graph)
    point = model.initial_point(random_seed=0)
    names = tuple(variable.name for variable in values)
    shapes = tuple(np.shape(point[name]) for name in names)
    ends = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])

    def unpack(x: Any) -> list[Any]:
        parts = jnp.split(x, ends[1:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def log_density(x: Any, data: Sequence[Any]) -> Any:
        return jnp.asarray(function(*unpack(x), *data)[0])

    def variables(x: Any, data: Sequence[Any], wanted: Set[str]) -> dict[str, Any]:
        found = function(*unpack(x), *data)[1:]
        return {name: v for name, v in zip(names_out, found, strict=True) if name in wanted}

    def outputs(x: Any, data: Sequence[Any]) -> dict[str, Any]:
        return variables(x, data, reported)

    return CompiledModel(
        names=names,
        shapes=shapes,
        start=np.concatenate([np.ravel(point[name]) for name in names]).astype(float),
        log_density=log_density,
        outputs=jax.jit(jax.vmap(outputs, in_axes=(0, None))),
        spreads=jax.jit(lambda x, data: variables(x, data, of_effects)),
        value_and_grad=jax.jit(jax.value_and_grad(lambda x, data: -log_density(x, data))),
        sampler={},
    )


_COMPILED: dict[tuple[Any, ...], CompiledModel] = {}


def compiled_model(arrays: valley.Arrays, prior: Prior, num_families: int) -> CompiledModel:
    """The model of these arrays' sizes under a card, compiled once."""
    card = tuple((name, *dataclasses.astuple(entry)) for name, entry in prior.parameters.items())
    # The scale at which a card states its levels is part of the graph as well.
    reference = tuple(sorted(prior.reference.items()))
    key = (card, reference, num_families, *(values.shape for values in arrays.values()))
    if key not in _COMPILED:
        if len(_COMPILED) > 16:
            _COMPILED.clear()
        import pytensor

        # To note where each node was written would take a sixth of the time.
        with pytensor.config.change_flags(traceback__limit=0):
            _COMPILED[key] = compile_model(arrays, prior, num_families)
    return _COMPILED[key]
