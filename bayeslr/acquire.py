"""What to run next: the runs that lower the targets' expected regret most for their FLOPs.

No sampling per candidate: the posterior draws hold, jointly, each candidate's loss and each
target's ln LR*. Observing a loss then shrinks the variance of ln LR* by the part that it explains
(a linear-Gaussian update of the draws, Matheron's rule), and the regret of the best choice at a
target is curvature times variance near its optimum. Nats become FLOPs of the target through its
loss-token law, so that a run is worth its cost while the FLOPs it saves exceed its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from bayeslr import laws
from bayeslr.covariates import best_values, covariate_draws, least_expected, log_ratio
from bayeslr.errors import SpecError, UntrustworthyFit
from bayeslr.finishing import Finishing
from bayeslr.pointwise import noise_parameters
from bayeslr.posterior import Posterior
from bayeslr.predict import (
    extra_tokens_share,
    family_of,
    target_draws,
    target_features,
)
from bayeslr.runner_protocol import RecordedRunner, find_runner
from bayeslr.space import Candidate, repeats, targets_of, trials_in, weights_of
from bayeslr.space import candidates as candidates_of
from bayeslr.specs import Recipe, RunSpec, Target, require_whole
from bayeslr.units import counted_past, format_quantity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

# Draws: as many as can be had, within so many (draw, observation) pairs. What is chosen from
# thousands of options by their sample covariance is chosen by its noise if they are few.
_FEWEST_DRAWS, _MOST_DRAWS, _MAX_PAIRS = 600, 2000, 2_000_000

# Gain is weighed against cost to this power. A choice per FLOP buys ever more cheap runs, which
# trust the law to carry far; Lee et al. 2020 (arXiv 2003.10870) let the cost count less and less.
# One half was as good or better on recorded runs at every budget, and better at large ones
# (docs/log.md).
_COST_POWER = 0.5

# A loss this far above the floor says "far too high" or "diverged", and no more than that.
_MAX_EXCESS = 0.3

# Excesses in nats at which the end of a run is priced, and where to look for their LRs in ln LR.
_EXCESSES, _FARTHEST = (0.005, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5), 20.0

# Floors beyond this central part of their draws, or so many nats from their median, count as its
# ends: farther off, a floor is unknown and that is all.
_CENTRAL, _FAR = (0.005, 0.995), 3.0

# Runs of one slice bought together lie at its expected optimum and so many standard deviations to
# each side of it; at least about a third of an octave, below which seed noise hides the slope.
_REACHES, _LEAST_SD = (0.75, 1.5), 0.35


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A run to pay for.

    ``saves_nats`` is the expected fall of the targets' mean regret, ``saves_flops`` what the falls
    are worth as compute of each target, both given the proposals before it. ``p_diverge`` is the
    run's own; ``repeat`` is the candidate's; ``changed`` holds the covariates that are not at their
    reference; ``finishing`` says what the end is worth under way.
    """

    spec: RunSpec
    flops: float
    saves_nats: float
    saves_flops: float
    p_diverge: float
    reason: str
    repeat: bool = False
    changed: Mapping[str, float] = field(default_factory=dict)
    finishing: Finishing | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Proposals in order, and why there are no more of them.

    ``regret_now`` and ``regret_after`` are the targets' mean expected regret in nats.
    """

    proposals: tuple[Proposal, ...]
    regret_now: float
    regret_after: float
    stop_reason: str


class _Options:
    """What can be bought at one step: single runs, and a few runs of one slice together.

    One loss of a new slice says next to nothing, for its floor is as unknown as its optimum; two or
    three show the valley's slope. A greedy choice of single runs would never find that out.
    ``members`` lists the candidates of each option, singles first.

    mean, sd: of ln LR* as each candidate's valley has it (candidate,).
    """

    def __init__(self, log_lr: FloatArray, slice_of: Sequence[int], mean: FloatArray,
                 sd: FloatArray) -> None:  # fmt: skip
        self.members: list[tuple[int, ...]] = [(i,) for i in range(len(log_lr))]
        by_slice: dict[int, list[int]] = {}
        for i, number in enumerate(slice_of):
            by_slice.setdefault(number, []).append(i)
        for mine in by_slice.values():
            if len(mine) < 2:
                continue
            # By LR: what is left of a group whose end is cut off is the same in any order.
            mine.sort(key=lambda i: log_lr[i])
            at, found = log_lr[mine], set()
            for reach in _REACHES:
                half = reach * max(float(sd[mine[0]]), _LEAST_SD)
                for pattern in ((-1.0, 1.0), (-1.0, 0.0, 1.0)):
                    wanted = float(mean[mine[0]]) + half * np.array(pattern)
                    near = np.argmin(np.abs(at[:, None] - wanted), axis=0)
                    found.add(tuple(sorted({int(j) for j in near})))
            groups = [group for group in sorted(found) if len(group) > 1]
            self.members += [tuple(mine[j] for j in group) for group in groups]


class _Covariates:
    """Draws of what covariates do to candidates, and of their best values at targets.

    Those count that differ between candidates or within the fit's slices; what is to be known of a
    target are the best values of those that candidates can still change.
    """

    def __init__(self, posterior: Posterior, candidates: Sequence[Candidate],
                 targets: Sequence[Target], num_draws: int) -> None:  # fmt: skip
        design = posterior.design
        values = [candidate.spec.covariates for candidate in candidates]
        usual = {name: Counter(v[name] for v in values if name in v).most_common(1)[0][0]
                 for name in dict.fromkeys(name for v in values for name in v)}  # fmt: skip
        # A multiplier that is not stated is 1.
        usual = {n: v if all(n in row for row in values) else 1.0 for n, v in usual.items()}
        # None at all counts as a tenth of the least, as in a fit.
        least = {n: min((v[n] for v in values if v.get(n, 0) > 0), default=1.0) / 10 for n in usual}
        varied = [n for n, u in usual.items() if any(row.get(n, u) != u for row in values)]
        known = () if design is None else design.covariates
        self.names = [*varied, *(name for name in known if name not in varied)]
        self._posterior, self._targets, self._num_draws = posterior, targets, num_draws
        self._varied, self._values = varied, values
        families = [family_of(posterior, _cell(c.spec, c.spec.tokens)) for c in candidates]
        self._families = list(dict.fromkeys(families))
        self._family = np.array([self._families.index(g) for g in families])
        self._z = np.zeros((len(candidates), len(self.names)))
        for k, name in enumerate(self.names):
            for i, (row, g) in enumerate(zip(values, families, strict=True)):
                if design is not None and name in known:
                    self._z[i, k] = log_ratio(design, name, row.get(name, 1.0), g or 0)
                else:
                    reference = max(usual[name], least[name])
                    self._z[i, k] = math.log(max(row.get(name, 1.0), least[name]) / reference)
        self._d_n = np.log([candidate.spec.n_active for candidate in candidates])
        self._d_n -= posterior.info["centre"]["log_n_active"]

    def terms(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """`laws.covariate_terms` of every candidate, each (draw, candidate)."""
        draws = covariate_draws(self._posterior, self.names, self._families, self._num_draws)
        total = np.zeros((3, self._num_draws, len(self._z)))
        for k in range(len(self.names)):  # one at a time: together they would fill the memory
            own = {name: values[:, self._family, k, None] for name, values in draws.items()}
            total += laws.covariate_terms(self._z[:, [k]], self._d_n[:, None], own)
        shift, off_best, of_reference = total
        return shift, off_best, of_reference

    def changed(self, candidate: int) -> dict[str, float]:
        """What of a candidate's covariates is not the reference, by name."""
        own = zip(self.names, self._z[candidate], strict=True)
        values = self._values[candidate]
        return {name: float(values.get(name, 1.0)) for name, z in own if z}

    def valley_of(self, cell_of: Sequence[int]) -> list[int]:
        """Numbers candidates of one cell at the same covariates alike: they differ in LR."""
        numbers: dict[tuple[int, bytes], int] = {}
        return [
            numbers.setdefault((cell, z.tobytes()), len(numbers))
            for cell, z in zip(cell_of, self._z, strict=True)
        ]

    def goals(self) -> tuple[FloatArray, FloatArray]:
        """Ln of the best values at targets (draw, covariate x target), and what their variance
        costs, nats (covariate x target,).
        """
        best, p = best_values(
            self._posterior, self._varied, self._targets, self._num_draws
        )  # fmt: skip
        curvature = p["covariate_curvature"]
        chosen = least_expected(best, curvature)
        cost = (curvature * (best - chosen) ** 2).mean(axis=0) / best.var(axis=0)
        by_covariate = best.transpose(0, 2, 1).reshape(len(best), -1)
        return by_covariate, cost.T.ravel()


