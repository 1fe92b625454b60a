"""Do the runs look like runs of the fitted model? Probability integral transforms, group by group.

A run's loss is turned into the probability that the model gave to a lower one. At one draw of a
posterior these are independent and uniform if the model is right, whatever its size (Johnson 2007,
Bayesian Analysis 2, 719), so no run counts for having been fitted. A test is made at many draws;
twice its median p-value is a p-value again (Vovk and Wang 2020, Biometrika 107, 791).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr import laws
from bayeslr.pointwise import blocks, has_end, has_loss
from bayeslr.units import format_quantity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayeslr.posterior import Posterior

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]
    BoolArray = NDArray[np.bool_]

NUM_DRAWS = 40  # Draws at which each test is made.
LEVEL = 0.01  # False alarms of the whole check: its tests share them (Holm 1979).

# Excess over the floor, in nats, that parts near from far: ten and a hundred times the seed noise
# of a final loss, 0.001 nats.
NEAR, FAR = 0.01, 0.1

# A group is judged from so many runs on; its 90 % intervals must hold their share to so much
# before a misfit counts as large.
_MIN_RUNS, _LARGE = 8, 0.08

_SEED = 20_260_105


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs that were tested together.

    ``runs`` is their number (near and far are told anew at each draw: the mean); ``cover_50`` and
    ``cover_90`` the shares of their losses in the model's intervals; ``shift`` and ``spread`` the
    mean and the root mean square of their normal scores, 0 and 1 if the model is right;
    ``p_value`` that of both, for this group alone.
    """

    name: str
    runs: float
    cover_50: float
    cover_90: float
    shift: float
    spread: float
    p_value: float
    stands_out: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Misfit:
    """How the losses and divergences compare with the fitted model's.

    ``groups``: all runs, then by side and distance from the valley, by family, by stage;
    ``slices``: the five of the smallest p-values. ``deciles`` are shares of the probability
    integral transforms, 0.1 each if the model is right. ``surprises`` and ``expected_surprises``
    count runs that diverged, or did not, against even odds. ``verdict`` is ``fits``, ``small`` or
    ``large``.
    """

    groups: tuple[Group, ...]
    slices: tuple[Group, ...]
    deciles: tuple[float, ...]
    surprises: float
    expected_surprises: float
    p_divergences: float
    verdict: str
    sentence: str

    def document(self) -> dict[str, Any]:
        """JSON-safe form, as it stands in fit.json."""
        return dataclasses.asdict(self)


def transforms(posterior: Posterior, num_draws: int = NUM_DRAWS) -> FloatArray:
    """Probability integral transforms of the finished runs' losses, (draw, run)."""
    return _told(posterior, num_draws).pit


@dataclass(frozen=True, kw_only=True)
class _Told:
    """The finished runs at some draws, each (draw, run), and surprises by divergence (draw,).

    ``score`` is the normal quantile of ``pit``.
    """

    pit: FloatArray
    score: FloatArray
    offset: FloatArray
    excess: FloatArray
    surprises: FloatArray
    expected: FloatArray


def _told(posterior: Posterior, num_draws: int) -> _Told:
    from scipy.special import ndtri
    from scipy.stats import t

    design = posterior.design
    assert design is not None
    draws = posterior.thinned(num_draws)
    told, ended = has_loss(design), has_end(design)
    parts: list[tuple[FloatArray, FloatArray, FloatArray]] = []
    surprises, expected = np.zeros(len(draws)), np.zeros(len(draws))
    for runs, at in blocks(posterior, draws):
        of = told[runs]
        z = (design.loss[runs][of] - at.mean[:, of]) / at.scale[:, of]
        parts.append((np.asarray(t.cdf(z, at.dof)), at.offset[:, of], at.excess[:, of]))
        of = ended[runs]
        odds = laws.logistic(at.logit[:, of])
        surprises += ((odds > 0.5) != design.diverged[runs][of]).sum(axis=1)
        expected += np.minimum(odds, 1.0 - odds).sum(axis=1)
    pit, offset, excess = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    pit = np.clip(pit, 1e-12, 1.0 - 1e-12)
    return _Told(
        pit=pit, score=ndtri(pit), offset=offset, excess=excess,
        surprises=surprises, expected=expected,
    )  # fmt: skip


