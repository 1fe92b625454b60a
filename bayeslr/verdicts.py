"""What to know of a fit before trusting it: leave-largest-out, misfit, the prior's part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bayeslr.holdout import leave_largest_out
from bayeslr.misfit import check_misfit
from bayeslr.sensitivity import Influence, influence, sentences

if TYPE_CHECKING:
    from bayeslr.posterior import Posterior


def with_verdicts(posterior: Posterior, *, holdout: bool = True, why_not: str = "",
                  seed: int = 1) -> Posterior:  # fmt: skip
    """The same posterior with every check in its ``info``, as fit.json keeps them.

    ``info["influence"]``: what prior and runs did to each exponent; ``info["misfit"]``: how the
    runs compare with the model's; ``info["holdout"]``: how the fit predicts its own largest cells
    without them (a refit, left out where ``holdout`` is false; ``why_not``, a sentence, is kept as
    ``info["no_holdout"]``). None: too few runs for a check.
    """
    misfit = check_misfit(posterior)
    info: dict[str, Any] = {
        **posterior.info,
        "influence": [one.document() for one in influence(posterior)],
        "misfit": None if misfit is None else misfit.document(),
    }
    if holdout:
        found = leave_largest_out(posterior, seed=seed)
        info["holdout"] = None if found is None else found.document()
    elif why_not:
        info["no_holdout"] = why_not
    return dataclasses.replace(posterior, info=info)


def verdict_lines(info: Mapping[str, Any]) -> list[str]:
    """The checks of a fit in sentences, the most telling first."""
    lines = []
    if info.get("holdout"):
        lines.append(str(info["holdout"]["sentence"]))
    elif "holdout" in info and info["method"] == "bayes":
        lines.append(NO_HOLDOUT)
    elif "no_holdout" in info:
        lines.append(str(info["no_holdout"]))
    if info.get("misfit"):
        lines.append(str(info["misfit"]["sentence"]))
    return [*lines, *influence_sentences(info)]


def warnings_of(info: Mapping[str, Any]) -> list[str]:
    """Sentences of the checks that a fit did not pass, the convergence gate among them."""
    found = [] if info.get("trustworthy", True) else [str(info["verdict"])]
    holdout, misfit = info.get("holdout"), info.get("misfit")
    if holdout and holdout.get("verdict") == "missed":
        found.append(str(holdout["sentence"]))
    if misfit and misfit["verdict"] == "large":
        found.append(str(misfit["sentence"]))
    return found


NO_HOLDOUT = (
    "Too few runs to leave the largest cells out and predict them: whether this fit extrapolates "
    "has not been tested."
)


def influence_sentences(info: Mapping[str, Any], at_most: int | None = None) -> list[str]:
    """What the prior card's part in a fit is, from its ``info``; see `sensitivity.sentences`."""
    return sentences([Influence(**one) for one in info.get("influence", [])], at_most)
