"""Distributions at targets: the optimal LR, the loss that a choice risks, and what it means.

Every function is vectorised over draws and targets; a target of a shape, cell or slice that was
measured uses its effects, any other draws new ones, so that intervals cover a new slice's optimum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr import laws
from bayeslr.errors import DataError, SpecError
from bayeslr.features import REGRESSORS
from bayeslr.posterior import Posterior, make_posterior, require_convention
from bayeslr.priors import PER_FAMILY, SLOPES, Prior, load_prior
from bayeslr.specs import Target
from bayeslr.units import format_lr, format_quantity

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
QUANTILE_COLUMNS = tuple(f"lr_q{round(100 * q):02d}" for q in QUANTILES)

# Points of the search for the LR of least expected regret; a parabola refines between them.
_SEARCH_POINTS = 25
_MAX_DRAWS, _MAX_CELLS = 2000, 2_000_000


@dataclass(frozen=True, kw_only=True)
class TargetDraws:
    """Draws at targets, each (draw, target): ln LR*, ln curvature, skew, ln LR of the edge.

    ``edge_width`` (draw, 1) in natural logs; ``floor`` (draw, target) is the loss at LR* in nats;
    ``loss_tokens`` the part of it that more tokens remove, ``loss_exponent`` its exponent.
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


def prior_posterior(prior: str | Prior, *, num_draws: int = 4000, seed: int = 1) -> Posterior:
    """Draws from a prior card alone: what the published evidence says before any run."""
    card = load_prior(prior) if isinstance(prior, str) else prior
    rng = np.random.default_rng(seed)
    draws = {name: entry.draw(rng, num_draws)[None] for name, entry in card.parameters.items()}
    return make_posterior(draws, None, None, card, method="prior", seed=seed, statistics={})


def read_targets(path: str | Path) -> list[Target]:
    """Targets from a CSV, Parquet or JSON-lines file (`Target` names the columns).

    Raises: DataError that names the row and the column.
    """
    import pandas as pd

    path = Path(path)
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        elif path.suffix in (".jsonl", ".json"):
            frame = pd.read_json(path, lines=True)
        else:
            frame = pd.read_csv(path)
    except FileNotFoundError as error:
        raise DataError(f"targets file {path} does not exist") from error
    except ValueError as error:
        raise DataError(f"targets file {path} cannot be read: {error}") from error
    names = [f.name for f in dataclasses.fields(Target)]
    required = [f.name for f in dataclasses.fields(Target) if f.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in frame.columns]:
        raise DataError(f"{path}: column {missing[0]!r} is missing; needed: {', '.join(required)}")
    if frame["target_id"].duplicated().any():
        twice = frame.loc[frame["target_id"].duplicated(), "target_id"].iloc[0]
        raise DataError(f"{path}: target_id {twice!r} stands twice")
    integers = {"seq_len", "n_experts", "top_k"}
    targets = []
    for line, row in enumerate(frame.to_dict("records"), start=2):
        given: dict[str, Any] = {}
        for name in names:
            value = row.get(name)
            if value is None or (isinstance(value, float) and math.isnan(value)):
                continue
            try:
                if name in integers:
                    value = int(value)
                elif name in ("n_active", "n_total", "tokens", "batch_tokens"):
                    value = float(value)
                else:
                    value = str(value)
            except ValueError as error:
                raise DataError(f"{path} line {line}: {name} is no number: {value!r}") from error
            given[name] = value
        try:
            targets.append(Target(**given))
        except (SpecError, TypeError) as error:
            raise DataError(f"{path} line {line}: {error}") from error
    return targets


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


def target_draws(posterior: Posterior, targets: Sequence[Target], *,
                 max_draws: int = _MAX_DRAWS) -> TargetDraws:  # fmt: skip
    """Draws of the valley at each target.

    Draws are thinned evenly to ``max_draws``. Equal targets share their effects; new effects are
    drawn from the fit's own seed, so that two calls agree.
    """
    for target in targets:
        require_convention(posterior, target)
    if posterior.info["method"] == "two-stage":
        return _two_stage_draws(posterior, targets, max_draws)
    return _valley_draws(posterior, targets, max_draws)


