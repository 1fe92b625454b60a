"""The planner's report: one self-contained HTML file, made from a posterior and its targets."""

from __future__ import annotations

import datetime
import json
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bayeslr import __version__
from bayeslr.posterior import Posterior, require_posterior
from bayeslr.predict import predict, target_list
from bayeslr.report import checks, provenance, scaling, slices, stability, targets
from bayeslr.report.figures import LAW_DASHES
from bayeslr.report.published import PUBLISHED_LAWS
from bayeslr.report.rendering import render_page
from bayeslr.runs import write_atomically
from bayeslr.specs import Target, as_path
from bayeslr.units import format_lr

__all__ = ["report"]


def report(
    posterior: Posterior,
    path: str | Path,
    *,
    targets: Iterable[Target] | None = None,
    validation: Sequence[str] = (),
    flops_per_second: float | None = None,
) -> Path:
    """Write the report of a fit as one HTML file that needs nothing else.

    Parameters
    ----------
    posterior
        A fit, or the posterior of a prior card alone.
    path
        File to write, all or nothing.
    targets
        Runs to plan; the first one is in the figures. Without any, an example: ten times the
        compute of the largest run.
    validation
        Lines that say what came of training the target for real, if that was done.
    flops_per_second
        What one device sustains: GPU-hours then stand beside FLOPs.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    SpecError
        ``posterior`` is none.
    DataError
        A target counts parameters otherwise than the runs.
    StorageError
        The file cannot be written.
    """
    require_posterior(posterior)
    path = as_path(path)
    page = render(posterior, targets, validation, flops_per_second)
    write_atomically(path, page.encode("utf-8"))
    return path


def render(
    posterior: Posterior,
    given: Iterable[Target] | None = None,
    validation: Sequence[str] = (),
    flops_per_second: float | None = None,
) -> str:
    """The report's HTML."""
    chosen = [] if given is None else target_list(given)
    return render_page("bayeslr.report", _page(posterior, chosen, validation, flops_per_second))


def _page(posterior: Posterior, given: list[Target], validation: Sequence[str],
          flops_per_second: float | None) -> dict[str, Any]:  # fmt: skip
    """Everything that the template shows."""
    posterior = checks.checked(posterior)
    chosen = given or [targets.example_target(posterior)]
    predictions: list[dict[str, Any]] = predict(posterior, chosen).to_dict("records")  # type: ignore[assignment]
    first, row = chosen[0], predictions[0]
    rows, (strip_low, strip_high) = targets.target_rows(posterior, chosen, predictions)
    all_slices = slices.read_slices(posterior)
    exponents = scaling.exponent_cards(posterior, first)
    has_design = posterior.design is not None
    pictured = slices.nearest(posterior.design, all_slices, first) if posterior.design else []
    title = (
        f"Peak LR for {first.target_id}: {format_lr(row['lr'])}"
        if len(chosen) == 1
        else f"Peak LR for {len(chosen)} targets"
    )
    log_edge = stability.slice_edges(posterior)
    return {
        "version": __version__,
        "written_on": datetime.date.today().isoformat(),
        "title": title,
        "eyebrow": _eyebrow(posterior, bool(given)),
        "sentence": row["sentence"],
        "sentences": [one["sentence"] for one in predictions],
        "tiles": targets.tiles(posterior, row) if len(chosen) == 1 else [],
        "verdict": provenance.verdict(posterior, chosen, predictions),
        "checks": checks.marks(posterior.info),
        "targets": rows,
        "strip_low": strip_low,
        "strip_high": strip_high,
        "focus": targets.choice(posterior, first, row["lr"]),
        "covariates": targets.covariate_rows(posterior, chosen),
        "validation": list(validation),
        "scales": scaling.scale_figures(posterior, first, row, all_slices),
        "scale_lead": _scale_lead(posterior, first),
        "scale_legend": _scale_legend(has_design),
        "laws": scaling.published_rows(first, row["lr"]),
        "valleys": slices.valley_cards(posterior, pictured),
        "valley_lead": _valley_lead(len(pictured), len(all_slices)),
        "valley_legend": _valley_legend(posterior),
        "slices": slices.slice_rows(posterior, all_slices, log_edge),
        "training": stability.training(posterior, log_edge),
        "exponents": exponents,
        "exponent_sources": scaling.exponent_sources(exponents),
        "exponent_title": _exponent_title(posterior),
        "exponent_lead": _exponent_lead(posterior),
        "exponent_legend": _exponent_legend(posterior),
        "influence": checks.influence_rows(posterior.info),
        "misfit": checks.misfit(posterior),
        "diagnostics": provenance.diagnostics(posterior),
        "sampler_lead": provenance.sampler_lead(posterior) if _sampled(posterior) else "",
        "traces": provenance.traces(posterior),
        "facts": provenance.facts(posterior, flops_per_second),
        "quarantine": provenance.quarantine(posterior),
        "priors": provenance.prior_rows(posterior),
        "prior_title": "The card's values that least squares uses, with their sources"
        if posterior.info["method"] == "two-stage"
        else "The prior, value by value, with its sources",
        "numbers": json.dumps(
            [{key: _json_number(value) for key, value in one.items()} for one in predictions],
            indent=1, allow_nan=False,
        ).replace("<", "\\u003c"),
    }  # fmt: skip