def _cell(spec: RunSpec, tokens: float, name: str = "cell") -> Target:
    """What a run measures at one of its horizons, as a target."""
    return Target(
        target_id=name, family=spec.family, n_active=spec.n_active, n_total=spec.n_total,
        tokens=tokens, batch_tokens=min(spec.batch_tokens, tokens),
        param_convention=spec.param_convention,
    )  # fmt: skip


def _cell_key(spec: RunSpec, tokens: float) -> tuple[str, int, int, float, int]:
    """Equal for what runs of one cell and batch measure."""
    return spec.family, spec.n_active, spec.n_total, float(tokens), spec.batch_tokens


class _Beliefs:
    """Joint draws of the candidates' losses and the targets' ln LR*, updated run by run."""

    def __init__(self, posterior: Posterior, candidates: Sequence[Candidate],
                 targets: Sequence[Target], shares: FloatArray, seed: int) -> None:  # fmt: skip
        specs = [candidate.spec for candidate in candidates]
        cells = {_cell_key(spec, end): (spec, end) for spec in specs for end in spec.decay_at}
        places = {key: place for place, key in enumerate(cells)}
        extra = [_cell(*cells[key], f"cell{place}") for key, place in places.items()]
        cell_of = [[places[_cell_key(spec, end)] for end in spec.decay_at] for spec in specs]
        num_pairs = sum(len(mine) for mine in cell_of)
        max_draws = int(np.clip(_MAX_PAIRS / num_pairs, _FEWEST_DRAWS, _MOST_DRAWS))
        at = target_draws(posterior, [*targets, *extra], max_draws=max_draws)
        if not np.isfinite(at.floor).all():
            raise UntrustworthyFit(
                "the posterior holds draws of the loss that are no numbers, so no run can be "
                "chosen by it; fit again with more draws"
            )
        self.at = at
        self.num_targets = len(targets)
        self.goal = at.log_lr[:, : len(targets)].copy()
        self.curvature = at.curvature[:, : len(targets)].mean(axis=0)
        self.shares = shares
        covariates = _Covariates(posterior, candidates, targets, len(at.log_lr))
        self._covariates = covariates
        if covariates.names:
            goal, curvature = covariates.goals()
            self.goal = np.hstack([self.goal, goal])
            self.curvature = np.concatenate([self.curvature, curvature])
        # Observations: every decay branch of every candidate, candidate by candidate.
        num_branches = np.array([len(mine) for mine in cell_of])
        first = np.concatenate([[0], np.cumsum(num_branches)])
        longest = first[1:] - 1
        column = np.concatenate([np.asarray(mine) for mine in cell_of]) + len(targets)
        log_lr = np.log([candidate.spec.lr for candidate in candidates])
        candidate_of = np.repeat(np.arange(len(candidates)), num_branches)
        shift, off_best, of_reference = covariates.terms()
        tried = log_lr[candidate_of] + shift[:, candidate_of]
        u = tried - at.log_lr[:, column]
        skew = np.broadcast_to(at.skew, at.log_lr.shape)[:, column]
        excess = laws.valley_excess(u, at.curvature[:, column], skew) + off_best[:, candidate_of]
        logit = (tried - at.log_edge[:, column]) / at.edge_width
        lost = laws.logistic(logit)
        # To whichever horizon a run goes: it has diverged if it does so anywhere on its way.
        self.p_diverge = lost.mean(axis=0)[longest]
        finished = np.minimum(excess, _MAX_EXCESS)
        # Whether a run diverges is chance even where a draw is true: its mean and its variance
        # stand for it, for with a coin a draw the falls would hang on a few of them.
        margin = _MAX_EXCESS - finished
        by_chance = (lost * (1.0 - lost) * margin**2).mean(axis=0)
        # Draws far out in the tails (batches far from the best, exponents of a normal
        # approximation) would make up all of a covariance. What the runs of a slice share is
        # clipped before what tells them apart is added.
        low, middle, high = np.quantile(at.floor, [_CENTRAL[0], 0.5, _CENTRAL[1]], axis=0)
        floor = np.clip(at.floor, np.maximum(low, middle - _FAR), np.minimum(high, middle + _FAR))
        self.loss = floor[:, column] + finished + lost * margin
        self.loss -= of_reference[:, candidate_of]
        observed_at = [extra[i - len(targets)] for i in column]
        self.noise_variance = _noise_variance(posterior, u, finished, observed_at)
        # Decay branches of one run share part of their noise: as draws, like all that is joint.
        ratio = {name: np.median(posterior.flat(name)) for name in ("noise_run", "noise_order")}
        of_trunk, _, own = laws.noise_shares(num_branches[candidate_of] > 1, 0.0, ratio)
        rng = np.random.default_rng([seed, 20_260_106])
        effect = rng.normal(size=(len(self.loss), len(candidates)))[:, candidate_of]
        self.loss += of_trunk * np.sqrt(self.noise_variance) * effect
        self._posterior, self._column, self._cells, self._floor = posterior, column, extra, floor
        self._of_trunk, self._own = of_trunk, own
        self._beside = off_best, of_reference
        self.expected_excess = finished.mean(axis=0)[longest]
        self.noise_variance = self.noise_variance * own**2 + by_chance
        self.observations = [list(range(a, b)) for a, b in pairwise(first)]
        last = column[longest]
        of_last = at.log_lr[:, last] - shift
        options = _Options(
            log_lr, covariates.valley_of(last.tolist()), of_last.mean(axis=0), of_last.std(axis=0)
        )
        self.members = options.members
        # Options with as many observations are worked out together.
        self._groups: list[tuple[IntArray, IntArray]] = []
        seen = [[o for i in group for o in self.observations[i]] for group in self.members]
        sizes = np.array([len(mine) for mine in seen])
        for size in np.unique(sizes):
            which = np.flatnonzero(sizes == size)
            self._groups.append((which, np.array([seen[i] for i in which])))
        self.goal -= self.goal.mean(axis=0)
        self.loss -= self.loss.mean(axis=0)
        self._goal_before, self._loss_before = self.goal.copy(), self.loss.copy()

    def changed(self, candidate: int) -> dict[str, float]:
        """What of a candidate's covariates is not the reference, by name."""
        return self._covariates.changed(candidate)

    def regret(self) -> float:
        """Mean expected regret of the best choice at the targets, nats."""
        return float(self.shares @ self._by_target(self.curvature * self.goal.var(axis=0)))

    def _by_target(self, of_goals: FloatArray) -> FloatArray:
        """Sums over what is to be known of each target, its LR* first, from (..., goal)."""
        by_goal = of_goals.reshape(*of_goals.shape[:-1], -1, self.num_targets)
        return np.asarray(by_goal.sum(axis=-2))

    def falls(self) -> FloatArray:
        """Expected fall of each target's regret by option, nats, (option, target)."""
        draws = len(self.goal)
        covariance = self.loss.T @ self.goal / draws
        variance = np.einsum("do,do->o", self.loss, self.loss) / draws + self.noise_variance
        of_goal = self.goal.var(axis=0)
        falls = np.zeros((len(self.members), self.num_targets))
        for which, observed in self._groups:
            size = observed.shape[1]
            joint = covariance[observed]
            if size == 1:
                explained = joint[:, 0] ** 2 / variance[observed]
            else:
                spread = np.empty((len(which), size, size))
                for a in range(size):
                    spread[:, a, a] = variance[observed[:, a]]
                    for b in range(a):
                        product = np.einsum(
                            "do,do->o", self.loss[:, observed[:, a]], self.loss[:, observed[:, b]]
                        )
                        spread[:, a, b] = spread[:, b, a] = product / draws
                explained = np.einsum("oat,oat->ot", joint, np.linalg.solve(spread, joint))
            # With few draws a correlation is never exactly zero: what noise alone would explain is
            # taken off, so that useless runs gain nothing.
            chance = size / draws * of_goal
            falls[which] = self._by_target(np.maximum(explained - chance, 0.0) * self.curvature)
        return falls

    def ends(self, run: int, others: Sequence[int]) -> FloatArray:
        """What the end of a run tells, by how far above its slice's floor it turns out to be:
        expected fall of each target's regret, nats, (excess, target), beyond what others tell.

        That is what a run is worth whose LR lies where such an excess is expected. The curve counts
        as nothing: a run that was stopped is one loss of a cell of its own, before the decay, and
        says next to nothing of LR* (docs/log.md).
        """
        mine, known = self.observations[run], [o for i in others for o in self.observations[i]]
        goal, draws = self._goal_before, len(self._goal_before)
        loss = self._loss_before[:, known]
        noise = np.zeros((len(known) + len(mine),) * 2)
        noise[: len(known), : len(known)] = np.diag(self.noise_variance[known])
        from_others = _explained(loss, goal, noise[: len(known), : len(known)])
        chance = len(mine) / draws * goal.var(axis=0)
        falls = np.zeros((len(_EXCESSES), goal.shape[1]))
        for row, excess in enumerate(_EXCESSES):
            for side in (-1.0, 1.0):  # whichever tells more: which one it is shows later
                ends, noise_sd = self._ends_at(run, excess, side)
                trunk = self._of_trunk[mine] * noise_sd
                block = np.outer(trunk, trunk) + np.diag((self._own[mine] * noise_sd) ** 2)
                noise[len(known) :, len(known) :] = block
                explained = _explained(np.hstack([loss, ends]), goal, noise)
                falls[row] = np.maximum(falls[row], explained - from_others - chance)
        by_target = self._by_target(falls * self.curvature)
        # Where two ways of telling cancel, the fall dips: nearer the floor never counts for less.
        return np.asarray(np.maximum.accumulate(by_target[::-1])[::-1])

    def _ends_at(self, run: int, excess: float,
                 side: float) -> tuple[FloatArray, FloatArray]:  # fmt: skip
        """Losses (draw, observation) of a run's slice and covariates, at LRs to one side of LR*
        where such an excess is expected, and the sd of their noise (observation,).
        """
        at, column = self.at, self._column[self.observations[run]]
        off_best, of_reference = (terms[:, [run]] for terms in self._beside)
        curvature = at.curvature[:, column]
        skew = np.broadcast_to(at.skew, at.log_lr.shape)[:, column]
        grid = side * np.linspace(0.0, _FARTHEST, 1000)
        valley = laws.valley_excess(grid[:, None], curvature.mean(axis=0), skew.mean(axis=0))
        of_lr = max(0.0, excess - float(off_best.mean()))
        expected = np.array([np.interp(of_lr, valley[:, o], grid) for o in range(len(column))])
        u = expected - (at.log_lr[:, column] - at.log_lr[:, column].mean(axis=0))
        above = np.minimum(laws.valley_excess(u, curvature, skew) + off_best, _MAX_EXCESS)
        loss = self._floor[:, column] + above - of_reference
        cells = [self._cells[i - self.num_targets] for i in column]
        variance = _noise_variance(self._posterior, u, np.full_like(u, excess), cells)
        return loss - loss.mean(axis=0), np.sqrt(variance)

    def observe(self, candidate: int) -> None:
        """Condition all draws on a candidate having been run.

        By a square-root filter (Whitaker and Hamill 2002, eqs. 10 and 11): the draws' covariances
        become the posterior's without a draw of the noise, so that no choice hangs on its luck.
        """
        for o in self.observations[candidate]:
            seen, noise = self.loss[:, o].copy(), self.noise_variance[o]
            total = seen @ seen / len(seen) + noise
            gain = seen / (len(seen) * total * (1.0 + math.sqrt(noise / total)))
            self.goal -= np.outer(gain, seen @ self.goal)
            self.loss -= np.outer(gain, seen @ self.loss)


