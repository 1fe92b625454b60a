"""The fit's checks in the report: largest cells, runs against the model, the prior's part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bayeslr.misfit import transforms
from bayeslr.report import figures
from bayeslr.report.text import share_text
from bayeslr.sensitivity import QUANTITIES, VERDICTS
from bayeslr.verdicts import NO_HOLDOUT, influence_sentences, with_verdicts

if TYPE_CHECKING:
    from bayeslr.posterior import Posterior

MAX_LINES = 12  # Draws whose transforms are drawn.

_HOLDOUT_MARKS: dict[str, tuple[str, bool | None]] = {
    "held": ("Held its largest cells", True),
    "partly": ("Hardly held its largest cells", None),
    "missed": ("Missed its largest cells", False),
}
_MISFIT_MARKS = {"fits": "Fits its runs", "small": "Small misfit", "large": "Misfit"}


def checked(posterior: Posterior) -> Posterior:
    """The posterior with its checks: those of the fit folder, or made now where there are none.

    The refit without the largest cells is not made here.
    """
    return posterior if "misfit" in posterior.info else with_verdicts(posterior, holdout=False)


def marks(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A mark and a sentence for each check; empty for a method without them."""
    if info["method"] != "bayes":
        return []
    rows = []
    holdout, misfit = info.get("holdout"), info["misfit"]
    if holdout:
        # Fit folders of before have no such judgement.
        mark, good = _HOLDOUT_MARKS.get(
            holdout.get("verdict", ""), ("Largest cells left out", None)
        )
        rows.append({"mark": mark, "good": good, "text": holdout["sentence"]})
    else:
        text = NO_HOLDOUT if "holdout" in info else info.get(
            "no_holdout", "The largest cells were not left out and predicted (bayeslr fit does it)."
        )  # fmt: skip
        rows.append({"mark": "Not held out", "good": None, "text": text})
    if misfit:
        good = {"fits": True, "small": None, "large": False}[misfit["verdict"]]
        rows.append(
            {"mark": _MISFIT_MARKS[misfit["verdict"]], "good": good, "text": misfit["sentence"]}
        )
    verdicts = {one["verdict"] for one in info["influence"]}
    if told := influence_sentences(info, at_most=5):
        mark = "Runs against the card" if "conflict" in verdicts else "Rests on the card"
        good = False if "conflict" in verdicts else None
        rows.append({"mark": mark, "good": good, "text": " ".join(told)})
    return rows


def misfit(posterior: Posterior) -> dict[str, Any]:
    """Figure and table of the runs against the model; empty without the check."""
    found = posterior.info["misfit"]
    if not found:
        return {}
    pit = transforms(posterior, MAX_LINES)
    rows = [
        {
            "name": group["name"],
            "runs": f"{group['runs']:.0f}",
            "cover_50": share_text(group["cover_50"]),
            "cover_90": share_text(group["cover_90"]),
            "shift": f"{group['shift']:+.2f}".replace("-", "−"),
            "spread": f"{group['spread']:.2f}",
            "p_value": "< 0.001" if group["p_value"] < 1e-3 else f"{group['p_value']:.2g}",
            "flagged": group["stands_out"],
        }
        for group in (*found["groups"], *found["slices"])
    ]
    diverged = (
        f"Of the outcomes against even odds (a run that diverged where the model gave less than "
        f"one half, or ended where it gave more) the model expects "
        f"{found['expected_surprises']:.1f}; {found['surprises']:.1f} were seen."
    )
    return {
        "sentence": found["sentence"],
        "rows": rows,
        "diverged": diverged,
        "svg": figures.transforms(
            "misfit",
            pit=pit,
            description=f"Probability integral transforms of the losses against the uniform "
            f"distribution, at {len(pit)} draws. {found['sentence']}",
        ),
        "caption": "Share of the losses below each probability that the fit gives them, minus "
        "what a model that is right would have: one line a posterior draw. In the grey band lie 95 "
        "of 100 such lines of a right model from end to end.",
    }


def influence_rows(info: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row a quantity: how far prior and posterior overlap, and what moves it."""
    several = len(info["families"]) > 1
    return [
        {
            "name": QUANTITIES[one["name"]],
            "family": (one["family"] or "all families") if several else "",
            "overlap": share_text(one["overlap"]),
            "by_card": f"{one['by_card']:.2f}",
            "by_runs": f"{one['by_runs']:.2f}",
            "noise": f"{one['noise']:.2f}",
            "verdict": VERDICTS[one["verdict"]],
        }
        for one in info["influence"]
    ]
