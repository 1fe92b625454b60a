"""Linear coordinates in which a posterior is nearly round: x = centre + (these) z.

Dense where parameters are few. Of thousands, most are effects of shapes, cells and slices: each
stands on its regression on what holds it, so that time and memory grow with the table and no
faster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

# Least eigenvalue of a covariance of draws or gradients over its largest.
_LEAST = 1e-8


@dataclass(frozen=True)
class Dense:
    """All parameters by one matrix. Ways from the centre and gradients are (..., parameter)."""

    root: FloatArray

    def x(self, z: FloatArray) -> FloatArray:
        """Way in x of a way in z."""
        return np.asarray(z @ self.root.T)

    def z(self, x: FloatArray) -> FloatArray:
        """Inverse of `x`."""
        return _solved(self.root, x)

    def pull(self, gradient: FloatArray) -> FloatArray:
        """Gradient in z of what has this gradient in x."""
        return np.asarray(gradient @ self.root)

    def push(self, pull: FloatArray) -> FloatArray:
        """Inverse of `pull`."""
        return np.asarray(pull @ np.linalg.inv(self.root))

    def rounder(self, x: FloatArray, gradient: FloatArray) -> Dense:
        """Those told by draws and gradients of the log density there, (draw, parameter) each."""
        return Dense(rounder(self.root, self.z(x), self.pull(gradient)))

    def compact(self) -> Any:
        """What `moved` takes, in single precision: a step of NUTS reads it twice."""
        return self.root.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Parameters of the groups of one level: given those that hold them, independent.

    at (group, variable): their places. root (group, variable, variable): their own coordinates.
    slope (group, variable, top): on the top's parameters. above: by the number of a coarser branch,
    the group there that holds each (group,) and the slope on its parameters (group, variable,
    variable there).
    """

    at: IntArray
    root: FloatArray
    slope: FloatArray
    above: dict[int, tuple[IntArray, FloatArray]]


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Parameters that hold all others, the top, by a matrix, the others branch by branch.

    top (top,): places of the former. root (top, top). branches: coarsest first.
    """

    top: IntArray
    root: FloatArray
    branches: tuple[Branch, ...]

    def x(self, z: FloatArray) -> FloatArray:
        """Way in x of a way in z, (..., parameter) each."""
        return np.asarray(_walked(self._parts(np.float64), z, np))

    def z(self, x: FloatArray) -> FloatArray:
        """Inverse of `x`."""
        parts = self._split(x)
        own = [_solved(self.root, parts[0])]
        for branch, part in zip(self.branches, parts[1:], strict=True):
            rest = part - _held(branch.slope, branch.above, parts, np)
            own.append(np.einsum("nij,...nj->...ni", np.linalg.inv(branch.root), rest))
        return self._joined(own)

    def pull(self, gradient: FloatArray) -> FloatArray:
        """Gradient in z of what has this gradient in x."""
        top, *parts = self._split(gradient)
        own = []
        for branch in reversed(self.branches):
            part = parts.pop()
            own.append(np.einsum("nij,...ni->...nj", branch.root, part))
            top = top + np.einsum("nig,...ni->...g", branch.slope, part, optimize=True)
            for other, (group, slope) in branch.above.items():
                by = np.einsum("nij,...ni->...nj", slope, part)
                _add_by_group(parts[other], group, by)
        return self._joined([top @ self.root, *reversed(own)])

    def push(self, pull: FloatArray) -> FloatArray:
        """Inverse of `pull`."""
        top, *parts = self._split(pull)
        top = top @ np.linalg.inv(self.root)
        for i, branch in enumerate(self.branches):
            inverse = np.linalg.inv(branch.root)
            parts[i] = whole = np.einsum("nij,...ni->...nj", inverse, parts[i])
            top = top - np.einsum("nig,...ni->...g", branch.slope, whole, optimize=True)
            for other, (group, slope) in branch.above.items():
                _add_by_group(parts[other], group, -np.einsum("nij,...ni->...nj", slope, whole))
        return self._joined([top, *parts])

    def rounder(self, x: FloatArray, gradient: FloatArray) -> Tree:
        """Those in which the top and each group are rounder; arguments as for `Dense.rounder`."""
        z, pull = self.z(x), self.pull(gradient)
        branches = [
            replace(branch, root=rounder(branch.root, z[:, branch.at], pull[:, branch.at]))
            for branch in self.branches
        ]
        root = rounder(self.root, z[:, self.top], pull[:, self.top])
        return replace(self, root=root, branches=tuple(branches))

    def compact(self) -> Any:
        """What `moved` takes, in single precision."""
        return self._parts(np.float32)

    @property
    def order(self) -> IntArray:
        """Places of the parameters, the top's first and then branch by branch."""
        return np.concatenate([self.top, *(branch.at.ravel() for branch in self.branches)])

    def _parts(self, kind: Any) -> Any:
        branches = []
        for branch in self.branches:
            above = {i: (group, slope.astype(kind)) for i, (group, slope) in branch.above.items()}
            own = branch.root.astype(kind), branch.slope.astype(kind)
            branches.append((branch.at, *own, above))
        return self.top, self.root.astype(kind), tuple(branches), np.argsort(self.order)

    def _split(self, values: FloatArray) -> list[FloatArray]:
        return [values[..., self.top], *(values[..., branch.at] for branch in self.branches)]

    def _joined(self, parts: list[FloatArray]) -> FloatArray:
        joined = np.empty((*parts[0].shape[:-1], len(self.order)))
        joined[..., self.order] = _flat(parts, np)
        return joined