def _explained(loss: FloatArray, goal: FloatArray, noise: FloatArray) -> FloatArray:
    """Variance of each target's ln LR* that losses explain, (target,).

    loss: (draw, observation), goal: (draw, target), both about their means. noise: the covariance
    of the losses' noise.
    """
    joint = loss.T @ goal / len(goal)
    solved = np.linalg.solve(loss.T @ loss / len(goal) + noise, joint)
    return np.asarray(np.einsum("ot,ot->t", joint, solved))


def _noise_variance(posterior: Posterior, u: FloatArray, excess: FloatArray,
                    cells: Sequence[Target]) -> FloatArray:  # fmt: skip
    """Typical variance of each observation about its expectation, nats squared, (observation,).

    u, excess: (draw, observation), of the cells observed.
    """
    at, centre = target_features(cells), posterior.info["centre"]
    # The card's noise is stated at the centre of data; where there are none it has no slopes.
    d_batch, d_tokens = (
        at[name] - (centre[name] if posterior.design is not None else at[name])
        for name in ("log_batch", "log_tokens")
    )
    # A family that the fit has not seen is taken to be as noisy as the first.
    family = np.array([family_of(posterior, cell) or 0 for cell in cells])
    noise = noise_parameters(posterior, posterior.thinned(len(u)), family)
    scale = laws.noise_scale(excess, u, d_batch, d_tokens, noise, 0.0)
    return np.asarray(np.median(scale, axis=0) ** 2)


