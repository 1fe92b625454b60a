"""Distributions at targets: the optimal LR, the loss that a choice risks, and what it means.

Every function is vectorised over draws and targets; a target of a shape, cell or slice that was
measured uses its effects, any other draws new ones, so that intervals cover a new slice's optimum.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr import laws
from bayeslr.errors import DataError, SpecError, UntrustworthyFit
from bayeslr.features import REGRESSORS
from bayeslr.posterior import Posterior, make_posterior, require_convention, require_posterior
from bayeslr.priors import PER_FAMILY, SLOPES, Prior, as_prior
from bayeslr.runs import read_rows
from bayeslr.specs import Target, as_path, require_plausible_counts, require_whole
from bayeslr.units import (
    MOST_EXTRA_TOKENS,
    format_extra_tokens,
    format_lr,
    format_quantity,
    parse_quantity,
)

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
QUANTILE_COLUMNS = tuple(f"lr_q{round(100 * q):02d}" for q in QUANTILES)
EDGE_QUANTILES = (0.05, 0.5, 0.95)
EDGE_COLUMNS = tuple(f"edge_octaves_q{round(100 * q):02d}" for q in EDGE_QUANTILES)

# A target no farther out counts as inside: so much do people round its numbers.
INSIDE = 0.05

# Draws of a target, at least and at most, and of all targets together.
_FEWEST_DRAWS, _MAX_DRAWS, _MAX_CELLS = 250, 2000, 4_000_000

# Targets of one pass: so many that their draws stay in a core's own cache.
_CHUNK = 256

# The search for the LR of least expected regret: steps of its grid, and how often they are halved.
_STEPS, _HALVINGS = 4, 2


@dataclass(frozen=True, kw_only=True)
class TargetDraws:
    """Draws at targets, each (draw, target): ln LR*, ln curvature, skew, ln LR of the edge.

    ``edge_width`` (draw, 1) in natural logs; ``floor`` (draw, target) is the loss at LR* in nats;
    ``loss_tokens`` the part of it that more tokens remove, ``loss_exponent`` its exponent.
    What is a family's own, skew and exponent, may be (draw, 1) where all targets share a family.
    """

    log_lr: FloatArray
    log_curvature: FloatArray
    skew: FloatArray
    log_edge: FloatArray
    edge_width: FloatArray
    floor: FloatArray
    loss_tokens: FloatArray
    loss_exponent: FloatArray
    diverged_loss: float

    @cached_property
    def curvature(self) -> FloatArray:
        """Nats per unit of squared ln LR at the optimum, (draw, target)."""
        return np.asarray(np.exp(self.log_curvature))

    @cached_property
    def training_again(self) -> FloatArray:
        """Nats that twice the tokens would have bought, the price of divergence, (draw, target)."""
        bought = -self.loss_tokens * np.expm1(-math.log(2.0) * self.loss_exponent)
        return np.asarray(np.minimum(bought, self.diverged_loss))


def prior_posterior(prior: str | Prior, *, num_draws: int = 4000, seed: int = 1) -> Posterior:
    """Draws from a prior card alone: what the published evidence says before any run."""
    require_whole(num_draws, "num_draws", 1)
    require_whole(seed, "seed")
    card = as_prior(prior)
    rng = np.random.default_rng(seed)
    draws = {name: entry.draw(rng, num_draws)[None] for name, entry in card.parameters.items()}
    return make_posterior(draws, None, None, card, method="prior", seed=seed, statistics={})


def read_targets(path: str | Path) -> list[Target]:
    """Targets from a CSV, Parquet or JSON-lines file (`Target` names the columns).

    Numbers may be quantities, ``1.3B``; other columns are left alone.
    Raises: DataError that names the line and the column.
    """
    rows = read_rows(as_path(path))
    for broken in rows.broken:
        raise DataError(f"{path} line {broken['line']}: {broken['rule']}; {broken['advice']}")
    fields = dataclasses.fields(Target)
    required = [f.name for f in fields if f.default is dataclasses.MISSING]
    others = [str(name) for name in rows.frame.columns if name not in {f.name for f in fields}]
    for name in (f.name for f in fields if f.name not in rows.frame.columns):
        near = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
        hint = f"; rename {near[0]!r}, if that is it" if near else ""
        if name in required:
            needed = ", ".join(required)
            raise DataError(f"{path}: column {name!r} is missing; needed: {needed}{hint}")
        if near:
            raise DataError(f"{path}: column {near[0]!r} is not known; is it {name!r}?")
    targets: dict[str, Target] = {}
    for line, row in zip(rows.lines.tolist(), rows.frame.to_dict("records"), strict=True):
        try:
            target = Target(**_target_values(row, required))
            require_plausible_counts(target)
        except SpecError as error:
            raise DataError(f"{path} line {line}: {error}") from error
        if target.target_id in targets:
            raise DataError(f"{path} line {line}: target_id {target.target_id!r} stands twice")
        targets[target.target_id] = target
    return list(targets.values())


_TEXTS = ("target_id", "family", "param_convention")
_WHOLE = ("seq_len", "n_experts", "top_k")


def _target_values(row: Mapping[Hashable, Any], required: Sequence[str]) -> dict[str, Any]:
    """Arguments of `Target` from the cells of a row. Raises: SpecError that names the column."""
    given: dict[str, Any] = {}
    for name in (f.name for f in dataclasses.fields(Target)):
        value = row.get(name)
        if isinstance(value, float) and value.is_integer() and name in _TEXTS:
            value = int(value)  # a name that is a number, of a format that has no whole ones
        text = "" if value is None or value != value else str(value).strip()
        if not text and name in required:
            raise SpecError(f"{name} is empty")
        if text:
            given[name] = text if name in _TEXTS else parse_quantity(text, name=name)
        if text and name in _WHOLE:
            if given[name] % 1:
                raise SpecError(f"{name} must be a whole number, got {text!r}")
            given[name] = int(given[name])
    return given


def target_features(targets: Sequence[Target]) -> dict[str, FloatArray]:
    """Natural logs of what the law regresses on, by the names of `REGRESSORS`, each (target,)."""
    n_active = np.log([t.n_active for t in targets])
    return {
        "log_n_active": n_active,
        "log_sparsity": n_active - np.log([t.n_total for t in targets]),
        "log_tokens": np.log([t.tokens for t in targets]),
        "log_batch": np.log([t.batch_tokens for t in targets]),
    }


def slice_target(posterior: Posterior, s: int) -> Target:
    """The run that slice ``s`` of the fit measured, as a target."""
    design = posterior.design
    assert design is not None
    x = {name: float(values[s]) for name, values in design.slice_features().items()}
    n_active = math.exp(x["log_n_active"])
    return Target(
        target_id=f"slice{s}",
        n_active=n_active,
        # Rounding must not leave a dense model with fewer parameters in all than active ones.
        n_total=n_active / math.exp(x["log_sparsity"]) * (1 + 1e-12),
        tokens=math.exp(x["log_tokens"]),
        batch_tokens=math.exp(x["log_batch"]),
        family=design.families[int(design.family_of_slice[s])],
        param_convention=str(posterior.info["param_convention"] or "non_embedding"),
    )


def family_of(posterior: Posterior, target: Target) -> int | None:
    """Index of the target's family in the fit; None means population level.

    A target without a family belongs to the fit's only one.
    """
    families = posterior.info["families"]
    if target.family is None:
        return 0 if len(families) == 1 else None
    return families.index(target.family) if target.family in families else None


def target_list(targets: Iterable[Target]) -> list[Target]:
    """Targets as a list. Raises: SpecError for a single target, or for what is none."""
    if isinstance(targets, Target):
        raise SpecError("targets are given as a list, got a single one; put it in brackets")
    if not isinstance(targets, Iterable):
        raise SpecError(f"targets are a list of bayeslr.Target, got {targets!r:.80}")
    listed = list(targets)
    for target in listed:
        if not isinstance(target, Target):
            raise SpecError(
                f"a target is a bayeslr.Target, got {type(target).__name__}: {target!r}"[:300]
            )
    return listed


def target_draws(posterior: Posterior, targets: Iterable[Target], *,
                 max_draws: int = _MAX_DRAWS) -> TargetDraws:  # fmt: skip
    """Draws of the valley at each target.

    Draws are thinned evenly to ``max_draws``. Equal targets share their effects; new effects follow
    from the fit's own seed and what is new, so that two calls agree on a target whatever else they
    ask.
    Raises: UntrustworthyFit for draws that are no numbers; DataError without a target; SpecError
    for one that is in no list.
    """
    require_posterior(posterior)
    targets = target_list(targets)
    if not targets:
        raise DataError("there is no target to draw at")
    for target in targets:
        require_convention(posterior, target)
    return _draws_at(_Thinned(posterior, max_draws), targets)


def _draws_at(thinned: _Thinned, targets: Sequence[Target]) -> TargetDraws:
    two_stage = thinned.posterior.info["method"] == "two-stage"
    at = (_two_stage_draws if two_stage else _valley_draws)(thinned, targets)
    if not np.isfinite(at.log_lr).all():
        raise UntrustworthyFit(
            "the posterior holds draws of the optimal LR that are no numbers, so nothing can be "
            "told of a target; fit again from the runs"
        )
    return at


# Places at which new effects of a group may begin in a line of draws: two groups share those of one
# kind once in so many pairs.
_LINE = 1 << 17

# Natural logs by which people's three or four figures of a count may differ from the count.
_ROUNDED = 0.005

# Parameters of the population behind a family's level: start, stem of its exponents, scatter.
_LEVELS = {
    "lr_level": ("lr_intercept", "lr", "lr_family_sd"),
    "best_batch_level": ("best_batch_intercept", "best_batch", "best_batch_family_sd"),
    "log_curvature_level": ("curvature_intercept", "curvature", "curvature_family_sd"),
    "log_skew": ("skew", "", "skew_family_sd"),
    "log_edge_offset": ("edge_offset", "", "edge_family_sd"),
}


def new_family(name: str, draws: Mapping[str, FloatArray], prior: Prior,
               away: Mapping[str, float], normal: Callable[[str], FloatArray],
               ) -> FloatArray:  # fmt: skip
    """Draws of a family-level parameter of families that were not seen, shaped as ``normal``'s.

    draws: of the population's parameters, or of a card's. away: of the centre at which levels are
    stated from the card's reference, natural logs. normal: standard normal draws by name, (draw,)
    as the draws are, or (draw, family) of draws (draw, 1).
    """
    if name in _LEVELS:
        start, stem, sd = _LEVELS[name]
        level = np.log(draws[start]) if name.startswith("log_") else draws[start]
        if stem:
            level = level + draws[f"{stem}_n_active"] * away["log_n_active"]
            level = level + draws[f"{stem}_tokens"] * away["log_tokens"]
        if stem == "lr":
            level = level + draws["lr_sparsity"] * away["log_sparsity"]
        return np.asarray(level + draws[sd] * normal(name))
    if name in ("loss_n_active", "loss_tokens"):
        by = name.removeprefix("loss_")
        carried = prior.log_loss_part(by, away[f"log_{by}"] + prior.log_reference[f"log_{by}"])
        return np.asarray(np.exp(carried + prior[name].scale * normal(name)))
    if name in PER_FAMILY:
        return np.asarray(prior[name].location * np.exp(prior[name].scale * normal(name)))
    if name == "loss_level":
        entry = prior["loss_irreducible"]
        irreducible = entry.location * np.exp(entry.scale * normal(name))
        by_size, by_tokens = (
            new_family(part, draws, prior, away, normal)
            for part in ("loss_n_active", "loss_tokens")
        )
        return np.asarray(irreducible + by_size + by_tokens)
    assert name in SLOPES
    return np.asarray(draws[name] + draws["lr_slope_family_sd"] * normal(name))


class _Thinned:
    """Draws of a posterior with chains joined, and new effects of what was not measured.

    Effects come from the fit's own seed, a name each and the numbers of what is new, so that
    whoever asks gets the same ones.
    """

    def __init__(self, posterior: Posterior, max_draws: int) -> None:
        kept = posterior.thinned(max_draws)
        self.posterior, self.num_draws = posterior, len(kept)
        self.draws = {str(n): posterior.flat(str(n))[kept] for n in posterior.draws.data_vars}
        self.measured = _measured(posterior)
        self._lines: dict[str, FloatArray] = {}

    def snapped(self, regressor: str, values: FloatArray) -> FloatArray:
        """Values (target,) of a regressor to four decimals; those that are the runs' own but for
        how people round, as the runs have them.
        """
        values = values.round(4)
        design = self.posterior.design
        if design is None:
            return values
        own = np.unique(getattr(design, regressor).round(4))
        nearest = own[np.abs(values[:, None] - own).argmin(axis=1)]
        return np.asarray(np.where(np.abs(values - nearest) < _ROUNDED, nearest, values))

    def normals(self, name: str, groups: Sequence[tuple[float, ...]]) -> FloatArray:
        """Standard normal draws (draw, group); the same for the same name and group, told by its
        numbers, whatever else is asked.

        A group's draws are a piece of one long line of draws, from where the hash of its numbers
        says: another group's begin elsewhere, so that at each draw the two are independent.
        """
        own = zlib.crc32(name.encode())
        starts = [hash((own, *group)) % _LINE for group in groups]  # of numbers: no random hash
        pieces = np.lib.stride_tricks.sliding_window_view(self._line(name), self.num_draws)
        return np.ascontiguousarray(pieces[starts].T)

    def _line(self, name: str) -> FloatArray:
        if name not in self._lines:
            rng = np.random.default_rng([int(self.posterior.info["seed"]), *name.encode()])
            self._lines[name] = rng.standard_normal(_LINE + self.num_draws)
        return self._lines[name]


def _measured(posterior: Posterior) -> dict[str, dict[Any, int]]:
    """Index of each measured shape, cell and slice, by level and by what identifies a target.

    A target names no widths: of two shapes with equal counts neither is taken for its own.
    """
    design = posterior.design
    found: dict[str, dict[Any, int]] = {"shape": {}, "cell": {}, "slice": {}}
    if design is None or "lr_cell" not in posterior.draws:
        return found
    shapes = list(zip(design.family_of_shape.tolist(), design.log_n_active.round(4).tolist(),
                      design.log_sparsity.round(4).tolist(), strict=True))  # fmt: skip
    cells = [
        (*shapes[h], tokens)
        for h, tokens in zip(design.shape_of_cell, design.log_tokens.round(4).tolist(), strict=True)
    ]
    single = {shape: h for h, shape in enumerate(shapes) if shapes.count(shape) == 1}
    measured = design.annealed & np.isin(design.shape_of_cell, list(single.values()))
    found["shape"] = single
    found["cell"] = {cell: c for c, cell in enumerate(cells) if measured[c]}
    found["slice"] = {
        (*cells[c], batch): s
        for s, (c, batch) in enumerate(
            zip(design.cell_of_slice, design.log_batch.round(4).tolist(), strict=True)
        )
        if measured[c]
    }
    return found


def _centres(posterior: Posterior, families: Iterable[int]) -> dict[str, list[float]]:
    """Where each family's loss-token law, floors and edges are stated, by regressor.

    families: as of `_family_keys`. One that the fit has not seen has the centre of all data; a card
    alone its reference.
    """
    centre, design = posterior.info["centre"], posterior.design
    own = {} if design is None else design.family_centres()
    return {
        name: [value if g < 0 or name not in own else float(own[name][g]) for g in families]
        for name, value in centre.items()
    }


# Entries of a target's key (family, size, sparsity, tokens, batch) that identify each level.
_DEPTH = {"shape": 3, "cell": 4, "slice": 5}


def _numbered(keys: Sequence[tuple[float, ...]],
              ) -> tuple[list[tuple[float, ...]], NDArray[np.int64]]:  # fmt: skip
    """The different keys, in order, and the number of each key among them."""
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return list(numbers), np.array([numbers[key] for key in keys])


def _valley_draws(thinned: _Thinned, targets: Sequence[Target]) -> TargetDraws:
    posterior, draws = thinned.posterior, thinned.draws
    # Parameters of the population, each (draw, 1).
    p = {name: values[:, None] for name, values in draws.items() if values.ndim == 1}
    prior, centre = posterior.prior, posterior.info["centre"]
    reference = prior.log_reference
    x = target_features(targets)
    away = {k: centre[k] - reference[k] for k in reference}

    families = _family_keys(posterior, targets)
    columns = sorted(set(families), reverse=True)  # what was fitted comes first
    place = {g: i for i, g in enumerate(columns)}
    column = np.array([place[g] for g in families])
    fitted, unseen = [g for g in columns if g >= 0], [(g,) for g in columns if g < 0]
    own = {name: np.array(values)[column] for name, values in _centres(posterior, columns).items()}

    def of_family(name: str) -> FloatArray:
        """Draws of a family's parameter, (draw, target), or (draw, 1) where all share a family."""
        found = []
        if fitted:
            slope = name in SLOPES
            known = draws["family_slope"][..., SLOPES.index(name)] if slope else draws[name]
            found.append(known[:, fitted])
        if unseen:
            found.append(new_family(name, p, prior, away, lambda of: thinned.normals(of, unseen)))
        by_family = np.concatenate(found, axis=1)
        return by_family if len(columns) == 1 else by_family[:, column]

    values = np.stack([thinned.snapped(k, x[k]) for k in REGRESSORS], axis=1).tolist()
    keys = [(g, *row) for g, row in zip(families, values, strict=True)]
    index, group, groups = {}, {}, {}
    for level, depth in _DEPTH.items():
        cut = [key[:depth] for key in keys]
        groups[level], group[level] = _numbered(cut)
        index[level] = np.array([thinned.measured[level].get(key, -1) for key in cut])

    def of_level(level: str, name: str, new: FloatArray) -> FloatArray:
        """``new`` (draw, target), with what was measured in the columns of measured groups."""
        seen = index[level] >= 0
        if seen.any():
            new[:, seen] = draws[name][:, index[level][seen]]
        return new

    def scatter(level: str, sd: str) -> FloatArray:
        new = thinned.normals(sd, groups[level])
        return np.asarray(p[sd] * (new if new.shape[1] == len(targets) else new[:, group[level]]))

    d_n, d_s, d_d = (x[k] - centre[k] for k in REGRESSORS[:3])
    best_batch = of_level(
        "cell", "best_batch",
        of_family("best_batch_level") + p["best_batch_n_active"] * d_n
        + p["best_batch_tokens"] * d_d + scatter("cell", "best_batch_cell_sd"),
    )  # fmt: skip
    lr_cell = (
        of_family("lr_level") + of_family("lr_n_active") * d_n + of_family("lr_sparsity") * d_s
        + of_family("lr_tokens") * d_d
        + of_level("shape", "lr_shape", scatter("shape", "lr_shape_sd"))
        + scatter("cell", "lr_cell_sd")
    )  # fmt: skip
    seen = index["shape"] >= 0
    if seen.any():
        # What is peculiar to a shape is stated at its own tokens: a new one has no others.
        assert posterior.design is not None
        h = index["shape"][seen]
        away_tokens = x["log_tokens"][seen] - posterior.design.shape_log_tokens[h]
        lr_cell[:, seen] += draws["lr_tokens_shape"][:, h] * away_tokens
    lr_cell = of_level("cell", "lr_cell", lr_cell)
    own_n, own_d = (x[k] - own[k] for k in ("log_n_active", "log_tokens"))
    exponent_n, exponent_d = (of_family(f"loss_exponent_{by}") for by in ("n_active", "tokens"))
    left = np.exp(-exponent_d * own_d)  # of what tokens remove, at the target's
    loss_cell = of_level(
        "cell", "loss_cell",
        of_family("loss_level") + of_family("loss_n_active") * np.expm1(-exponent_n * own_n)
        + of_family("loss_tokens") * (left - 1.0)
        + of_level("shape", "loss_shape", scatter("shape", "loss_shape_sd"))
        + scatter("cell", "loss_cell_sd"),
    )  # fmt: skip
    # Floor and edge are stated at the family's mean batch; a card alone has none, and states them
    # at the best batch, as it does the curvature.
    z = x["log_batch"] - best_batch
    d_batch = x["log_batch"] - centre["log_batch"] if "log_batch" in centre else z
    zero = own["log_batch"] - best_batch if "log_batch" in own else np.zeros_like(z)
    slopes = of_family("lr_batch_below"), of_family("lr_batch_above")
    knee, zero_knee = laws.batch_knee(z, *slopes), laws.batch_knee(zero, *slopes)
    penalty = of_family("penalty_scale") * np.exp(p["penalty_tokens"] * d_d)
    by_batch = laws.linex(z, p["penalty_skew"]) - laws.linex(zero, p["penalty_skew"])
    return TargetDraws(
        log_lr=of_level("slice", "lr_opt", lr_cell + knee + scatter("slice", "lr_slice_sd")),
        log_curvature=of_level(
            "slice", "log_curvature",
            of_family("log_curvature_level") + p["curvature_n_active"] * d_n
            + p["curvature_tokens"] * d_d + p["curvature_batch"] * d_batch
            + scatter("slice", "curvature_slice_sd"),
        ),
        skew=np.exp(of_family("log_skew")),
        log_edge=(
            lr_cell + zero_knee + p["edge_batch"] * (knee - zero_knee)
            + np.exp(of_family("log_edge_offset"))
        ),
        edge_width=p["edge_width"],
        floor=of_level(
            "slice", "floor", loss_cell + penalty * by_batch + scatter("slice", "loss_slice_sd")
        ),
        loss_tokens=of_family("loss_tokens") * left,
        loss_exponent=exponent_d,
        diverged_loss=prior["diverged_loss"].location,
    )  # fmt: skip


