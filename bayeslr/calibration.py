"""Simulation-based calibration: are the intervals what they say, when the model is right?

Parameters are drawn from the prior card, a run table from the parameters, a posterior from the
table. The rank of the truth among the posterior's draws is then uniform (Talts et al. 2018,
arXiv 1804.06788), for every parameter and for the optimal LR of a run far larger than any in the
table. Uniformity is judged by the largest excursion of the ranks' ECDF from its simultaneous bands
(Säilynoja, Bürkner and Vehtari 2021, arXiv 2103.10522). Twins whose data contradict their model
must fail the same test.
"""

from __future__ import annotations

import dataclasses
import html as html_module
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr.errors import DataError, SpecError
from bayeslr.features import build_design
from bayeslr.models.simulate import PlannedSlice, Simulation, simulate
from bayeslr.posterior import LOOP_GATE, make_posterior
from bayeslr.predict import predict, target_draws
from bayeslr.priors import SLOPES, Prior, as_prior
from bayeslr.runs import make_table
from bayeslr.sampling import configure_jax, fit, sample_design
from bayeslr.specs import WEIGHT_DECAY, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayeslr.posterior import Posterior
    from bayeslr.runs import RunTable

    FloatArray = NDArray[np.float64]

# What can be calibrated. Twins are the valley model on tables that it is wrong for.
MODELS = {
    "valley": "the hierarchical model",
    "two-stage": "least squares, whose LR* alone is judged, on tables that it can fit",
    "twin-shifted": "a twin whose tables state every LR 0.3 too high in natural logs (35 %)",
    "twin-noisy": "a twin whose losses carry 0.02 nats of noise that the card knows nothing of",
    "twin-apart": "a twin that is not told which rows are branches of one run or share a seed",
}
_SHIFT, _DISTURBANCE = 0.3, 0.02

PROBS = (0.5, 0.9)
TARGETS = ("near", "far")
_FAR = 30.0  # The far target's compute over that of the largest cell.

# Two sizes that all tables are padded to, so that two compilations serve them all.
_SIZES = (
    {"run": 64, "slice": 16, "cell": 12, "shape": 4},
    {"run": 208, "slice": 32, "cell": 16, "shape": 6},
)
_MOST_RUNS = _SIZES[-1]["run"]
_MOST_DRAWN = 200  # Tables drawn for one that can be used.
_NUM_WARMUP, _NUM_DRAWS, _NUM_CHAINS, _MAX_ROUNDS = 400, 300, 2, 4

_GRID = 64  # Points at which an ECDF is compared with its bands.
_NUM_NULL = 20_000  # Simulated sets of uniform ranks: p-values from 5e-5 up.


