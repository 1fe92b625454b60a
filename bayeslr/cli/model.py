"""Verbs on models: fit, predict, report, calibrate."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bayeslr.errors import SpecError, UntrustworthyFit
from bayeslr.units import counted, format_extra_tokens, parse_quantity

if TYPE_CHECKING:
    import pandas as pd

    from bayeslr.posterior import Posterior
    from bayeslr.specs import Target

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
FitArgument = Annotated[Path, typer.Argument(help="Fit folder.", show_default=False)]
TargetsOption = Annotated[
    Path | None,
    typer.Option("--targets", help="Table of targets: .csv, .parquet or .jsonl."),
]
ActiveOption = Annotated[str | None, typer.Option(help="Active parameters, such as 1.3B.")]
TotalOption = Annotated[str | None, typer.Option(help="All parameters [default: as --n-active].")]
TokensOption = Annotated[str | None, typer.Option(help="Training tokens, such as 500B.")]
BatchOption = Annotated[str | None, typer.Option(help="Tokens a step, such as 4M.")]
FamilyOption = Annotated[str | None, typer.Option(help="Family, if the runs have several.")]
PredictionsOption = Annotated[
    Path | None, typer.Option("-o", "--out", help="Predictions table to write.")
]


def _echo(*lines: str, err: bool = False) -> None:
    for line in lines:
        typer.echo(line, err=err)


def fit(
    runs: Annotated[list[Path], typer.Argument(help="Run tables.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Fit folder to write.")] = Path("fit"),
    prior: Annotated[str, typer.Option(help="Prior card: a name or a .toml file.")] = "moe-default",
    method: Annotated[str, typer.Option(help="bayes or two-stage.")] = "bayes",
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 1,
    draws: Annotated[int, typer.Option(min=100, help="Draws a chain, at least.")] = 500,
    check: Annotated[
        bool,
        typer.Option(help="Also ask whether the fit would have predicted its own largest cells."),
    ] = True,
    json: JsonOption = False,
) -> None:
    """Update a prior card with runs; write the fit folder. Exit code 4: not trustworthy."""
    from bayeslr.posterior import require_place
    from bayeslr.priors import load_prior
    from bayeslr.runs import first_reasons, read_runs
    from bayeslr.runs.files import json_text
    from bayeslr.sampling import fit as run_fit
    from bayeslr.verdicts import with_verdicts

    require_place(out)
    card = load_prior(prior)
    table = read_runs(*runs)
    if num := len(table.quarantine):
        _echo(
            f"{counted(num, 'row')} set aside (bayeslr check lists them):",
            first_reasons(table.quarantine),
            err=True,
        )
    posterior = run_fit(
        table, card, seed=seed, method=method, num_draws=draws, progress=sys.stderr.isatty()
    )
    if check and sys.stderr.isatty():
        _echo("Checking: fitted again without the largest cells", err=True)
    posterior = with_verdicts(posterior, holdout=check, seed=seed)
    posterior.save(out)
    if json:
        _echo(json_text({"fit": str(out), **posterior.info}))
    else:
        _echo(*_fit_summary(posterior), f"Fit written to {out}")
    if not posterior.trustworthy:
        raise UntrustworthyFit(str(posterior.info["verdict"]))


def _fit_summary(posterior: Posterior) -> list[str]:
    from bayeslr.verdicts import verdict_lines

    info = posterior.info
    lines = [
        f"{info['num_runs']} runs ({info['num_diverged']} diverged) in {info['num_slices']} slices "
        f"of {', '.join(info['families'])}; card {posterior.prior.name}; "
        f"{info['diagnostics']['seconds']:.0f} s",
        str(info["verdict"]),
    ]
    if info["method"] == "bayes":
        lines += ["Exponents of LR*, posterior (prior) and whose they are:", *_exponents(posterior)]
    else:
        names = [str(name) for name in posterior.draws["regressor"].to_numpy()]
        coefficient = posterior.flat("coefficient")
        r_squared = float(posterior.flat("r_squared").mean())
        lines.append(f"Least squares, R^2 {r_squared:.3f}:")
        lines += [
            # What hardly varies among the slices is left out of the regression, at zero.
            f"  {name:16s} {draws.mean():+.3f} +- {draws.std():.3f}"
            if draws.any() and math.isfinite(draws.mean())
            else f"  {name:16s} not estimated"
            for name, draws in zip(names, coefficient.T, strict=True)
        ]  # fmt: skip
    lines += verdict_lines(info)
    lines += [f"Note: {note}" for note in info["identifiability"]]
    return lines


def _exponents(posterior: Posterior) -> list[str]:
    """A line an exponent of LR* and family: after the runs, before them, and what moved it."""
    from bayeslr.priors import SLOPES
    from bayeslr.sensitivity import VERDICTS, prior_draws, quantity_draws

    before = prior_draws(posterior.prior, posterior.info["centre"])
    families = posterior.info["families"]
    lines = []
    for g, family in enumerate(families):
        if len(families) > 1:
            lines.append(f"  {family}")
        whose = {
            one["name"]: VERDICTS[one["verdict"]] for one in posterior.info["influence"]
            if one["family"] == family
        }  # fmt: skip
        for name in (one for one in SLOPES if one in whose):
            values, card = quantity_draws(posterior, name, g), before[name]
            lines.append(
                f"  {name:16s} {values.mean():+.3f} +- {values.std():.3f}   "
                f"({card.mean():+.3f} +- {card.std():.3f})   {whose[name]}"
            )
    return lines


def predict(
    fit: Annotated[
        Path | None, typer.Argument(help="Fit folder; none with --prior alone.", show_default=False)
    ] = None,
    targets: TargetsOption = None,
    n_active: ActiveOption = None,
    n_total: TotalOption = None,
    tokens: TokensOption = None,
    batch_tokens: BatchOption = None,
    family: FamilyOption = None,
    prior: Annotated[
        str | None, typer.Option(help="Predict from this prior card alone, without a fit.")
    ] = None,
    covariates: Annotated[
        bool,
        typer.Option(
            "--covariates",
            help="Instead of the LR, the best weight decay and LR multipliers, where runs of a "
            "slice differ in them.",
        ),
    ] = False,
    out: PredictionsOption = None,
    json: JsonOption = False,
) -> None:
    """The LR at targets: recommendation, quantiles, expected regret, risk, distance to the data."""
    from bayeslr.covariates import covariate_table
    from bayeslr.posterior import load
    from bayeslr.predict import predict as run_predict
    from bayeslr.predict import prior_posterior
    from bayeslr.runs.files import json_text
    from bayeslr.verdicts import warnings_of

    if (fit is None) == (prior is None):
        raise SpecError("give either a fit folder or --prior CARD (and not both)")
    posterior = load(fit) if fit is not None else prior_posterior(str(prior))
    wanted = wanted_targets(
        targets, n_active=n_active, n_total=n_total, tokens=tokens, batch_tokens=batch_tokens,
        family=family, convention=posterior.info.get("param_convention"),
    )  # fmt: skip
    table = (covariate_table if covariates else run_predict)(posterior, wanted)
    if out is not None:
        write_table(table, out)
    if json:
        _echo(json_text(table))
    else:
        if targets is None:
            _echo(echoed(wanted[0]))
        beside = table if covariates else covariate_table(posterior, wanted)
        _echo(*([] if covariates else prediction_lines(table)), *beside["sentence"])
        if covariates and beside.empty:
            _echo("Runs of a slice differ in LR and seed alone: nothing is known of other values.")
        if out is not None:
            _echo(f"Predictions written to {out}")
    _echo(*(f"Warning: {text}" for text in warnings_of(posterior.info)), err=True)


def wanted_targets(path: Path | None, *, n_active: str | None, n_total: str | None,
                   tokens: str | None, batch_tokens: str | None, family: str | None,
                   convention: str | None) -> list[Target]:  # fmt: skip
    """Targets of a table, or the one of the flags. Raises: SpecError for both or too few flags."""
    from bayeslr.predict import read_targets

    flags = {"n-active": n_active, "tokens": tokens, "batch-tokens": batch_tokens}
    if path is not None:
        if any(value is not None for value in (*flags.values(), n_total, family)):
            raise SpecError("give the targets, family included, by --targets or by flags, not both")
        return read_targets(path)
    if missing := [name for name, value in flags.items() if value is None]:
        raise SpecError(f"--{missing[0]} is missing; or give a table by --targets")
    return [
        target_of(
            str(n_active), n_total, str(tokens), str(batch_tokens), family,
            str(convention or "non_embedding"),
        )
    ]  # fmt: skip


def target_of(n_active: str, n_total: str | None, tokens: str, batch_tokens: str,
            family: str | None, convention: str) -> Target:  # fmt: skip
    """Target of the flags, numbers as they were typed."""
    from bayeslr.specs import Target, require_plausible_counts

    active = parse_quantity(n_active, name="--n-active")
    target = Target(
        target_id="target",
        n_active=active,
        n_total=parse_quantity(n_total, name="--n-total") if n_total is not None else active,
        tokens=parse_quantity(tokens, name="--tokens"),
        batch_tokens=parse_quantity(batch_tokens, name="--batch-tokens"),
        family=family,
        param_convention=convention,
    )
    require_plausible_counts(target)
    return target


def echoed(target: Target) -> str:
    """The target's numbers in full."""
    return (
        f"Target: {target.n_active:,.0f} active of {target.n_total:,.0f} "
        f"{target.param_convention.replace('_', '-')} parameters, {target.tokens:,.0f} tokens, "
        f"batch {target.batch_tokens:,.0f} tokens, {target.flops:.3g} FLOPs"
    )