def _two_stage_draws(thinned: _Thinned, targets: Sequence[Target]) -> TargetDraws:
    posterior, draws = thinned.posterior, thinned.draws
    x, centre = target_features(targets), posterior.info["centre"]
    away = np.stack([x[k] - centre[k] for k in REGRESSORS])
    shape = (thinned.num_draws, len(targets))
    families = np.array(_family_keys(posterior, targets))
    p = {name: draws[name][:, None] for name in ("mean_intercept", "family_sd", "residual_sd")}
    fitted, intercept = families >= 0, np.empty(shape)
    intercept[:, fitted] = draws["intercept"][:, families[fitted]]
    new = thinned.normals("family_sd", [(g,) for g in families[~fitted].tolist()])
    intercept[:, ~fitted] = p["mean_intercept"] + p["family_sd"] * new
    slices, alike = _numbered(
        [tuple(row) for row in np.vstack([families, away.round(4)]).T.tolist()]
    )
    new = thinned.normals("residual_sd", slices)[:, alike]
    log_lr = intercept + draws["coefficient"] @ away + p["residual_sd"] * new
    # Least squares knows no losses: their price in tokens is the card's.
    prior = posterior.prior
    bought = np.exp(prior.log_loss_part("tokens", x["log_tokens"]))
    return TargetDraws(
        log_lr=log_lr,
        log_curvature=np.broadcast_to(np.log(draws["curvature"][:, None]), shape),
        skew=np.full((thinned.num_draws, 1), 1e-3),
        log_edge=np.full(shape, np.inf),
        edge_width=np.ones((thinned.num_draws, 1)),
        floor=np.full(shape, np.nan),
        loss_tokens=np.broadcast_to(bought, shape),
        loss_exponent=np.full((thinned.num_draws, 1), prior["loss_exponent_tokens"].location),
        diverged_loss=prior["diverged_loss"].location,
    )