@dataclass(frozen=True, kw_only=True, slots=True)
class TableResult:
    """Where the truth of one simulated table fell.

    ``pit`` maps each quantity to its rank among the draws as a share in (0, 1); ``inside`` (target,
    prob) says whether LR* lay in the central interval; ``width`` (target,) is that of the widest,
    in natural logs.
    """

    pit: Mapping[str, float]
    inside: NDArray[np.bool_]
    width: FloatArray
    num_runs: int
    num_diverged: int
    max_r_hat: float
    min_ess: float
    divergences: float
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """Ranks and coverage over simulated tables, with their verdict."""

    prior: str
    model: str
    seed: int
    tables: tuple[TableResult, ...]
    false_alarm: float = 0.01

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Quantities whose ranks are judged: those that two tables have, at least."""
        named = Counter(name for table in self.tables for name in table.pit)
        return tuple(name for name, count in named.items() if count > 1)

    def pit(self, name: str) -> FloatArray:
        """Ranks of one quantity as shares, (table,), of the tables that have it."""
        return np.array([table.pit[name] for table in self.tables if name in table.pit])

    @cached_property
    def _null(self) -> dict[int, FloatArray]:
        """Statistics of uniform ranks, by their number."""
        return {
            count: _null_statistics(count, np.random.default_rng([self.seed, 20_260_110]))
            for count in {len(self.pit(name)) for name in self.names}
        }

    def bands(self, name: str) -> tuple[FloatArray, FloatArray]:
        """Simultaneous 95 % bands of the ECDF of uniform ranks over its expectation, (point,)."""
        from scipy.stats import binom

        count, points = len(self.pit(name)), _points()
        gamma = float(np.quantile(self._null[count], 0.05))
        low, high = (
            binom.ppf(q, count, points) / count - points for q in (gamma / 2, 1 - gamma / 2)
        )
        return low, high

    @cached_property
    def p_values(self) -> dict[str, float]:
        """Probability of a larger excursion of the ECDF if ranks are uniform, by quantity."""
        found = {}
        for name in self.names:
            statistic = _statistic(self.pit(name)[None])[0]
            null = self._null[len(self.pit(name))]
            found[name] = float((1 + (null <= statistic).sum()) / (1 + len(null)))
        return found

    @property
    def smallest_p(self) -> float:
        """Smallest p-value times their number (Bonferroni)."""
        return min(1.0, min(self.p_values.values()) * len(self.names))

    @property
    def uniform(self) -> bool:
        """Whether no quantity's ranks contradict uniformity, at ``false_alarm`` over all."""
        return self.smallest_p >= self.false_alarm

    def coverage(self) -> dict[str, dict[str, float]]:
        """Share of optima inside their intervals, by target (and pooled) and probability."""
        inside = np.stack([table.inside for table in self.tables]).astype(float)
        shares = {name: inside[:, i].mean(axis=0) for i, name in enumerate(TARGETS)}
        shares["all"] = inside.mean(axis=(0, 1))
        return {
            name: {f"{prob:g}": float(share) for prob, share in zip(PROBS, values, strict=True)}
            for name, values in shares.items()
        }

    def verdict(self) -> str:
        """The answer in words."""
        if self.model.startswith("twin"):
            caught = "It is caught" if not self.uniform else "It is NOT caught"
            return f"{caught}, as a wrong model should be. {self._verdict()}"
        return self._verdict()

    def _verdict(self) -> str:
        if self.uniform:
            return (
                f"Ranks are uniform as far as {len(self.tables)} tables can tell: smallest of "
                f"{len(self.names)} p-values {min(self.p_values.values()):.2g}, "
                f"{self.smallest_p:.2g} after correction for their number."
            )
        worst = sorted(self.p_values, key=self.p_values.__getitem__)[:5]
        broken = [name for name in worst if self.p_values[name] * len(self.names) < 0.05]
        return (
            f"Ranks are NOT uniform: {', '.join(broken)} (corrected p {self.smallest_p:.2g}). The "
            "intervals of this model and card cannot be taken at their word."
        )

    def document(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "prior": self.prior,
            "model": self.model,
            "seed": self.seed,
            "num_tables": len(self.tables),
            "num_runs": [table.num_runs for table in self.tables],
            "uniform": self.uniform,
            "smallest_p": self.smallest_p,
            "verdict": self.verdict(),
            "coverage": self.coverage(),
            "p_values": self.p_values,
            "mean_rank": {name: float(self.pit(name).mean()) for name in self.names},
            "ranks": {name: [round(float(x), 4) for x in self.pit(name)] for name in self.names},
            "median_width": {
                name: float(np.median([table.width[i] for table in self.tables]))
                for i, name in enumerate(TARGETS)
            },
            "max_r_hat": [table.max_r_hat for table in self.tables],
            "divergences": [table.divergences for table in self.tables],
            "seconds": float(sum(table.seconds for table in self.tables)),
        }

    def text(self) -> str:
        """The answer for a terminal."""
        runs = [table.num_runs for table in self.tables]
        lines = [
            f"{len(self.tables)} tables of {min(runs)} to {max(runs)} runs from card {self.prior}, "
            f"model {self.model} ({MODELS[self.model]}), seed {self.seed}",
            self.verdict(),
            "Coverage of LR* (share of true optima inside, +- one standard error):",
        ]
        for name, shares in self.coverage().items():
            count = len(self.tables) * (len(TARGETS) if name == "all" else 1)
            parts = []
            for prob in PROBS:
                share = shares[f"{prob:g}"]
                error = math.sqrt(prob * (1 - prob) / count)
                parts.append(f"{100 * prob:.0f} %: {100 * share:.0f} +- {100 * error:.0f} %")
            lines.append(f"  {name:5s} {'   '.join(parts)}")
        lines.append("Least uniform:")
        lines += [
            f"  {name:28s} p {self.p_values[name]:.3g}, mean rank {self.pit(name).mean():.2f}"
            for name in sorted(self.p_values, key=self.p_values.__getitem__)[:6]
        ]
        return "\n".join(lines)

    def html(self) -> str:
        """One self-contained page: verdict, coverage, and a rank plot a quantity."""
        return _page(self)


