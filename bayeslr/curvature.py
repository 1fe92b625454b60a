"""The Hessian of the log density, by what holds what: the top, shapes, cells, slices, data orders.

Two groups of one level have nothing to do with each other but through what holds them. So all of a
level move at once, and a handful of gradients beside one for each parameter of the top tell all.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr.coordinates import Branch, Dense, Tree
from bayeslr.errors import UntrustworthyFit
from bayeslr.models.valley import EFFECTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bayeslr.models.compiled import CompiledModel
    from bayeslr.models.valley import Arrays

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

# Step of a forward difference, of a parameter's size or of one.
_STEP = 1e-7


@dataclass(frozen=True)
class Level:
    """Groups of one level. at (group, variable): places of their parameters. above: by the number
    of a coarser level, the group there that holds each (group,).
    """

    at: IntArray
    above: dict[int, IntArray]


def levels_of(compiled: CompiledModel, arrays: Arrays) -> tuple[IntArray, tuple[Level, ...]]:
    """Places of the top's parameters (top,), and the levels below, coarsest first.

    Training runs of several rows (trunks) lie across cells: they are taken to hang from the top.
    """

    def places(level: str) -> IntArray:
        effects = [name for name, share in EFFECTS.items() if share.partition("_")[0] == level]
        return np.stack([compiled.index(f"{name}_raw") for name in effects], axis=1)

    cell_shape, slice_cell = arrays["cell_shape"], arrays["slice_cell"]
    shared = compiled.index("shared_noise")
    is_order = np.zeros(len(shared), dtype=bool)
    slice_of = np.zeros(len(shared), dtype=np.int64)
    in_order = arrays["run_in_order"] > 0
    is_order[arrays["run_order"][in_order]] = True
    slice_of[arrays["run_order"][in_order]] = arrays["run_slice"][in_order]
    slice_of = slice_of[is_order]
    levels = [
        Level(places("shape"), {}),
        Level(places("cell"), {0: cell_shape}),
        Level(places("slice"), {0: cell_shape[slice_cell], 1: slice_cell}),
        Level(shared[is_order][:, None],
              {0: cell_shape[slice_cell[slice_of]], 1: slice_cell[slice_of], 2: slice_of}),
        Level(shared[~is_order][:, None], {}),
    ]  # fmt: skip
    levels = [level for level in levels if len(level.at)]
    below = np.concatenate([level.at.ravel() for level in levels])
    return np.setdiff1d(np.arange(compiled.size), below), tuple(levels)


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Second derivatives of -log density.

    top (top,): places of the parameters that hold all others. by_top (top, parameter): of those
    with all. Of each level: own (group, variable, variable), tied: with the groups above (group,
    variable, variable there).
    """

    top: IntArray
    levels: tuple[Level, ...]
    by_top: FloatArray
    own: tuple[FloatArray, ...]
    tied: tuple[dict[int, FloatArray], ...]

    @property
    def matrix(self) -> FloatArray:
        """All of it, (parameter, parameter)."""
        size = self.by_top.shape[1]
        found = np.zeros((size, size))
        for level, own, links in zip(self.levels, self.own, self.tied, strict=True):
            found[level.at[:, :, None], level.at[:, None, :]] = own
            for other, link in links.items():
                above = self.levels[other].at[level.above[other]]
                found[level.at[:, :, None], above[:, None, :]] = link
                found[above[:, :, None], level.at[:, None, :]] = link.transpose(0, 2, 1)
        found[:, self.top], found[self.top] = self.by_top.T, self.by_top
        return (found + found.T) / 2

    def with_own(self, at: IntArray, value: float) -> Curvature:
        """A copy in which parameters of the top at these places have ``value`` by themselves."""
        by_top = self.by_top.copy()
        by_top[np.searchsorted(self.top, at), at] = value
        return dataclasses.replace(self, by_top=by_top)

    def dense(self, least: float) -> Dense:
        """Coordinates of the normal that has this curvature, directions flatter than ``least``
        raised to it.
        """
        scales, vectors = np.linalg.eigh(self.matrix)
        return Dense(vectors / np.sqrt(np.maximum(scales, least)))

    def tree(self, least: float) -> Tree:
        """As `dense`, group by group; a direction that bends down is taken to bend up as much:
        raised to a little only, it would hang on what holds it by far too much.
        """
        own = [block.copy() for block in self.own]
        tied = [{other: link.copy() for other, link in links.items()} for links in self.tied]
        to_top = [self.by_top[:, level.at].transpose(1, 2, 0) for level in self.levels]
        top = (self.by_top[:, self.top] + self.by_top[:, self.top].T) / 2
        branches = []
        for depth in reversed(range(len(self.levels))):
            level = self.levels[depth]
            root = _root(own[depth], least)
            covariance = root @ root.transpose(0, 2, 1)
            by_top = covariance @ to_top[depth]
            flat = to_top[depth].reshape(-1, len(self.top))
            top -= flat.T @ by_top.reshape(flat.shape)
            above = {}
            for other, group in level.above.items():
                weight = covariance @ tied[depth][other]
                back = weight.transpose(0, 2, 1)
                np.add.at(own[other], group, -(back @ tied[depth][other]))
                np.add.at(to_top[other], group, -(back @ to_top[depth]))
                for further in range(other):
                    np.add.at(tied[other][further], group, -(back @ tied[depth][further]))
                above[other] = group, -weight
            branches.append(Branch(at=level.at, root=root, slope=-by_top, above=above))
        root = _root(top[None], least)[0]
        return Tree(top=self.top, root=root, branches=tuple(reversed(branches)))