def check_misfit(posterior: Posterior) -> Misfit | None:
    """Test the fit against its own runs; None without a valley model or with too few runs."""
    from scipy.stats import kstest, poisson

    design = posterior.design
    if design is None or posterior.info["method"] != "bayes":
        return None
    if has_loss(design).sum() < _MIN_RUNS:
        return None
    told = _told(posterior, NUM_DRAWS)
    everything = np.ones(told.pit.shape, dtype=bool)
    whole = _group("all runs", told, everything)
    shape = _combined([float(kstest(row, "uniform").pvalue) for row in told.pit])
    whole = dataclasses.replace(whole, p_value=min(1.0, 2.0 * min(whole.p_value, shape)))
    groups = [whole, *_groups(posterior, told)]
    slices = _slices(posterior, told)
    p_diverged = _combined(
        [float(poisson.sf(s - 1, e)) for s, e in zip(told.surprises, told.expected, strict=True)]
    )
    flags = _holm([one.p_value for one in (*groups, *slices)] + [p_diverged])
    groups = [dataclasses.replace(g, stands_out=f) for g, f in zip(groups, flags, strict=False)]
    slices = [
        dataclasses.replace(g, stands_out=f)
        for g, f in zip(slices, flags[len(groups) : -1], strict=True)
    ]
    slices = sorted(slices, key=lambda one: one.p_value)
    verdict = _verdict([*groups, *slices], flags[-1])
    return Misfit(
        groups=tuple(groups),
        slices=tuple(slices[:5]),
        deciles=tuple((np.histogram(told.pit, 10, (0.0, 1.0))[0] / told.pit.size).tolist()),
        surprises=float(told.surprises.mean()),
        expected_surprises=float(told.expected.mean()),
        p_divergences=p_diverged,
        verdict=verdict,
        sentence=_sentence(verdict, groups, slices, told, flags[-1]),
    )


def _combined(p_values: list[float]) -> float:
    return float(min(1.0, 2.0 * np.median(p_values)))


def _group(name: str, told: _Told, mask: BoolArray) -> Group:
    """Mean and spread of the normal scores of the runs in mask (draw, run), tested by draw."""
    from scipy.stats import chi2, norm

    z = np.where(mask, told.score, 0.0)
    count = np.maximum(mask.sum(axis=1), 1)
    shift = 2.0 * norm.sf(np.abs(z.sum(axis=1)) / np.sqrt(count))
    squares = (z**2).sum(axis=1)
    below = chi2.cdf(squares, count)
    spread = 2.0 * np.minimum(below, chi2.sf(squares, count))
    inside = told.pit[mask]
    return Group(
        name=name,
        runs=float(mask.sum(axis=1).mean()),
        cover_50=float(np.mean((inside > 0.25) & (inside < 0.75))),
        cover_90=float(np.mean((inside > 0.05) & (inside < 0.95))),
        shift=float((z.sum(axis=1) / count).mean()),
        spread=float(np.sqrt(squares / count).mean()),
        p_value=_combined([float(p) for p in np.minimum(1.0, 2.0 * np.minimum(shift, spread))]),
    )


def _groups(posterior: Posterior, told: _Told) -> list[Group]:
    """Groups with enough runs: by distance and side, by family, by stage of the schedule."""
    design = posterior.design
    assert design is not None
    masks: dict[str, BoolArray] = {}
    bands = (
        (f"runs within {NEAR:g} nats of the floor", 0.0, NEAR),
        (f"runs {NEAR:g} to {FAR:g} nats above the floor", NEAR, FAR),
        (f"runs more than {FAR:g} nats above the floor", FAR, math.inf),
    )
    for words, low, high in bands:
        near = (told.excess >= low) & (told.excess < high)
        masks[f"{words}, at LRs below LR*"] = near & (told.offset < 0)
        masks[f"{words}, at LRs above LR*"] = near & (told.offset >= 0)
    slice_of_run = design.slice_of_run[has_loss(design)]
    if len(design.families) > 1:
        for g, family in enumerate(design.families):
            own = design.family_of_slice[slice_of_run] == g
            masks[f"family {family}"] = np.broadcast_to(own, told.pit.shape)
    early = ~design.annealed[design.cell_of_slice[slice_of_run]]
    masks["runs read off before the decay"] = np.broadcast_to(early, told.pit.shape)
    compute = (design.log_tokens + design.log_n_active[design.shape_of_cell])[
        design.cell_of_slice[slice_of_run]
    ]
    large = compute > compute.max() - math.log(1.5)
    if not large.all():
        masks["the largest cells"] = np.broadcast_to(large, told.pit.shape)
    return [
        _group(name, told, mask)
        for name, mask in masks.items()
        if mask.sum(axis=1).mean() >= _MIN_RUNS
    ]