class _Market:
    """What each option costs, what it would save, and which can still be bought."""

    def __init__(self, beliefs: _Beliefs, candidates: Sequence[Candidate],
                 targets: Sequence[Target], weight: FloatArray) -> None:  # fmt: skip
        self.members, self._beliefs = beliefs.members, beliefs
        self._target_flops = weight * np.array([target.flops for target in targets])
        flops = [candidate.flops for candidate in candidates]
        self.cost = np.array([math.fsum(flops[i] for i in group) for group in self.members])
        self._open = np.ones(len(self.members), dtype=bool)
        # Buying a candidate closes each option that holds it, or another one with its trunk.
        self._trunks = [i if c.trunk is None else c.trunk for i, c in enumerate(candidates)]
        self._options_of: dict[Hashable, list[int]] = {}
        for option, group in enumerate(self.members):
            for i in group:
                self._options_of.setdefault(self._trunks[i], []).append(option)

    def within(self, left: float) -> NDArray[np.bool_]:
        """Whether each option can still be bought for so many FLOPs (option,)."""
        return np.asarray(self._open & (self.cost <= left))

    def priced(self, left: float) -> tuple[FloatArray, FloatArray]:
        """Fall of the targets' mean regret in nats, zero for what is not `within` ``left``, and the
        FLOPs of the targets that it is worth, each (option,).
        """
        falls = self._beliefs.falls()
        return np.where(self.within(left), falls @ self._beliefs.shares, 0.0), self.worth(falls)

    def best(self, gains: FloatArray) -> int:
        """The option that gains most for its cost, to `_COST_POWER`."""
        return int(np.argmax(gains / self.cost**_COST_POWER))

    def worth(self, nats: FloatArray) -> FloatArray:
        """FLOPs of the targets, by weight, that nats (option, target) of regret stand for."""
        at, own = self._beliefs.at, slice(len(self._target_flops))  # the targets come first
        parts = at.loss_tokens[:, own], at.loss_exponent[:, own]
        at = replace(at, loss_tokens=parts[0], loss_exponent=parts[1])
        return np.asarray(extra_tokens_share(at, nats) @ self._target_flops)

    def buy(self, candidate: int) -> None:
        """Close what holds a candidate, and expect its loss to be known."""
        self._beliefs.observe(candidate)
        self._open[self._options_of[self._trunks[candidate]]] = False