def p_diverge(at: TargetDraws, log_lr: FloatArray) -> FloatArray:
    """Probability of divergence by draw and target at ln LR (target,), shape (draw, target)."""
    return np.asarray(laws.logistic((log_lr - at.log_edge) / at.edge_width))


def edge_octaves(at: TargetDraws, log_lr: FloatArray) -> FloatArray:
    """Octaves from ln LR (target,) up to the LR at which half of the runs diverge, (draw, target).

    Negative beyond that edge; infinite where the fit has none.
    """
    return np.asarray((at.log_edge - log_lr) / math.log(2.0))


def regret_draws(at: TargetDraws, log_lr: FloatArray) -> FloatArray:
    """Nats above the optimum when trained at ln LR (target,), shape (draw, target).

    A run that diverges has to be trained again: in expectation, the nats that twice the tokens
    would have bought are charged on top of what the LR costs a run that ends.
    A run that ends is never charged more than the card's ``diverged_loss``.
    """
    excess = laws.valley_excess(log_lr - at.log_lr, at.curvature, at.skew)
    ended = np.minimum(excess, at.diverged_loss)
    return np.asarray(ended + p_diverge(at, log_lr) * at.training_again)


def recommended_log_lr(at: TargetDraws) -> FloatArray:
    """Natural log of the LR with the least expected regret, (target,).

    Searched between the 2 and 98 % quantiles of LR*, where the expected regret falls and then
    rises: the best of a coarse grid, then between its neighbours; a parabola ends it. In single
    precision, which moves the LR by a millionth.
    """
    low, high = quantiles(at.log_lr, (0.02, 0.98)).astype(np.float32)
    step = (high - low) / _STEPS
    single = dataclasses.replace(at, **{
        field.name: getattr(at, field.name).astype(np.float32)
        for field in dataclasses.fields(at) if field.name != "diverged_loss"
    })  # fmt: skip

    def cost(log_lr: FloatArray) -> FloatArray:
        return np.asarray(regret_draws(single, log_lr).mean(axis=0))

    grid = low + np.arange(_STEPS + 1, dtype=np.float32)[:, None] * step
    costs = np.stack([cost(point) for point in grid])
    best, column = np.clip(np.argmin(costs, axis=0), 1, _STEPS - 1), np.arange(len(low))
    middle = grid[best, column]
    three = np.stack([costs[best + i, column] for i in (-1, 0, 1)])
    for _ in range(_HALVINGS):
        step = step / 2
        left, right = cost(middle - step), cost(middle + step)
        five = np.stack([three[0], left, three[1], right, three[2]])
        best = np.clip(np.argmin(five, axis=0), 1, 3)
        middle = middle + (best - 2).astype(np.float32) * step
        three = np.stack([five[best + i, column] for i in (-1, 0, 1)])
    left, least, right = three
    bend = left - 2 * least + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    return np.asarray(middle + np.clip(shift, -1, 1) * step, dtype=np.float64)