def _root(matrices: FloatArray, least: float) -> FloatArray:
    """Roots of the inverses of symmetric matrices (group, variable, variable)."""
    scales, vectors = np.linalg.eigh((matrices + matrices.transpose(0, 2, 1)) / 2)
    return np.asarray(vectors / np.sqrt(np.maximum(np.abs(scales), least))[:, None, :])


def curvature_at(compiled: CompiledModel, arrays: Arrays, points: FloatArray,
                 held: Sequence[int] | IntArray = ()) -> Curvature:  # fmt: skip
    """Mean curvature at points (..., parameter); what is ``held`` has none.

    Raises: UntrustworthyFit where it is no number.
    """
    data = compiled.data(arrays)
    top, levels = levels_of(compiled, arrays)
    points = points.reshape(-1, compiled.size)
    step = _STEP * np.maximum(1.0, np.abs(points[0]))

    def gradient(x: FloatArray) -> FloatArray:
        return np.asarray(compiled.value_and_grad(x, data)[1])

    here = [gradient(x) for x in points]

    def bend(at: Any) -> FloatArray:
        """Change of the gradient (parameter,) where the parameters at these places all move."""
        ahead = points.copy()
        ahead[:, at] += step[at]
        changes = [gradient(x) - before for x, before in zip(ahead, here, strict=True)]
        return np.asarray(np.mean(changes, axis=0))

    by_top = np.zeros((len(top), compiled.size))
    for row in np.flatnonzero(~np.isin(top, held)):
        by_top[row] = bend(top[row]) / step[top[row]]
    by_top[:, np.asarray(held, dtype=np.int64)] = 0.0
    own = [np.zeros((*level.at.shape, level.at.shape[1])) for level in levels]
    tied = [
        {other: np.zeros((*level.at.shape, levels[other].at.shape[1])) for other in level.above}
        for level in levels
    ]
    for depth, level in enumerate(levels):
        for variable, at in enumerate(level.at.T):
            change = bend(at)
            own[depth][:, :, variable] = change[level.at] / step[at][:, None]
            for finer, links in zip(levels, tied, strict=True):
                if depth in finer.above:
                    by = step[at][finer.above[depth]][:, None]
                    links[depth][:, :, variable] = change[finer.at] / by
    found = by_top, *own
    if not all(np.isfinite(values).all() for values in found):
        raise UntrustworthyFit(
            "no mode of the posterior was found: where the search ended its density is no number. "
            "Look for rows that contradict each other (bayeslr check), or for a prior card whose "
            "scales are far from the runs'"
        )
    return Curvature(top=top, levels=levels, by_top=by_top, own=tuple(own), tied=tuple(tied))