def propose(posterior: Posterior, candidates: Sequence[Candidate], targets: Sequence[Target], *,
            num_runs: int, budget_flops: float, seed: int,
            weights: Sequence[float] | None = None,
            only_paying: bool = True) -> list[Proposal]:  # fmt: skip
    """Up to ``num_runs`` proposals within the budget, best first; none when none pays.

    weights: how much each target counts, 1 by default; one that is to be trained twice counts 2.
    only_paying: stop where a run costs more FLOPs than it saves at the targets; else the budget
    alone stops.
    Raises: DataError through the targets' checks, SpecError for a two-stage fit, UntrustworthyFit
    for draws that are no numbers.
    """
    found = choose(
        posterior, candidates, targets, num_runs=num_runs, budget_flops=budget_flops, seed=seed,
        weights=weights, only_paying=only_paying,
    )  # fmt: skip
    return list(found.proposals)


def choose(posterior: Posterior, candidates: Sequence[Candidate], targets: Sequence[Target], *,
           num_runs: int, budget_flops: float, seed: int,
           weights: Sequence[float] | None = None, only_paying: bool = True,
           price_ends: bool = False,
           under_way: Sequence[RunSpec] = ()) -> Plan:  # fmt: skip
    """As `propose`, with the regret before and after, and the reason for stopping.

    price_ends: say of every proposal what its end is worth under way. under_way: runs that others
    are making now; what they will tell is expected, and counts for nothing again.

    Of candidates that share a trunk one at most is proposed: the others' price would be another.
    """
    if posterior.info["method"] == "two-stage":
        raise SpecError(
            "least squares knows no losses, so no run can be chosen by it; plan from a fit by the "
            "method bayes"
        )
    weight = np.ones(len(targets)) if weights is None else np.asarray(weights, dtype=float)
    if not candidates:
        return Plan(proposals=(), regret_now=math.nan, regret_after=math.nan,
                    stop_reason="every run of the space has been made")  # fmt: skip
    # What is under way is for sale at no price.
    every = [*candidates, *(Candidate(spec=spec, flops=math.inf) for spec in under_way)]
    beliefs = _Beliefs(posterior, every, targets, weight / weight.sum(), seed)
    market = _Market(beliefs, every, targets, weight)
    cost = market.cost
    regret_now = beliefs.regret()
    begun = range(len(candidates), len(every))
    for i in begun:
        market.buy(i)
    regret_before = beliefs.regret()
    left = budget_flops
    proposals: list[Proposal] = []
    bought: list[tuple[int, set[int]]] = []  # with what was bought before and together
    stop_reason = f"{counted_past(num_runs, 'run')} asked for"
    while len(proposals) < num_runs:
        gains, saves = market.priced(left)
        if not (gains > 0).any():
            stop_reason = (
                "no run that is left would tell anything about the targets"
                if market.within(left).any()
                else f"no run fits into the {format_quantity(left)} FLOPs that are left"
            )
            break
        pays = (saves >= cost) | (not only_paying)
        best = market.best(np.where(pays, gains, 0.0))
        if not (pays[best] and gains[best] > 0):
            best = int(np.argmax(np.where(market.within(left), saves / cost, 0.0)))
            stop_reason = (
                f"the best that is left would save an expected {format_quantity(saves[best])} "
                f"FLOPs at the targets and costs {format_quantity(cost[best])}"
            )
            break
        group = market.members[best]
        reason = (
            f"lowers the expected regret at the targets by {gains[best]:.2g} nats, worth "
            f"{format_quantity(saves[best])} FLOPs there, for {format_quantity(cost[best])}"
        )
        if len(group) > 1:
            reason += f"; {len(group)} LRs of one slice together"
        # What is cut off here is proposed again by the next choice, if it still pays.
        for i in group[: num_runs - len(proposals)]:
            changed = beliefs.changed(i)
            proposals.append(
                Proposal(
                    spec=candidates[i].spec,
                    flops=float(candidates[i].flops),
                    saves_nats=float(gains[best]) / len(group),
                    saves_flops=float(saves[best]) / len(group),
                    p_diverge=float(beliefs.p_diverge[i]),
                    reason=reason + _peculiar(candidates[i]) + _named(changed),
                    repeat=candidates[i].repeat,
                    changed=changed,
                )
            )
            bought.append((i, {*begun, *group, *(j for j, _ in bought)} - {i}))
            market.buy(i)
            left -= candidates[i].flops
    if price_ends:
        # What stopping a run early leaves over buys the next best one, or is kept: then a FLOP is
        # worth a FLOP, unless the budget is to be spent in any case.
        gains, saves = market.priced(left + max((p.flops for p in proposals), default=0.0))
        best = market.best(gains)
        elsewhere = float(saves[best] / cost[best]) if gains[best] > 0 else 0.0
        proposals = [
            replace(proposal, finishing=_finishing(
                beliefs, proposal, i, sorted(others), elsewhere, 1.0 if only_paying else 0.0,
                market.worth,
            ))
            for proposal, (i, others) in zip(proposals, bought, strict=True)
        ]  # fmt: skip
    # Not the regret of the draws as they are now: by chance alone every run known takes one of so
    # many degrees of freedom from them.
    saved = math.fsum(proposal.saves_nats for proposal in proposals)
    return Plan(
        proposals=tuple(proposals), regret_now=regret_now, regret_after=regret_before - saved,
        stop_reason=stop_reason,
    )  # fmt: skip