def quantiles(draws: FloatArray, levels: Sequence[float]) -> FloatArray:
    """Quantiles (level, target) of draws (draw, target); as np.quantile, by one sort."""
    ordered = np.sort(draws, axis=0)
    at = np.asarray(levels) * (len(ordered) - 1)
    below = np.floor(at).astype(int)
    above = np.minimum(below + 1, len(ordered) - 1)
    share = (at - below)[:, None]
    return np.asarray((1 - share) * ordered[below] + share * ordered[above])


def regret(posterior: Posterior, targets: Iterable[Target],
           lr: float | Sequence[float]) -> FloatArray:  # fmt: skip
    """Draws of the regret of training each target at ``lr``, in nats, shape (draw, target).

    Raises: SpecError if an LR is not positive and finite, or their number is not the targets'.
    """
    targets = target_list(targets)
    try:
        values = np.asarray(lr, dtype=float)
    except (TypeError, ValueError) as error:
        raise SpecError(f"lr must be a number, or one a target, got {lr!r:.80}") from error
    if values.ndim and values.shape != (len(targets),):
        raise SpecError(f"{values.size} LRs for {len(targets)} targets; give one, or one a target")
    values = np.broadcast_to(values, (len(targets),))
    if not (np.isfinite(values) & (values > 0)).all():
        raise SpecError(f"lr must be > 0 and finite, got {lr}; give the LR itself, not its log")
    return regret_draws(target_draws(posterior, targets), np.log(values))