# Parameters of the population behind a family's level: start, stem of its exponents, scatter.
_LEVELS = {
    "lr_level": ("lr_intercept", "lr", "lr_family_sd"),
    "best_batch_level": ("best_batch_intercept", "best_batch", "best_batch_family_sd"),
    "log_curvature_level": ("curvature_intercept", "curvature", "curvature_family_sd"),
    "log_skew": ("skew", "", "skew_family_sd"),
    "log_edge_offset": ("edge_offset", "", "edge_family_sd"),
}


def new_family(name: str, draws: Mapping[str, FloatArray], prior: Prior,
               away: Mapping[str, float], normal: Callable[[Any], FloatArray],
               ) -> FloatArray:  # fmt: skip
    """Draws (draw,) of a family-level parameter of a family that was not seen.

    draws: of the population's parameters, or of a card's. away: of the centre at which levels are
    stated from the card's reference, natural logs. normal: standard normal draws (draw,) by key.
    """
    if name in _LEVELS:
        start, stem, sd = _LEVELS[name]
        level = np.log(draws[start]) if name.startswith("log_") else draws[start]
        if stem:
            level = level + draws[f"{stem}_n_active"] * away["log_n_active"]
            level = level + draws[f"{stem}_tokens"] * away["log_tokens"]
        if stem == "lr":
            level = level + draws["lr_sparsity"] * away["log_sparsity"]
        return np.asarray(level + draws[sd] * normal((name, "family")))
    if name in PER_FAMILY:
        return np.asarray(
            prior[name].location * np.exp(prior[name].scale * normal((name, "family")))
        )
    if name == "loss_level":
        entry = prior["loss_irreducible"]
        irreducible = entry.location * np.exp(entry.scale * normal((name, "family")))
        by_size, by_tokens = (
            new_family(part, draws, prior, away, normal)
            for part in ("loss_n_active", "loss_tokens")
        )
        return np.asarray(irreducible + by_size + by_tokens)
    assert name in SLOPES
    return np.asarray(draws[name] + draws["lr_slope_family_sd"] * normal((name, "family")))


class _Effects:
    """New effects of groups that were not measured: one vector of draws a group, made once."""

    def __init__(self, seed: int, num_draws: int) -> None:
        self._rng = np.random.default_rng([seed, 20_260_105])
        self._num_draws = num_draws
        self._new: dict[Any, FloatArray] = {}

    def normal(self, key: Any) -> FloatArray:
        if key not in self._new:
            self._new[key] = self._rng.normal(size=self._num_draws)
        return self._new[key]


def _measured(posterior: Posterior) -> dict[Any, int]:
    """Index of each measured shape, cell and slice by what identifies a target."""
    design = posterior.design
    found: dict[Any, int] = {}
    if design is None or "lr_cell" not in posterior.draws:
        return found
    shapes = list(zip(design.family_of_shape, design.log_n_active.round(4),
                      design.log_sparsity.round(4), strict=True))  # fmt: skip
    for h, (g, n_active, sparsity) in enumerate(shapes):
        found["shape", int(g), float(n_active), float(sparsity)] = h
    for c, h in enumerate(design.shape_of_cell):
        if design.annealed[c]:
            g, n_active, sparsity = shapes[h]
            tokens = float(design.log_tokens[c].round(4))
            found["cell", int(g), float(n_active), float(sparsity), tokens] = c
    for s, c in enumerate(design.cell_of_slice):
        if design.annealed[c]:
            g, n_active, sparsity = shapes[design.shape_of_cell[c]]
            tokens, batch = design.log_tokens[c].round(4), design.log_batch[s].round(4)
            key = (int(g), float(n_active), float(sparsity), float(tokens), float(batch))
            found[("slice", *key)] = s
    return found