def _named(covariates: Mapping[str, float]) -> str:
    """Covariates with their values, as the end of a sentence."""
    return "".join(f"; {name} {value:.3g}" for name, value in covariates.items())


def _peculiar(candidate: Candidate) -> str:
    """What is peculiar to a candidate's run, as the end of a sentence."""
    text = "; again with another seed" if candidate.repeat else ""
    spec = candidate.spec
    if spec.continues is not None:
        text += f"; goes on from {spec.continues} at {format_quantity(spec.continues_at)} tokens"
    return text


def _finishing(beliefs: _Beliefs, proposal: Proposal, i: int, others: Sequence[int],
               elsewhere: float, least_rate: float,
               worth: Callable[[FloatArray], FloatArray]) -> Finishing | None:  # fmt: skip
    """What the end of a proposed run, candidate i, is worth under way; None where it is not to be
    told from chance.

    others: candidates bought before and together. elsewhere, least_rate: FLOPs saved by a FLOP of
    the next best run, and of one that is kept. worth: FLOPs of nats (excess, target).
    """
    told = worth(beliefs.ends(i, others))
    expected = float(np.interp(beliefs.expected_excess[i], _EXCESSES, told))
    if expected <= 0.0:
        return None
    # As far up as was expected, the end is worth what the run was bought for.
    saves = np.maximum(told, proposal.saves_flops * np.minimum(1.0, told / expected))
    # The next best may be cheaper and save more for a FLOP: this one was chosen all the same.
    rate = min(elsewhere, proposal.saves_flops / proposal.flops)
    return Finishing(
        excess=_EXCESSES, saves_flops=tuple(saves.tolist()), flops=proposal.flops,
        rate=max(rate, least_rate),
    )  # fmt: skip


def plan(posterior: Posterior, recipe: Recipe, *, budget_flops: float,
         num_runs: int | None = None, seed: int | None = None) -> Plan:  # fmt: skip
    """The next runs of a recipe's space within a budget; all that pay, unless ``num_runs``.

    What the fit's runs measured is no candidate, as in a sweep; a run that ended well is one with
    another seed, a repeat that averages its noise out.
    """
    if num_runs is not None:
        require_whole(num_runs, "num_runs", 1)
    runner = find_runner(recipe)
    made = [] if posterior.runs is None else trials_in(posterior.runs, recipe, runner)
    pool = candidates_of(recipe, runner, made)
    if not isinstance(runner, RecordedRunner):  # recorded runs have no other seeds
        pool += repeats(recipe, runner, made)
    return choose(
        posterior,
        pool,
        targets_of(recipe, runner),
        num_runs=num_runs if num_runs is not None else len(pool),
        budget_flops=budget_flops,
        seed=recipe.seed if seed is None else seed,
        weights=weights_of(recipe),
    )