def extrapolation(posterior: Posterior, targets: Iterable[Target]) -> FloatArray:
    """Distance of each target outside the data, in the data's spreads (target,).

    The data are those of the target's family; all of them for a family that the fit has not seen.
    A regressor inside the data's range counts zero; outside, its distance from the nearest end is
    divided by the data's range, or by ln 2 where that is narrower. The four add in squares.
    Infinite without data.
    """
    require_posterior(posterior)
    targets = target_list(targets)
    return _beyond(posterior, targets)[0]


def _beyond(posterior: Posterior, targets: Sequence[Target],
            ) -> tuple[FloatArray, NDArray[np.bool_]]:  # fmt: skip
    """`extrapolation`, and whether ln 2 stood in there for a range, each (target,)."""
    narrow = np.zeros(len(targets), dtype=bool)
    if posterior.design is None:
        return np.full(len(targets), np.inf), narrow
    x, families = target_features(targets), np.array(_families(posterior, targets))
    total = np.zeros(len(targets))
    for g, ranges in _ranges(posterior, targets).items():
        mine = families == g
        for name, (low, high) in ranges.items():
            outside = np.maximum(np.maximum(low - x[name][mine], x[name][mine] - high), 0.0)
            total[mine] += (outside / max(high - low, math.log(2.0))) ** 2
            narrow[mine] |= (outside > 1e-9) & (high - low < math.log(2.0))
    return np.sqrt(total), narrow