def _valley_draws(posterior: Posterior, targets: Sequence[Target], max_draws: int) -> TargetDraws:
    kept = posterior.thinned(max_draws)
    num_draws, num_targets = len(kept), len(targets)
    draws = {str(n): posterior.flat(str(n))[kept] for n in posterior.draws.data_vars}
    prior, centre = posterior.prior, posterior.info["centre"]
    reference = prior.log_reference
    x = target_features(targets)
    families = [family_of(posterior, target) for target in targets]
    effects = _Effects(int(posterior.info["seed"]), num_draws)
    measured, design = _measured(posterior), posterior.design
    away = {k: centre[k] - reference[k] for k in reference}

    cache: dict[tuple[str, int | None], FloatArray] = {}

    def of_family(name: str, g: int | None) -> FloatArray:
        if (name, g) not in cache:
            if g is None:
                cache[name, g] = new_family(name, draws, prior, away, effects.normal)
            elif name in SLOPES:
                cache[name, g] = draws["family_slope"][:, g, SLOPES.index(name)]
            else:
                cache[name, g] = draws[name][:, g]
        return cache[name, g]

    shape = (num_draws, num_targets)
    out = {name: np.empty(shape) for name in
           ("log_lr", "log_curvature", "skew", "log_edge", "floor", "loss_tokens",
            "loss_exponent")}  # fmt: skip
    for t, g in enumerate(families):
        d_n, d_s, d_d = (x[k][t] - centre[k] for k in REGRESSORS[:3])
        where = tuple(float(np.round(x[k][t], 4)) for k in REGRESSORS)
        h = measured.get(("shape", g, *where[:2]))
        c = measured.get(("cell", g, *where[:3]))
        s = measured.get(("slice", g, *where))
        if c is not None:
            best_batch, lr_cell = draws["best_batch"][:, c], draws["lr_cell"][:, c]
            loss_cell = draws["loss_cell"][:, c]
        else:
            best_batch = (
                of_family("best_batch_level", g) + draws["best_batch_n_active"] * d_n
                + draws["best_batch_tokens"] * d_d
                + draws["best_batch_cell_sd"] * effects.normal(("batch", g, where[:3]))
            )  # fmt: skip
            lr_shape = (
                draws["lr_shape"][:, h] if h is not None
                else draws["lr_shape_sd"] * effects.normal(("shape", g, where[:2]))
            )  # fmt: skip
            # What is peculiar to a shape is stated at its own tokens: a new one has no others.
            drift = 0.0
            if h is not None and design is not None:
                drift = draws["lr_tokens_shape"][:, h] * (
                    x["log_tokens"][t] - design.shape_log_tokens[h]
                )
            lr_cell = (
                of_family("lr_level", g) + of_family("lr_n_active", g) * d_n
                + of_family("lr_sparsity", g) * d_s
                + of_family("lr_tokens", g) * d_d
                + lr_shape + drift + draws["lr_cell_sd"] * effects.normal(("cell", g, where[:3]))
            )  # fmt: skip
            exponent_n = of_family("loss_exponent_n_active", g)
            exponent_d = of_family("loss_exponent_tokens", g)
            loss_shape = (
                draws["loss_shape"][:, h] if h is not None
                else draws["loss_shape_sd"] * effects.normal(("loss shape", g, where[:2]))
            )  # fmt: skip
            loss_cell = (
                of_family("loss_level", g)
                + of_family("loss_n_active", g) * np.expm1(-exponent_n * d_n)
                + of_family("loss_tokens", g) * np.expm1(-exponent_d * d_d)
                + loss_shape + draws["loss_cell_sd"] * effects.normal(("loss", g, where[:3]))
            )  # fmt: skip
        z = x["log_batch"][t] - best_batch
        slopes = of_family("lr_batch_below", g), of_family("lr_batch_above", g)
        knee = laws.batch_knee(z, *slopes)
        # Floor, curvature and edge are stated at the data's mean batch; a card alone has none, and
        # states them at the best batch.
        d_batch = x["log_batch"][t] - centre["log_batch"] if "log_batch" in centre else z
        zero = z - d_batch
        zero_knee = laws.batch_knee(zero, *slopes)
        if s is not None:
            out["log_lr"][:, t] = draws["lr_opt"][:, s]
            out["log_curvature"][:, t] = draws["log_curvature"][:, s]
            out["floor"][:, t] = draws["floor"][:, s]
        else:
            out["log_lr"][:, t] = (
                lr_cell + knee + draws["lr_slice_sd"] * effects.normal(("slice", g, where))
            )
            out["log_curvature"][:, t] = (
                of_family("log_curvature_level", g) + draws["curvature_n_active"] * d_n
                + draws["curvature_tokens"] * d_d + draws["curvature_batch"] * d_batch
                + draws["curvature_slice_sd"] * effects.normal(("curvature", g, where))
            )  # fmt: skip
            penalty = of_family("penalty_scale", g) * np.exp(draws["penalty_tokens"] * d_d)
            out["floor"][:, t] = (
                loss_cell
                + penalty * laws.linex(z, draws["penalty_skew"])
                - penalty * laws.linex(zero, draws["penalty_skew"])
                + draws["loss_slice_sd"] * effects.normal(("floor", g, where))
            )  # fmt: skip
        out["skew"][:, t] = np.exp(of_family("log_skew", g))
        out["log_edge"][:, t] = (
            lr_cell
            + zero_knee
            + draws["edge_batch"] * (knee - zero_knee)
            + np.exp(of_family("log_edge_offset", g))
        )
        exponent = of_family("loss_exponent_tokens", g)
        out["loss_tokens"][:, t] = of_family("loss_tokens", g) * np.exp(-exponent * d_d)
        out["loss_exponent"][:, t] = exponent
    return TargetDraws(
        **out, edge_width=draws["edge_width"][:, None],
        diverged_loss=prior["diverged_loss"].location,
    )  # fmt: skip