def prediction_lines(table: pd.DataFrame) -> list[str]:
    """The sentence of a single target, a table of several."""
    if len(table) == 1:
        return [str(table["sentence"].iloc[0])]
    head = ("target", "lr", "5 %", "50 %", "95 %", "regret", "+tokens", "diverge", "outside")
    cells = [head] + [
        (
            str(row["target_id"]),
            *(f"{row[name]:.3g}" for name in ("lr", "lr_q05", "lr_q50", "lr_q95")),
            f"{row['regret_mean']:.4f}", format_extra_tokens(row["extra_tokens"]),
            risk(row["p_diverge"], "{:.1f} %"), f"{row['extrapolation']:.1f}",
        )
        for row in table.to_dict("records")
    ]  # fmt: skip
    first, *widths = (max(len(row[i]) for row in cells) for i in range(len(head)))
    return [
        "  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(row, widths, strict=True))])
        for name, *row in cells
    ]


def risk(probability: float, form: str) -> str:
    """Probability as a percentage; ``unknown`` where the fit does not tell it."""
    return form.format(100 * probability) if math.isfinite(probability) else "unknown"


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Write predictions as the file's name says. Raises: SpecError for another suffix."""
    from bayeslr.runs.files import json_text, write_atomically

    suffix = out.suffix.lower()
    if suffix == ".parquet":
        content = table.to_parquet(None, index=False)
    elif suffix in (".jsonl", ".json"):
        rows = table.to_dict("records")
        content = "".join(f"{json_text(row)}\n" for row in rows).encode()
    elif suffix == ".csv":
        content = table.to_csv(index=False).encode()
    else:
        raise SpecError(f"{out} must end in .csv, .parquet or .jsonl")
    write_atomically(out, content)