def _ranges(posterior: Posterior, targets: Sequence[Target],
            ) -> dict[int | None, dict[str, tuple[float, float]]]:  # fmt: skip
    """Least and largest of each regressor in the data, by the targets' families."""
    design, found = posterior.design, {}
    if design is None:
        return {}
    seen = design.slice_features()
    for g in set(_families(posterior, targets)):
        slices = np.full(design.num_slices, True) if g is None else design.family_of_slice == g
        found[g] = {
            name: (float(np.min(values[slices])), float(np.max(values[slices])))
            for name, values in seen.items()
        }
    return found


def data_ranges(posterior: Posterior, target: Target) -> dict[str, tuple[float, float]]:
    """Least and largest of each regressor in the data that `extrapolation` goes by.

    Natural logs, by the names of `REGRESSORS`; empty without data.
    """
    return _ranges(posterior, [target]).get(family_of(posterior, target), {})


def _families(posterior: Posterior, targets: Sequence[Target]) -> list[int | None]:
    return [family_of(posterior, target) for target in targets]


def _family_keys(posterior: Posterior, targets: Sequence[Target]) -> list[int]:
    """What identifies each target's family: its index in the fit, or below zero a hash of the name
    of one that the fit has not seen.
    """
    return [
        -1 - zlib.crc32((target.family or "").encode()) if g is None else g
        for g, target in zip(_families(posterior, targets), targets, strict=True)
    ]