def _two_stage_draws(posterior: Posterior, targets: Sequence[Target],
                     max_draws: int) -> TargetDraws:  # fmt: skip
    kept = posterior.thinned(max_draws)
    x, centre = target_features(targets), posterior.info["centre"]
    away = np.stack([x[k] - centre[k] for k in REGRESSORS])
    rng = np.random.default_rng([int(posterior.info["seed"]), 20_260_105])
    shape = (len(kept), len(targets))
    log_lr = (
        posterior.flat("intercept")[kept, None] + posterior.flat("coefficient")[kept] @ away
        + posterior.flat("residual_sd")[kept, None] * rng.normal(size=shape)
    )  # fmt: skip
    prior = posterior.prior
    exponent = prior["loss_exponent_tokens"].location
    return TargetDraws(
        log_lr=log_lr,
        log_curvature=np.broadcast_to(np.log(posterior.flat("curvature")[kept, None]), shape),
        skew=np.full(shape, 1e-3),
        log_edge=np.full(shape, np.inf),
        edge_width=np.ones((len(kept), 1)),
        floor=np.full(shape, np.nan),
        loss_tokens=np.full(shape, prior["loss_tokens"].location),
        loss_exponent=np.full(shape, exponent),
        diverged_loss=prior["diverged_loss"].location,
    )


def p_diverge(at: TargetDraws, log_lr: FloatArray) -> FloatArray:
    """Probability of divergence by draw and target at ln LR (target,), shape (draw, target)."""
    logit = np.clip((log_lr - at.log_edge) / at.edge_width, -500, 500)
    return np.asarray(1.0 / (1.0 + np.exp(-logit)))