def calibrate(prior: str | Prior = "moe-default", *, num_tables: int = 20, num_runs: int = 60,
              seed: int = 1, model: str = "valley",
              progress: bool = False) -> Calibration:  # fmt: skip
    """Simulate tables from a card, fit each, and rank the truth among the draws.

    num_tables: of 20 or more, every fourth has two families; of fewer, none.
    num_runs: runs asked of the middle table, at most 208. The others are asked for 3/10 to 10/3 of
    it, log-uniformly, but never for more than 208, and each holds what of its ladder fits: asked
    for 20, 60 and 200, tables of one family hold 17, 49 and 90 in geometric mean.
    model: one of `MODELS`. Twins are wrong and must fail; ``twin-apart`` needs more than 40 tables
    for that.
    Raises: SpecError for an unknown model, fewer than two tables, or more runs than a table holds.
    """
    if model not in MODELS:
        raise SpecError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    if num_tables < 2:
        raise SpecError(f"num_tables must be at least 2, got {num_tables}; ranks need several")
    if num_runs > _MOST_RUNS:
        raise SpecError(
            f"num_runs must be at most {_MOST_RUNS}, got {num_runs}; no larger table is simulated"
        )
    card = as_prior(prior)
    configure_jax()
    tables = []
    for index in range(num_tables):
        num_families = 2 if num_tables >= 20 and index % 4 == 3 else 1
        result = one_table(
            card, index, num_runs=num_runs, num_families=num_families, seed=seed, model=model
        )  # fmt: skip
        tables.append(result)
        if progress:
            sys.stderr.write(
                f"table {index + 1} of {num_tables}: {result.num_runs} runs, "
                f"{result.num_diverged} diverged, {result.seconds:.0f} s\n"
            )
    return Calibration(card.name, model, seed, tuple(tables))


def one_table(card: Prior, index: int, *, num_runs: int, num_families: int, seed: int,
              model: str) -> TableResult:  # fmt: skip
    """Simulate and fit table ``index`` of a seed."""
    started = time.monotonic()
    rng = np.random.default_rng([seed, index])
    for _ in range(_MOST_DRAWN):
        drawn, targets = _drawn(card, num_runs, num_families, rng)
        runs = _recorded(drawn.runs, model, rng)
        try:
            posterior = _fit(runs, card, model, seed=seed + index)
        except DataError:  # too few valleys for least squares: selected by its data alone
            continue
        return _judge(drawn, posterior, targets, rng, time.monotonic() - started)
    raise SpecError(f"card {card.name!r} draws no run table that {model} can fit")