def report(
    fit: FitArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write.")] = Path(
        "report.html"
    ),
    targets: TargetsOption = None,
) -> None:
    """One self-contained HTML file: the answer, the valleys, the law, the diagnostics."""
    from bayeslr.posterior import load
    from bayeslr.predict import read_targets
    from bayeslr.report import report as make_report

    wanted = read_targets(targets) if targets is not None else []
    make_report(load(fit), out, targets=wanted)
    _echo(f"Report written to {out}")


def calibrate(
    prior: Annotated[str, typer.Option(help="Prior card.")] = "moe-default",
    tables: Annotated[int, typer.Option(min=2, help="Tables to simulate and fit.")] = 20,
    runs: Annotated[int, typer.Option(min=6, help="Runs a table, about.")] = 60,
    model: Annotated[
        str,
        typer.Option(
            help="valley, two-stage, or a wrong twin: twin-shifted and twin-noisy must fail on 20 "
            "tables; twin-apart is nearly right, and 40 do not catch it."
        ),
    ] = "valley",
    seed: Annotated[int, typer.Option(help="Seed of the simulation.")] = 1,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="HTML file of plots.")] = None,
    json: JsonOption = False,
) -> None:
    """Simulation-based calibration and coverage: are the intervals what they say?"""
    from bayeslr.calibration import calibrate as run_calibration
    from bayeslr.runs.files import json_text, write_atomically

    result = run_calibration(
        prior, num_tables=tables, num_runs=runs, seed=seed, model=model,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    _echo(json_text(result.document()) if json else result.text())
    if out is not None:
        write_atomically(out, result.html().encode())


__all__ = ["calibrate", "fit", "predict", "report"]