def regret_draws(at: TargetDraws, log_lr: FloatArray) -> FloatArray:
    """Nats above the optimum when trained at ln LR (target,), shape (draw, target).

    Divergence is charged in expectation, as a run that has to be trained again: the nats that twice
    the tokens would have bought.
    A run that ends is never charged more than the card's ``diverged_loss``.
    """
    excess = laws.valley_excess(log_lr - at.log_lr, np.exp(at.log_curvature), at.skew)
    lost = p_diverge(at, log_lr)
    again = np.minimum(
        -at.loss_tokens * np.expm1(-math.log(2.0) * at.loss_exponent), at.diverged_loss
    )
    return np.asarray((1 - lost) * np.minimum(excess, at.diverged_loss) + lost * again)


def recommended_log_lr(at: TargetDraws) -> FloatArray:
    """Natural log of the LR with the least expected regret, (target,)."""
    low, high = np.quantile(at.log_lr, [0.02, 0.98], axis=0)
    steps = np.linspace(0.0, 1.0, _SEARCH_POINTS)
    grid = low + steps[:, None] * (high - low)
    cost = np.stack([regret_draws(at, point).mean(axis=0) for point in grid])
    best = np.clip(np.argmin(cost, axis=0), 1, _SEARCH_POINTS - 2)
    column = np.arange(cost.shape[1])
    left, mid, right = (cost[best + i, column] for i in (-1, 0, 1))
    bend = left - 2 * mid + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    spacing = (high - low) / (_SEARCH_POINTS - 1)
    return np.asarray(grid[best, column] + np.clip(shift, -1, 1) * spacing)


def regret(posterior: Posterior, targets: Sequence[Target],
           lr: float | Sequence[float]) -> FloatArray:  # fmt: skip
    """Draws of the regret of training each target at ``lr``, in nats, shape (draw, target).

    Raises: SpecError if an LR is not positive and finite.
    """
    values = np.broadcast_to(np.asarray(lr, dtype=float), (len(targets),))
    if not (np.isfinite(values) & (values > 0)).all():
        raise SpecError(f"lr must be > 0 and finite, got {lr}; give the LR itself, not its log")
    return regret_draws(target_draws(posterior, targets), np.log(values))


def extrapolation(posterior: Posterior, targets: Sequence[Target]) -> FloatArray:
    """Distance of each target outside the data, in the data's spreads (target,).

    A regressor inside the data's range counts zero; outside, its distance from the nearest end is
    divided by the data's range, or by ln 2 where that is narrower. The four add in squares.
    Infinite without data.
    """
    low, high = posterior.info["data_low"], posterior.info["data_high"]
    if not low:
        return np.full(len(targets), np.inf)
    x, total = target_features(targets), np.zeros(len(targets))
    for name in REGRESSORS:
        outside = np.maximum(np.maximum(low[name] - x[name], x[name] - high[name]), 0.0)
        total += (outside / max(high[name] - low[name], math.log(2.0))) ** 2
    return np.asarray(np.sqrt(total))


def extra_tokens_share(at: TargetDraws, nats: FloatArray) -> FloatArray:
    """Share of extra tokens that would make up for a loss of ``nats`` (target,).

    From the loss-token law L = E + B D^-gamma at its posterior medians; capped at 100 (10,000 %).
    """
    part, exponent = np.median(at.loss_tokens, axis=0), np.median(at.loss_exponent, axis=0)
    left = np.clip(1.0 - nats / np.maximum(part, 1e-12), 1e-6, 1.0)
    return np.asarray(np.minimum(left ** (-1.0 / exponent) - 1.0, 100.0))


