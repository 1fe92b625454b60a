"""Why to believe the report, or not: verdict, sampler diagnostics, sources of the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslr.predict import data_ranges
from bayeslr.priors import PARAMETERS, Distribution
from bayeslr.report import figures
from bayeslr.report.targets import FAR
from bayeslr.runs import total_flops
from bayeslr.specs import Target
from bayeslr.units import counted, format_flops

if TYPE_CHECKING:
    from bayeslr.posterior import Posterior

MAX_TRACES = 6


def verdict(
    posterior: Posterior,
    targets: Sequence[Target],
    predictions: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The fit's own verdict, and what a planner should keep in mind."""
    method = posterior.info["method"]
    mark = {"prior": "Published evidence only", "two-stage": "Two-stage estimate"}.get(
        method, "Converged" if posterior.trustworthy else "Do not trust this fit"
    )
    text = str(posterior.info["verdict"]).removeprefix("Do not trust this fit: ")
    return {
        "trusted": posterior.trustworthy,
        "plain": method != "bayes",
        "mark": mark,
        "text": text,
        "notes": [
            *_distance_notes(posterior, targets, predictions),
            *(_sentence(text) for text in posterior.info["identifiability"]),
        ],
    }


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")


def _distance_notes(
    posterior: Posterior, targets: Sequence[Target], predictions: Sequence[dict[str, Any]]
) -> list[str]:
    if posterior.design is None:
        return []
    notes = []
    far = [t for t, row in zip(targets, predictions, strict=True) if row["extrapolation"] > FAR]
    if far:
        largest = max(far, key=lambda target: target.flops)
        ranges = data_ranges(posterior, largest)
        reach = " and ".join(
            f"{times:.3g} times {words}"
            for times, words in (
                (
                    largest.n_active / math.exp(ranges["log_n_active"][1]),
                    "the active parameters of the largest run",
                ),
                (largest.tokens / math.exp(ranges["log_tokens"][1]), "the tokens of the longest"),
            )
            if times > 1.01
        )
        which = largest.target_id + (f" has {reach}" if reach else " is far from every run")
        notes.append(
            f"{which}: there the law carries the prediction, not the runs. A rung in between "
            "would narrow the interval most."
        )
    families = posterior.info["families"]
    apart = [t for t, row in zip(targets, predictions, strict=True) if row["level"] != "family"]
    strangers = [target.target_id for target in apart if target.family is not None]
    if strangers:
        notes.append(
            f"No run shares the recipe of {_some(strangers)}: predicted for the population of "
            "recipes, and wider for it."
        )
    if unnamed := [target.target_id for target in apart if target.family is None]:
        notes.append(
            f"No family is named for {_some(unnamed)}: predicted for the population of recipes. "
            f"Named as one of {', '.join(families)}, it would be predicted by its own runs."
        )
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")


def diagnostics(posterior: Posterior) -> list[dict[str, Any]]:
    """A row for each reported variable, the least converged first; empty without a sampler."""
    variables = posterior.info["diagnostics"].get("variables", {})
    rows = []
    for name, worst in variables.items():
        values = posterior.flat(name)
        size = math.prod(values.shape[1:])
        values = values.reshape(-1) if size == 1 else values
        scalar = size == 1
        low, high = (np.quantile(values, p) for p in (0.05, 0.95)) if scalar else (None, None)
        ess = min(_number(worst["ess_bulk"]), _number(worst["ess_tail"]))
        rows.append(
            {
                "name": name if scalar else f"{name} ({size})",
                "meaning": PARAMETERS.get(name, ""),
                "mean": f"{values.mean():.3g}" if scalar else "",
                "q05": f"{low:.3g}" if scalar else "",
                "q95": f"{high:.3g}" if scalar else "",
                "rhat": f"{_number(worst['r_hat']):.3f}",
                "ess_bulk": f"{_number(worst['ess_bulk']):.0f}",
                "ess_tail": f"{_number(worst['ess_tail']):.0f}",
                "order": ess,
            }
        )
    return sorted(rows, key=lambda row: float(row["order"]))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def traces(posterior: Posterior) -> list[dict[str, str]]:
    """Traces and ranks of the least converged scalar variables."""
    names = [row["name"] for row in diagnostics(posterior) if row["name"] in posterior.draws]
    cards = []
    for name in names[:MAX_TRACES]:
        chains = posterior.draws[name].to_numpy()
        chains = chains.reshape(chains.shape[:2])
        cards.append(
            {
                "title": name,
                "svg": figures.trace(
                    f"trace-{name}",
                    chains=chains,
                    description=f"Trace and rank histogram of {name}, {len(chains)} chains.",
                ),
            }
        )
    return cards