def extra_tokens_share(at: TargetDraws, nats: FloatArray) -> FloatArray:
    """Share of extra tokens that would make up for a loss of ``nats`` (target,).

    From the loss-token law L = E + B D^-gamma at its posterior medians; capped at 100 (10,000 %).
    """
    part, exponent = (quantiles(x, (0.5,))[0] for x in (at.loss_tokens, at.loss_exponent))
    left = np.clip(1.0 - nats / np.maximum(part, 1e-12), 1e-6, 1.0)
    return np.asarray(np.minimum(left ** (-1.0 / exponent) - 1.0, MOST_EXTRA_TOKENS))


def predict(posterior: Posterior, targets: Iterable[Target]) -> pd.DataFrame:
    """Predictions table, one row a target, in order.

    Columns: target_id, lr (recommended), lr_q05 .. lr_q95, regret_mean and regret_q95 (nats, of the
    recommended LR), extra_tokens (share that would make up for regret_mean), p_diverge,
    edge_octaves_q05 .. q95 (from the recommended LR up to the divergence edge) and loss_q50 (nats;
    these NaN where the fit does not know them), extrapolation, level (family or population),
    sentence.
    Raises: DataError if there is no target, or a target counts parameters otherwise; SpecError for
    a target that is in no list.
    """
    import pandas as pd

    require_posterior(posterior)
    targets = target_list(targets)
    if not targets:
        raise DataError("there is no target to predict; the targets table is empty")
    for target in targets:
        require_convention(posterior, target)
    num_draws = int(np.clip(_MAX_CELLS // len(targets), _FEWEST_DRAWS, _MAX_DRAWS))
    thinned, ranges = _Thinned(posterior, num_draws), _ranges(posterior, targets)
    parts = [targets[i : i + _CHUNK] for i in range(0, len(targets), _CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda part: _columns(thinned, part, ranges), parts))
    return pd.DataFrame({name: np.concatenate([part[name] for part in found]) for name in found[0]})


def _columns(thinned: _Thinned, targets: Sequence[Target],
             ranges: Mapping[int | None, Mapping[str, tuple[float, float]]],
             ) -> dict[str, Any]:  # fmt: skip
    """Columns of the predictions table. ranges: `_ranges`, for the sentences."""
    posterior = thinned.posterior
    families = _families(posterior, targets)
    known = np.array([g is not None for g in families])
    distance, narrow = _beyond(posterior, targets)
    columns: dict[str, Any] = {
        "target_id": [target.target_id for target in targets],
        **summary(_draws_at(thinned, targets)),
        "extrapolation": distance,
        "level": np.where(known, "family", "population"),
    }
    columns["loss_q50"][~known] = np.nan
    rows = zip(*(np.asarray(values).tolist() for values in columns.values()), strict=True)
    columns["sentence"] = [
        _sentence(
            posterior, target, dict(zip(columns, row, strict=False)), ranges.get(g, {}), least
        )
        for target, row, g, least in zip(targets, rows, families, narrow.tolist(), strict=True)
    ]
    return columns


def summary(at: TargetDraws) -> dict[str, FloatArray]:
    """Columns of the predictions table that follow from the draws alone, each (target,).

    They are lr, lr_q05 .. lr_q95, regret_mean, regret_q95, extra_tokens, p_diverge,
    edge_octaves_q05, _q50 and _q95, and loss_q50.
    """
    log_lr = recommended_log_lr(at)
    charged = regret_draws(at, log_lr)
    mean = charged.mean(axis=0)
    # Far below the data the penalty for the batch may outgrow the law: no loss is told then.
    loss = quantiles(at.floor, (0.5,))[0]
    # Without an edge, as least squares has none, neither risk nor distance is known.
    edge_known = ~np.isinf(at.log_edge).all(axis=0)
    with np.errstate(invalid="ignore"):
        octaves = quantiles(edge_octaves(at, log_lr), EDGE_QUANTILES)
    return {
        "lr": np.exp(log_lr),
        **dict(zip(QUANTILE_COLUMNS, np.exp(quantiles(at.log_lr, QUANTILES)), strict=True)),
        "regret_mean": mean,
        "regret_q95": quantiles(charged, (0.95,))[0],
        "extra_tokens": extra_tokens_share(at, mean),
        "p_diverge": np.where(edge_known, p_diverge(at, log_lr).mean(axis=0), np.nan),
        **dict(zip(EDGE_COLUMNS, np.where(edge_known, octaves, np.nan), strict=True)),
        "loss_q50": np.where(loss > 0, loss, np.nan),
    }


def _sentence(posterior: Posterior, target: Target, row: dict[Any, Any],
              ranges: Mapping[str, tuple[float, float]], narrow: bool) -> str:  # fmt: skip
    """One sentence that a planner can quote about a row of the predictions table."""
    size = format_quantity(target.n_active)
    if target.n_total > target.n_active:
        size += f" active of {format_quantity(target.n_total)}"
    distance = row["extrapolation"]
    if not math.isfinite(distance):
        reach = "from published laws alone, no run of yours"
    elif distance < INSIDE:
        reach = "inside the range of the runs"
    else:
        least = " (a factor of two where it is narrower)" if narrow else ""
        reach = (
            f"{distance:.1f} times the runs' own range{least} beyond them{_below(ranges, target)}"
        )
    risk = row["p_diverge"]
    risk_text = "under 1 %" if risk < 0.01 else f"{100 * risk:.0f} %"
    if math.isnan(risk):
        risk_text = "not known to least squares"
    level = ""
    if row["level"] != "family" and posterior.info["families"]:
        why = "no family was named" if target.family is None else "a recipe the runs do not cover"
        level = f" ({why}: population level)"
    return (
        f"Train {size} parameters on {format_quantity(target.tokens)} tokens at batch "
        f"{format_quantity(target.batch_tokens)} with a peak LR of "
        f"{format_lr(row['lr'])}{level}: the optimum lies between {format_lr(row['lr_q05'])} and "
        f"{format_lr(row['lr_q95'])} with 90 % probability; not knowing it costs an "
        f"expected {row['regret_mean']:.4f} nats, as much as "
        f"{format_extra_tokens(row['extra_tokens'])} more tokens, and the risk of divergence is "
        f"{risk_text}; {reach}."
    )


def _below(ranges: Mapping[str, tuple[float, float]], target: Target) -> str:
    below = [
        word for word, key, value in (
            ("size", "log_n_active", target.n_active), ("tokens", "log_tokens", target.tokens)
        ) if math.log(value) < ranges[key][0] - 1e-9
    ]  # fmt: skip
    return f" (below them in {' and '.join(below)})" if below else ""