def moved(compact: Any, z: Any) -> Any:
    """``x`` of the coordinates at one z (parameter,), within JAX."""
    import jax.numpy as jnp

    if not isinstance(compact, tuple):
        return compact @ z.astype(compact.dtype)
    return _walked(compact, z.astype(compact[1].dtype), jnp)


def _walked(tree: Any, z: Any, xp: Any) -> Any:
    top, root, branches, place = tree
    parts = [z[..., top] @ root.T]
    for at, own, slope, above in branches:
        part = xp.einsum("nij,...nj->...ni", own, z[..., at])
        parts.append(part + _held(slope, above, parts, xp))
    return _flat(parts, xp)[..., place]


def _held(slope: Any, above: Any, parts: list[Any], xp: Any) -> Any:
    """What those that hold a branch's parameters say of them (..., group, variable)."""
    told = xp.einsum("nig,...g->...ni", slope, parts[0])
    for other, (group, by) in above.items():
        told = told + xp.einsum("nij,...nj->...ni", by, parts[1 + other][..., group, :])
    return told


def _add_by_group(values: FloatArray, group: IntArray, more: FloatArray) -> None:
    """Add to values (..., group, variable) those of their members (..., member, variable)."""
    np.add.at(np.moveaxis(values, -2, 0), group, np.moveaxis(more, -2, 0))


def _flat(parts: list[Any], xp: Any) -> Any:
    of_branches = [part.reshape(*part.shape[:-2], -1) for part in parts[1:]]
    return xp.concatenate([parts[0], *of_branches], axis=-1)


def _solved(root: FloatArray, x: FloatArray) -> FloatArray:
    flat = np.linalg.solve(root, x.reshape(-1, len(root)).T)
    return np.asarray(flat.T.reshape(x.shape))


def rounder(root: FloatArray, z: FloatArray, gradient: FloatArray) -> FloatArray:
    """Root of coordinates in which the posterior is rounder than in z, where x = centre + root z.

    root (..., variable, variable); z, gradient: draws and gradients of the log density there,
    (draw, ..., variable). Of all linear maps the one that brings the draws' Fisher divergence from
    a standard normal to its least: the geometric mean of the draws' covariance and the inverse of
    their gradients' (Seyboldt, Carlson and Carpenter 2026, arXiv 2603.18845). Directions that no
    draw tells keep their scale.
    """
    spread = z.std(axis=0), gradient.std(axis=0)
    if not (spread[0].all() and spread[1].all()):
        return root  # chains that never moved tell nothing
    scale = np.sqrt(spread[0] / spread[1])
    unseen = np.eye(z.shape[-1]) / len(z)
    half = _root(_covariance(gradient * scale) + unseen)
    inverse = np.linalg.inv(half)
    middle = _root(half @ (_covariance(z / scale) + unseen) @ half)
    covariance = inverse @ middle @ inverse
    lower = np.linalg.cholesky((covariance + np.swapaxes(covariance, -1, -2)) / 2)
    return np.asarray(root @ (scale[..., None] * lower))


def _covariance(draws: FloatArray) -> FloatArray:
    """Of draws (draw, ..., variable)."""
    off = np.moveaxis(draws - draws.mean(axis=0), 0, -1)
    return np.asarray(off @ np.swapaxes(off, -1, -2) / (len(draws) - 1))


def _root(matrix: FloatArray) -> FloatArray:
    """Symmetric square root. Eigenvalues far below the largest, which rounding hides, are raised:
    a chain in a funnel has gradients of any size, and the root is to be inverted.
    """
    transposed = np.swapaxes(matrix, -1, -2)
    scales, vectors = np.linalg.eigh((matrix + transposed) / 2)
    scales = np.sqrt(np.maximum(scales, _LEAST * scales[..., -1:]))
    return np.asarray(vectors * scales[..., None, :] @ np.swapaxes(vectors, -1, -2))