def sampler_lead(posterior: Posterior) -> str:
    """What the sampler did, in one line."""
    found = posterior.info["diagnostics"]
    parts = [f"{found['num_chains']} chains of {found['num_draws']} draws"]
    if "divergences" in found:
        parts.append(counted(found["divergences"], "divergent transition"))
    if "mean_acceptance" in found:
        parts.append(f"mean acceptance {found['mean_acceptance']:.2f}")
    if "mean_steps" in found:
        parts.append(f"{found['mean_steps']:.0f} steps a draw")
    if "seconds" in found:
        parts.append(f"{found['seconds']:.0f} s")
    return (
        ", ".join(parts) + ". R-hat compares the chains and should be near 1; ESS is how many "
        "independent draws the quantity is worth. Vectors show their worst entry."
    )


def facts(posterior: Posterior, flops_per_second: float | None = None) -> list[tuple[str, str]]:
    """Data, prior, method, seed and versions; GPU-hours too where a rate is known."""
    info, prior, runs = posterior.info, posterior.prior, posterior.runs
    found = []
    if runs is not None and posterior.design is not None:
        counts = runs.frame["family"].value_counts(sort=False)
        listed = ", ".join(f"{family} ({count})" for family, count in counts.items())
        kept = (
            f"{runs.frame['run_id'].nunique()}, in {len(runs)} accepted rows, of which "
            f"{info['num_runs']} could be used"
        )
        found += [
            ("Runs", f"{kept}, {info['num_diverged']} of them diverged; "
                     f"{info['num_slices']} slices"),
            ("Families, rows", listed),
            ("Compute",
             f"{format_flops(total_flops(runs.frame), flops_per_second)}, each run at its longest"),
            ("Parameters", f"counted as {str(info['param_convention']).replace('_', '-')}"),
            ("Rows set aside", f"{info['num_quarantined']}"),
            ("Data, SHA-256", str(info["data_hash"])),
        ]  # fmt: skip
    held = "; ".join(f"{key}: {value}" for key, value in prior.holds_for.items())
    method = {"bayes": "hierarchical valley model, NUTS", "two-stage": "two-stage least squares",
              "prior": "draws from the prior card"}  # fmt: skip
    found += [
        (
            "Card of the loss law" if info["method"] == "two-stage" else "Prior card",
            f"{prior.name}: {prior.title}" + (f" ({prior.date})" if prior.date else ""),
        ),
        ("Holds for", held),
        ("Card, SHA-256", prior.sha256),
        ("Method", method.get(info["method"], str(info["method"]))),
        ("Seed", str(info["seed"])),
        ("Versions", ", ".join(f"{name} {number}" for name, number in info["versions"].items())),
    ]
    return [(label, text) for label, text in found if text]


def quarantine(posterior: Posterior) -> list[tuple[str, int]]:
    """Broken rules of the rows that were set aside, with their counts."""
    if posterior.runs is None or not len(posterior.runs.quarantine):
        return []
    counts = posterior.runs.quarantine["rule"].value_counts()
    return [(str(rule), int(count)) for rule, count in counts.items()]


# What two-stage predictions take from a card.
_PRICES = ("loss_tokens", "loss_exponent_tokens", "diverged_loss")


def prior_rows(posterior: Posterior) -> list[dict[str, str]]:
    """The card, value by value; those alone that price a loss where least squares uses no more."""
    used = _PRICES if posterior.info["method"] == "two-stage" else posterior.prior.parameters
    return [
        {
            "name": name,
            "meaning": PARAMETERS.get(name, ""),
            "distribution": _distribution(entry),
            "source": entry.source,
            "why": entry.why,
        }
        for name, entry in posterior.prior.parameters.items()
        if name in used
    ]


def _distribution(entry: Distribution) -> str:
    if entry.kind == "normal":
        return f"Normal({entry.location:g}, {entry.scale:g})"
    return f"LogNormal(median {entry.location:g}, log sd {entry.scale:g})"