def _slices(posterior: Posterior, told: _Told) -> list[Group]:
    design = posterior.design
    assert design is not None
    slice_of_run = design.slice_of_run[has_loss(design)]
    order = np.argsort(slice_of_run, kind="stable")
    ends = np.searchsorted(slice_of_run[order], np.arange(design.num_slices + 1))
    found = []
    for s in np.flatnonzero(np.diff(ends) >= _MIN_RUNS // 2):
        own = order[ends[s] : ends[s + 1]]
        some = dataclasses.replace(told, pit=told.pit[:, own], score=told.score[:, own])
        found.append(_group(_slice_name(posterior, int(s)), some, np.ones_like(some.pit, bool)))
    return found


def _slice_name(posterior: Posterior, s: int) -> str:
    design = posterior.design
    assert design is not None
    cell = design.cell_of_slice[s]
    shape = design.shape_of_cell[cell]
    n_active, sparsity = (math.exp(x[shape]) for x in (design.log_n_active, design.log_sparsity))
    size = format_quantity(n_active)
    if sparsity < 1 - 1e-9:
        size += f" of {format_quantity(n_active / sparsity)}"
    tokens, batch = (
        format_quantity(math.exp(x)) for x in (design.log_tokens[cell], design.log_batch[s])
    )
    name = f"slice {size}, {tokens} tokens, batch {batch}"
    several = len(design.families) > 1
    return f"{name} ({design.families[design.family_of_shape[shape]]})" if several else name


def _holm(p_values: list[float]) -> list[bool]:
    """Which p-values stand out when `LEVEL` is shared between all of them."""
    order = np.argsort(p_values)
    flags = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > LEVEL / (len(p_values) - rank):
            break
        flags[int(i)] = True
    return flags


def _verdict(tested: list[Group], diverged: bool) -> str:
    out = [one for one in tested if one.stands_out]
    if not out and not diverged:
        return "fits"
    return "large" if diverged or any(abs(g.cover_90 - 0.9) > _LARGE for g in out) else "small"


def _sentence(verdict: str, groups: list[Group], slices: list[Group], told: _Told,
              diverged: bool) -> str:  # fmt: skip
    whole = groups[0]
    text = (
        f"{100 * whole.cover_90:.0f} % of the {whole.runs:.0f} losses lie in the model's own 90 % "
        "intervals"
    )
    where = sorted((g for g in groups[1:] if g.stands_out), key=lambda one: one.p_value)
    if verdict == "fits":
        return f"The runs look like the model's: {text}, and no group of them stands out."
    start = (
        "The runs differ from the model's, but little"
        if verdict == "small"
        else "The model does not describe all of these runs"
    )
    parts = [f"{start}: {text}"]
    parts += [f"{_how(one)} {one.name}" for one in where[:3]]
    if odd := [one for one in slices if one.stands_out]:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        parts.append(f"{_how(odd[0])} {odd[0].name}{more}")
    if diverged:
        parts.append(
            f"{told.surprises.mean():.0f} runs diverged, or did not, against even odds, where "
            f"{told.expected.mean():.1f} were expected"
        )
    return "; ".join(parts) + "."


def _how(group: Group) -> str:
    """In which way a group's losses differ, up to the name of the group."""
    if abs(group.shift) > 0.5 * abs(group.spread - 1.0):
        return f"losses {'higher' if group.shift > 0 else 'lower'} than fitted in"
    return f"{'more' if group.spread > 1 else 'less'} scatter than fitted in"