def _json_number(value: Any) -> Any:
    """JSON knows neither infinity nor NaN."""
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _sampled(posterior: Posterior) -> bool:
    return "variables" in posterior.info["diagnostics"]


def _eyebrow(posterior: Posterior, has_targets: bool) -> list[str]:
    info = posterior.info
    told = []
    if posterior.design is not None and posterior.runs is not None:
        families = info["families"]
        num_runs = posterior.runs.frame["run_id"].nunique()
        told.append(
            f"{num_runs} runs, {info['num_slices']} slices"
            if num_runs == len(posterior.runs)
            else f"{num_runs} runs measured {len(posterior.runs)} times, "
            f"{info['num_slices']} slices"
        )
        told.append(families[0] if len(families) == 1 else f"{len(families)} families")
    told.append(f"prior card {posterior.prior.name}")
    if not has_targets:
        told.append("no target was given: an example")
    return told


def _scale_lead(posterior: Posterior, target: Target) -> str:
    beyond = "A law that no figure shows lies beyond its frame; the table below has them all."
    if posterior.design is None:
        return f"What the published evidence says about the optimal LR around the target. {beyond}"
    family = f" of {target.family}" if target.family else ""
    return (
        f"The optimal LR{family} at sizes and horizons between the runs and {target.target_id}. "
        "The bands are for a new run: they hold what is peculiar to a shape and a slice. "
        f"{beyond}"
    )


def _scale_legend(has_runs: bool) -> list[tuple[Any, str]]:
    entries: list[tuple[Any, str]] = [
        ("bands", "optimum of a new run, 50 and 90 %"),
        ("choice", "target: recommended LR and intervals"),
    ]
    if has_runs:
        entries += [("optimum", "optimum of a slice, 90 %"), ("outside", "beyond the runs")]
    for number, (law, dash) in enumerate(zip(PUBLISHED_LAWS, LAW_DASHES, strict=True), 1):
        line = {"name": f"law{number}", "dash": " ".join(map(str, dash))}
        entries.append((line, f"{law.label}, {law.source}"))
    return entries


def _valley_lead(num_pictured: int, num_slices: int) -> str:
    which = (
        "Every slice with at least two runs."
        if num_pictured == num_slices
        else f"{num_pictured} of {num_slices} slices: those nearest to the target."
    )
    return f"Loss against LR at one shape, token count and batch. {which}"


def _valley_legend(posterior: Posterior) -> list[tuple[str, str]]:
    runs = [("run", "a run"), ("above", "a run above the frame"), ("diverged", "a diverged run")]
    if posterior.info["method"] == "two-stage":
        return [*runs, ("star", "bottom of the parabola through the runs about the best")]
    return [
        *runs, ("bands", "posterior of the loss, 50 and 90 %"), ("star", "optimum LR, 90 %"),
    ]  # fmt: skip


def _exponent_title(posterior: Posterior) -> str:
    if posterior.design is None:
        return "Exponents: the prior"
    if "coefficient" in posterior.draws:
        return "Exponents of the regression"
    return "Exponents: prior against posterior"


def _exponent_lead(posterior: Posterior) -> str:
    if posterior.design is None:
        return "What the prior card holds, from the published evidence."
    if "coefficient" in posterior.draws:
        return "Least-squares coefficients; this method uses no prior."
    return (
        "How each quantity scales, before and after the runs. Where both curves are alike, the "
        "answer rests on the published evidence."
    )


def _exponent_legend(posterior: Posterior) -> list[tuple[Any, str]]:
    entries: list[tuple[Any, str]] = []
    if "coefficient" not in posterior.draws:
        entries.append(("prior", "prior"))
    if posterior.design is not None:
        draws = "estimate" if "coefficient" in posterior.draws else "posterior"
        entries.append(("posterior", f"{draws}, with 50 and 90 % intervals"))
    return [*entries, ("published", "published values")]


class _CallableModule(types.ModuleType):
    """``bayeslr.report`` names a public function and this package: the package stands in for it.

    The import system binds a submodule to its name in the parent, and so would hide the function
    from everyone who says ``bayeslr.report(...)`` after something else has imported this package.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