def predict(posterior: Posterior, targets: Sequence[Target]) -> pd.DataFrame:
    """Predictions table, one row a target, in order.

    Columns: target_id, lr (recommended), lr_q05 .. lr_q95, regret_mean and regret_q95 (nats, of the
    recommended LR), extra_tokens (share that would make up for regret_mean), p_diverge, loss_q50
    (nats; NaN where the fit knows no loss law), extrapolation, level (family or population),
    sentence.
    Raises: DataError if there is no target, or a target counts parameters otherwise.
    """
    import pandas as pd

    if not targets:
        raise DataError("there is no target to predict; the targets table is empty")
    chunk = 512
    num_draws = int(np.clip(_MAX_CELLS * 50 // (len(targets) * _SEARCH_POINTS), 250, _MAX_DRAWS))
    parts = [
        _predict_chunk(posterior, targets[i : i + chunk], num_draws)
        for i in range(0, len(targets), chunk)
    ]
    return pd.concat(parts, ignore_index=True)


def _predict_chunk(posterior: Posterior, targets: Sequence[Target],
                   num_draws: int) -> pd.DataFrame:  # fmt: skip
    import pandas as pd

    at = target_draws(posterior, targets, max_draws=num_draws)
    log_lr = recommended_log_lr(at)
    quantiles = np.exp(np.quantile(at.log_lr, QUANTILES, axis=0))
    charged = regret_draws(at, log_lr)
    mean = charged.mean(axis=0)
    known = [family_of(posterior, target) is not None for target in targets]
    table = pd.DataFrame(
        {
            "target_id": [target.target_id for target in targets],
            "lr": np.exp(log_lr),
            **dict(zip(QUANTILE_COLUMNS, quantiles, strict=True)),
            "regret_mean": mean,
            "regret_q95": np.quantile(charged, 0.95, axis=0),
            "extra_tokens": extra_tokens_share(at, mean),
            "p_diverge": p_diverge(at, log_lr).mean(axis=0),
            "loss_q50": np.where(known, np.median(at.floor, axis=0), np.nan),
            "extrapolation": extrapolation(posterior, targets),
            "level": ["family" if k else "population" for k in known],
        }
    )
    rows = table.to_dict("records")
    table["sentence"] = [sentence(posterior, t, row) for t, row in zip(targets, rows, strict=True)]
    return table


def sentence(posterior: Posterior, target: Target, row: dict[Any, Any]) -> str:
    """One sentence that a planner can quote about a row of the predictions table."""
    size = format_quantity(target.n_active)
    if target.n_total > target.n_active:
        size += f" active of {format_quantity(target.n_total)}"
    distance = row["extrapolation"]
    if not math.isfinite(distance):
        reach = "from published laws alone, no run of yours"
    elif distance == 0:
        reach = "inside the range of the runs"
    else:
        reach = f"{distance:.1f} times the runs' own range beyond them" + _direction(
            posterior, target
        )
    risk = row["p_diverge"]
    risk_text = "under 1 %" if risk < 0.01 else f"{100 * risk:.0f} %"
    level = "" if row["level"] == "family" or not posterior.info["families"] else (
        " (a recipe the runs do not cover: population level)"
    )  # fmt: skip
    return (
        f"Train {size} parameters on {format_quantity(target.tokens)} tokens at batch "
        f"{format_quantity(target.batch_tokens)} with a peak LR of "
        f"{format_lr(row['lr'])}{level}: the optimum lies between {format_lr(row['lr_q05'])} and "
        f"{format_lr(row['lr_q95'])} with 90 % probability; not knowing it costs an "
        f"expected {row['regret_mean']:.4f} nats, as much as "
        f"{100 * row['extra_tokens']:.1f} % more tokens, and the risk of divergence is "
        f"{risk_text}; {reach}."
    )


def _direction(posterior: Posterior, target: Target) -> str:
    low = posterior.info["data_low"]
    below = [
        word for word, key, value in (
            ("size", "log_n_active", target.n_active), ("tokens", "log_tokens", target.tokens)
        ) if math.log(value) < low[key] - 1e-9
    ]  # fmt: skip
    return f" (below them in {' and '.join(below)})" if below else ""