def _drawn(card: Prior, num_runs: int, num_families: int,
           rng: np.random.Generator) -> tuple[Simulation, list[Target]]:  # fmt: skip
    """A table that users would recognise, with its targets.

    Tables that the run table's checks would touch are drawn anew: what is left is selected by its
    data alone, which leaves its posterior as it is.
    """
    for _ in range(_MOST_DRAWN):
        layout = random_layout(card, num_runs, num_families, rng)
        targets = _targets(card, layout)
        try:
            drawn = simulate(card, layout, rng, targets=targets)
        except DataError:
            continue
        clean = drawn.runs.quarantine.empty
        loss = drawn.runs.frame["loss"]
        if clean and float(loss.max() - loss.min()) < 6.0:
            return drawn, targets
    raise SpecError(f"card {card.name!r} draws no run table that passes the checks of one")


def random_layout(card: Prior, num_runs: int, num_families: int,
                  rng: np.random.Generator) -> list[PlannedSlice]:  # fmt: skip
    """A ladder as users build them: a wide pilot, then a few LRs a slice, cheap slices first.

    It is asked for 3/10 to 10/3 of ``num_runs``, log-uniformly, at most for what the largest table
    holds, and ends sooner where its slices do.
    """
    wanted = int(num_runs * np.exp(rng.uniform(-1, 1) * math.log(10 / 3)))
    limit = _SIZES[0] if wanted <= _SIZES[0]["run"] else _SIZES[1]
    wanted = min(wanted, limit["run"])
    layout: list[PlannedSlice] = []
    for f in range(num_families):
        share = wanted // num_families
        part = _ladder(card, f"family{f}", share, rng)
        room = {key: limit[key] // num_families for key in ("slice", "cell", "shape")}
        layout += _trimmed(part, share, room)
    return layout


def _ladder(card: Prior, family: str, num_runs: int,
            rng: np.random.Generator) -> list[PlannedSlice]:  # fmt: skip
    num_shapes = int(rng.integers(2, 4))
    growth = rng.uniform(2.0, 4.0)
    sizes = 10 ** rng.uniform(7.0, 8.0) * growth ** np.arange(num_shapes)
    experts = np.full(num_shapes, rng.choice([1.0, 4.0, 8.0, 16.0]))
    if rng.random() < 0.3:
        experts[-1] *= 2
    tokens = 10 ** rng.uniform(9.0, 9.7) * rng.uniform(2.0, 4.0) ** np.arange(rng.integers(2, 4))
    reference = card.log_reference
    middle = (
        card["best_batch_intercept"].location
        + card["best_batch_tokens"].location * (np.log(tokens).mean() - reference["log_tokens"])
        + card["best_batch_n_active"].location
        * (np.log(sizes).mean() - reference["log_n_active"])
    )  # fmt: skip
    first = 2.0 ** round(middle / math.log(2.0) + rng.uniform(-1, 1))
    batches = first * 2.0 ** np.arange(rng.integers(1, 4))
    num_lrs = int(rng.integers(3, 7))
    step = math.log(2.0) * rng.choice([0.5, 1.0])
    loss_se = 0.0005 if rng.random() < 0.3 else 0.0
    usual = (WEIGHT_DECAY, WEIGHT_DECAY)
    decays = (*usual, 3 * WEIGHT_DECAY, *usual, WEIGHT_DECAY / 3) if rng.random() < 0.3 else usual
    grid = [(n, e, d, b) for d in tokens for n, e in zip(sizes, experts, strict=True)
            for b in batches]  # fmt: skip
    grid.sort(key=lambda cell: cell[0] * cell[2])
    branching = rng.random() < 0.4  # Under WSD a run measures the shorter horizons on its way.
    fixed: dict[str, Any] = {"family": family, "loss_se": loss_se, "weight_decay": decays}
    ladder = [
        PlannedSlice(n_active=n, n_total=n * e, tokens=d, batch_tokens=b,
                     num_lrs=7 if wide else num_lrs, step=math.log(2.0) if wide else step,
                     trunk=f"{family}-{n:.0f}-{b:.0f}" if branching else None, **fixed)
        for i, (n, e, d, b) in enumerate(grid)
        for wide in [(n, b) == (grid[0][0], grid[0][3]) if branching else i == 0]
    ]  # fmt: skip
    if rng.random() < 0.3:
        # Runs that are still going: losses read off before the LR has decayed.
        n, e, d, b = grid[0]
        ladder.insert(1, PlannedSlice(
            n_active=n, n_total=n * e, tokens=d / 2, batch_tokens=b, num_lrs=num_lrs, step=step,
            annealed=False, **fixed,
        ))  # fmt: skip
    if sum(s.num_lrs for s in ladder) < num_runs:
        ladder = [dataclasses.replace(s, repeats=2) for s in ladder]
    return ladder


def _trimmed(ladder: Sequence[PlannedSlice], num_runs: int,
             room: Mapping[str, int]) -> list[PlannedSlice]:  # fmt: skip
    """Slices in order for as long as runs and groups fit."""
    kept: list[PlannedSlice] = []
    for planned in ladder:
        trial = [*kept, planned]
        sizes = {
            "slice": len(trial),
            "cell": len({(s.n_active, s.tokens, s.annealed) for s in trial}),
            "shape": len({s.n_active for s in trial}),
        }
        fits = all(sizes[level] <= room[level] for level in room)
        if fits and sum(s.num_lrs * s.repeats for s in trial) <= num_runs:
            kept = trial
    return kept or [dataclasses.replace(ladder[0], num_lrs=min(ladder[0].num_lrs, num_runs))]


def _targets(card: Prior, layout: Sequence[PlannedSlice]) -> list[Target]:
    """Of the first family: the largest shape on 3 times its tokens, and 30 times its compute."""
    mine = [s for s in layout if s.family == layout[0].family]
    largest = max(mine, key=lambda s: s.n_active * s.tokens)
    reference = card.log_reference
    targets = []
    for name, growth, longer in (
        ("near", 1.0, 3.0), ("far", math.sqrt(_FAR), math.sqrt(_FAR))
    ):  # fmt: skip
        tokens = largest.tokens * longer
        batch = math.exp(
            card["best_batch_intercept"].location
            + card["best_batch_tokens"].location * (math.log(tokens) - reference["log_tokens"])
        )
        targets.append(Target(
            target_id=name, family=largest.family, n_active=largest.n_active * growth,
            n_total=largest.n_total * growth, tokens=tokens, batch_tokens=batch,
        ))  # fmt: skip
    return targets


def _recorded(runs: RunTable, model: str, rng: np.random.Generator) -> RunTable:
    """The table as it is fitted: unchanged, or a twin's."""
    if model in ("valley", "two-stage"):
        return runs
    frame = runs.frame.copy()
    if model == "twin-shifted":
        frame["lr"] = frame["lr"] * math.exp(_SHIFT)
    elif model == "twin-apart":
        frame["run_id"] = [f"{i}" for i in range(len(frame))]
        frame["seed"] = None
    else:
        frame["loss"] = frame["loss"] + _DISTURBANCE * rng.normal(size=len(frame))
    return make_table(frame, source=model)


def _fit(runs: RunTable, card: Prior, model: str, *, seed: int) -> Posterior:
    """Least squares; else as a refit inside the loop, with sizes that all tables share."""
    if model == "two-stage":
        return fit(runs, card, method=model, seed=seed)
    design = build_design(runs)
    own = design.sizes
    fitting = [s for s in _SIZES if all(own[level] <= s[level] for level in s)]
    sizes = own
    if fitting:
        shared = fitting[0]["run"] if own["shared"] else 0
        sizes = {**fitting[0], "family": own["family"], "shared": shared}
    draws, statistics = sample_design(
        design, card, sizes=sizes, gate=LOOP_GATE, seed=seed, num_warmup=_NUM_WARMUP,
        num_draws=_NUM_DRAWS, num_chains=_NUM_CHAINS, max_rounds=_MAX_ROUNDS,
    )  # fmt: skip
    return make_posterior(
        draws, design, runs, card, method="bayes", seed=seed, statistics=statistics
    )


def _judge(drawn: Simulation, posterior: Posterior, targets: Sequence[Target],
           rng: np.random.Generator, seconds: float) -> TableResult:  # fmt: skip
    pit = {}
    assert posterior.design is not None
    for name, truth in drawn.truth.items():
        # Least squares has no parameters of the model; noise is shared in some tables only.
        if name == "shared_noise" or posterior.info["method"] == "two-stage":
            continue
        draws = posterior.draws[name].to_numpy()
        if truth.ndim == 2:
            entries = SLOPES if name == "family_slope" else posterior.design.covariates
            for j, entry in enumerate(entries):
                label = f"{name}[{entry}]"
                pit[label] = rank_share(draws[:, :, 0, j], float(truth[0, j]), rng)
        else:
            # The first of a level stands for it: groups of a level are exchangeable.
            first = draws if truth.ndim == 0 else draws[:, :, 0]
            pit[name] = rank_share(first, float(np.ravel(truth)[0]), rng)
    chains = posterior.draws.sizes["chain"]
    at_targets = target_draws(posterior, targets).log_lr
    for i, name in enumerate(TARGETS):
        values = at_targets[:, i].reshape(chains, -1)
        pit[f"LR* {name}"] = rank_share(values, float(drawn.target_log_lr[i]), rng)
    table = predict(posterior, targets)
    bounds = np.log(table[["lr_q05", "lr_q25", "lr_q75", "lr_q95"]].to_numpy())
    truth = drawn.target_log_lr
    inside = np.stack(
        [(bounds[:, 1] <= truth) & (truth <= bounds[:, 2]),
         (bounds[:, 0] <= truth) & (truth <= bounds[:, 3])], axis=1,
    )  # fmt: skip
    diagnostics = posterior.info["diagnostics"]
    return TableResult(
        pit=pit, inside=inside, width=bounds[:, 3] - bounds[:, 0],
        num_runs=int(posterior.info["num_runs"]),
        num_diverged=int(posterior.info["num_diverged"]),
        max_r_hat=float(diagnostics.get("max_r_hat", 1.0)),
        min_ess=float(diagnostics.get("min_ess", math.inf)),
        divergences=float(diagnostics.get("divergences", 0.0)), seconds=seconds,
    )  # fmt: skip


def rank_share(draws: FloatArray, truth: float, rng: np.random.Generator) -> float:
    """Rank of the truth among draws (chain, draw) as a share in (0, 1), uniform if calibrated.

    Draws are thinned to their effective number first: autocorrelated ones make ranks pile up at the
    ends. A uniform number within the rank's own step makes the share continuous.
    """
    total = draws.size
    stride = max(1, math.ceil(total / effective_draws(draws)))
    kept = draws.reshape(-1)[int(rng.integers(stride)) :: stride]
    return float(((kept < truth).sum() + rng.random()) / (len(kept) + 1))


def effective_draws(draws: FloatArray) -> float:
    """Effective number of draws (chain, draw) of a mean: Geyer's initial positive sequence."""
    chains, length = draws.shape
    centred = draws - draws.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(centred, n=2 * length, axis=1)
    covariance = np.fft.irfft(np.abs(spectrum) ** 2, axis=1)[:, :length].mean(axis=0) / length
    within = covariance[0] * length / max(1, length - 1)
    between = float(np.var(draws.mean(axis=1), ddof=1)) if chains > 1 else 0.0
    total = within * (length - 1) / length + between
    if total <= 0:
        return 1.0
    correlation = 1.0 - (within - covariance) / total
    pairs = correlation[: length // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs < 0)
    pairs = np.minimum.accumulate(pairs[: negative[0] if len(negative) else len(pairs)])
    return float(np.clip(chains * length / max(2 * pairs.sum() - 1, 1.0), 1.0, draws.size))


def _points() -> FloatArray:
    return np.arange(1, _GRID) / _GRID


def _statistic(pit: FloatArray) -> FloatArray:
    """Smallest two-sided binomial tail of each set's ECDF, (set,); pit (set, table)."""
    from scipy.stats import binom

    count = pit.shape[1]
    below = np.arange(count + 1)[:, None]
    points = _points()
    tail = 2 * np.minimum(
        binom.cdf(below, count, points), 1.0 - binom.cdf(below - 1, count, points)
    )
    ordered = np.sort(pit, axis=1)
    counts = np.stack([(ordered <= z).sum(axis=1) for z in points], axis=1)
    return np.asarray(tail[counts, np.arange(len(points))].min(axis=1))


def _null_statistics(num_tables: int, rng: np.random.Generator) -> FloatArray:
    """The statistic of sets of uniform ranks, (set,): algorithm 1 of arXiv 2103.10522."""
    return np.concatenate(
        [_statistic(rng.random((_NUM_NULL // 10, num_tables))) for _ in range(10)]
    )


def _page(result: Calibration) -> str:
    plots = [
        _plot(name, result.pit(name), result.p_values[name], _points(), *result.bands(name))
        for name in sorted(result.names, key=result.p_values.__getitem__)
    ]
    rows = "".join(
        f"<tr><td>{name}</td>"
        + "".join(f"<td>{100 * shares[f'{prob:g}']:.1f} %</td>" for prob in PROBS)
        + "</tr>"
        for name, shares in result.coverage().items()
    )
    runs = [table.num_runs for table in result.tables]
    head = "".join(f"<th>{100 * prob:.0f} % interval</th>" for prob in PROBS)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        "<title>bayeslr: calibration</title><style>"
        "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ccc;"
        "text-align:right}td:first-child{text-align:left}"
        ".plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:.6rem}"
        "figure{margin:0}figcaption{font-size:12px;overflow-wrap:anywhere}.bad{color:#b00020}"
        "svg{width:100%;height:auto;background:#fafafa}</style></head><body>"
        f"<h1>Calibration of card {html_module.escape(result.prior)}</h1>"
        f"<p>{html_module.escape(result.verdict())}</p>"
        f"<p>{len(result.tables)} tables of {min(runs)} to {max(runs)} runs, model {result.model}, "
        f"seed {result.seed}.</p>"
        "<h2>Coverage of the optimal LR</h2>"
        f"<table><tr><th>target</th>{head}</tr>{rows}</table>"
        f"<p>near: the largest shape at three times its tokens; far: {_FAR:g} times the compute of "
        "the largest cell, a new shape.</p>"
        "<h2>Ranks</h2><p>Share of ranks below, minus what uniform ranks would give. The grey band "
        "holds the whole curve in 95 % of calibrated fits; least uniform first.</p>"
        f"<div class='plots'>{''.join(plots)}</div></body></html>\n"
    )


def _plot(name: str, pit: FloatArray, p_value: float, points: FloatArray, low: FloatArray,
          high: FloatArray) -> str:  # fmt: skip
    """ECDF difference of one quantity as inline SVG."""
    difference = np.array([(pit <= z).mean() for z in points]) - points
    reach = 1.05 * max(float(np.abs(difference).max()), float(high.max()), float(-low.min()))

    def path(values: FloatArray) -> list[str]:
        return [
            f"{200 * x:.1f},{60 - 55 * y / reach:.1f}" for x, y in zip(points, values, strict=True)
        ]

    band = " ".join([*path(low), *reversed(path(high))])
    line = " ".join(path(difference))
    mark = " class='bad'" if p_value < 0.05 else ""
    return (
        "<figure><svg viewBox='0 0 200 120' role='img'>"
        f"<polygon points='{band}' fill='#ddd'/><line x1='0' x2='200' y1='60' y2='60' "
        f"stroke='#999'/><polyline points='{line}' fill='none' stroke='#0b57d0' "
        f"stroke-width='1.5'/></svg><figcaption{mark}>{html_module.escape(name)}, "
        f"p = {p_value:.2g}</figcaption></figure>"
    )
