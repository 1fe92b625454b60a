"""Verbs on run tables: import them from foreign formats, and check them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayeslr.errors import SpecError
from bayeslr.units import counted, format_quantity

if TYPE_CHECKING:
    import pandas as pd

    from bayeslr.importers.mapping import Preview
    from bayeslr.runs import RunTable

import_app = typer.Typer(
    help="Import runs from a foreign format into a run table.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

PathArgument = Annotated[Path, typer.Argument(help="File to import.", show_default=False)]
OutOption = Annotated[
    Path,
    typer.Option("-o", "--out", help="Run table to write: .parquet, .csv or .jsonl."),
]
FamilyOption = Annotated[
    str | None, typer.Option("--family", help="Family of all these runs.", show_default=False)
]
MapOption = Annotated[
    list[str],
    typer.Option(
        "--map",
        help="Where a column comes from: lr=learning_rate, tokens=tokens_b*1e9. Repeatable.",
        default_factory=list,
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="What all runs share: param_convention=total, n_active=1.3B. Repeatable.",
        default_factory=list,
        show_default=False,
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be imported; write nothing.")
]
DEFAULT_OUT = Path("runs.parquet")


@import_app.command()
def steplaw(
    path: PathArgument,
    out: OutOption = DEFAULT_OUT,
    family: FamilyOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Raw table of the Step Law project, dense or MoE; diverged runs are recognised."""
    _import("steplaw", path, out, dry_run, family=family)


@import_app.command()
def csv(
    path: PathArgument,
    mapping: MapOption,
    constants: SetOption,
    out: OutOption = DEFAULT_OUT,
    family: FamilyOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Any table with one run a row; columns are mapped by flags."""
    if dry_run:
        from bayeslr.importers.csv import preview

        seen = preview(path, family=family, mapping=mapping, constants=constants)
        _echo_preview(path, seen)
        if seen.missing:
            return
    _import("csv", path, out, dry_run, family=family, mapping=mapping, constants=constants)


@import_app.command()
def wandb(
    path: PathArgument,
    mapping: MapOption,
    constants: SetOption,
    out: OutOption = DEFAULT_OUT,
    family: FamilyOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Runs table of Weights & Biases, downloaded as CSV."""
    _import("wandb", path, out, dry_run, family=family, mapping=mapping, constants=constants)


@import_app.command()
def mlflow(
    path: PathArgument,
    mapping: MapOption,
    constants: SetOption,
    out: OutOption = DEFAULT_OUT,
    family: FamilyOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Runs of MLflow: CSV of its page, or of search_runs()."""
    _import("mlflow", path, out, dry_run, family=family, mapping=mapping, constants=constants)


@import_app.command()
def optuna(
    path: Annotated[
        str,
        typer.Argument(help="File, sqlite:/// or journal:// URL, or folder.", show_default=False),
    ],
    mapping: MapOption,
    constants: SetOption,
    out: OutOption = DEFAULT_OUT,
    family: FamilyOption = None,
    study: Annotated[
        str | None, typer.Option(help="Study to read, if the storage has several.")
    ] = None,
    dry_run: DryRunOption = False,
) -> None:
    """Trials of Optuna: CSV of trials_dataframe(), a storage's file, or a sweep's folder."""
    _import(
        "optuna", path, out, dry_run,
        family=family, mapping=mapping, constants=constants, study=study,
    )  # fmt: skip


@import_app.command()
def tensorboard(
    path: PathArgument,
    mapping: MapOption,
    constants: SetOption,
    out: OutOption = DEFAULT_OUT,
    family: FamilyOption = None,
    tag: Annotated[
        str | None, typer.Option(help="Scalar that is the loss, if the file has several.")
    ] = None,
    dry_run: DryRunOption = False,
) -> None:
    """One scalar of one run, downloaded as CSV from TensorBoard; --set says the rest."""
    _import(
        "tensorboard", path, out, dry_run,
        family=family, mapping=mapping, constants=constants, tag=tag,
    )  # fmt: skip


def check(
    runs: Annotated[
        list[Path], typer.Argument(help="Run tables: .csv, .parquet, .jsonl.", show_default=False)
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is in a run table, what is quarantined and why, and what cannot be identified."""
    from bayeslr.runs import describe, first_reasons, identifiability, read_runs
    from bayeslr.runs.files import json_text

    table = read_runs(*runs)
    quarantine = table.quarantine
    facts, blind_spots = describe(table), identifiability(table)
    if json:
        facts |= {
            "warnings": list(table.warnings),
            "quarantine": quarantine,
            "cannot_identify": blind_spots,
        }
        typer.echo(json_text(facts, indent=2))
        return
    typer.echo(
        f"{facts['source']}: {counted(facts['rows'], 'row')}, {format_quantity(facts['flops'])} "
        f"FLOPs, parameters counted as {facts['param_convention']}"
    )
    for family in facts["families"]:
        typer.echo("\n" + _family_lines(family))
    typer.echo(f"\nQuarantined: {len(quarantine) or 'nothing'}")
    if len(quarantine):
        typer.echo(first_reasons(quarantine, limit=10))
    typer.echo("\nWhat these runs cannot tell:" + ("" if blind_spots else " nothing to note"))
    for sentence in blind_spots:
        typer.echo(f"  - {sentence}")
    _echo_warnings(table)


def _import(format_name: str, path: Path | str, out: Path, dry_run: bool, **options: Any) -> None:
    from bayeslr import importers
    from bayeslr.importers.mapping import MissingColumns
    from bayeslr.runs import quarantine_path, write_atomically

    if not dry_run and out.exists() and Path(path).exists() and out.samefile(path):
        raise SpecError(
            f"-o {out} is the file that is imported; name another, to keep what it says"
        )
    try:
        table = importers.read(format_name, str(path), **options)
    except MissingColumns as error:
        if not dry_run:
            raise
        _echo_preview(path, error.preview)
        return
    typer.echo(f"{path}: {counted(len(table), 'row')} accepted")
    for name, rows in table.frame.groupby("family", sort=False):
        counts = ", ".join(f"{n} {s}" for s, n in rows["status"].value_counts().items())
        typer.echo(f"  {name}: {counts}")
    _echo_warnings(table)
    rejected = quarantine_path(out)
    if not dry_run:
        table.write(out)
        if len(table.quarantine):
            write_atomically(rejected, table.quarantine.to_csv(index=False).encode())
        else:
            rejected.unlink(missing_ok=True)  # that of an earlier import to the same place
    if len(table.quarantine):
        _echo_quarantine(table.quarantine, None if dry_run else rejected)
    typer.echo("dry run: nothing was written" if dry_run else f"written to {out}")


def _echo_preview(path: Path | str, seen: Preview) -> None:
    typer.echo(f"{path}: dry run, nothing is written\n")
    for ours, theirs in seen.mapped.items():
        typer.echo(f"  {ours} <- {theirs}")
    if not seen.head.empty:
        typer.echo("\n" + seen.head.to_string(index=False))
    if seen.missing:
        typer.echo(f"\nmissing: {', '.join(seen.missing)}")
        for proposal in seen.proposals:
            typer.echo(f"  perhaps --map {proposal}")
        typer.echo("  values that all runs share: --set column=value")
    else:
        typer.echo("\nno column is missing")


def _echo_quarantine(quarantine: pd.DataFrame, path: Path | None) -> None:
    from bayeslr.runs import first_reasons

    where = f", all of them in {path}" if path else ""
    num = len(quarantine)
    typer.echo(f"{counted(num, 'row')} quarantined{where}:", err=True)
    typer.echo(first_reasons(quarantine), err=True)


def _echo_warnings(table: RunTable) -> None:
    for warning in table.warnings:
        typer.echo(f"note: {warning}", err=True)


def _family_lines(family: dict[str, Any]) -> str:
    counts = ", ".join(f"{n} {status}" for status, n in family["status"].items())
    lines = [
        f"family {family['family']} ({', '.join(family['arch'])}): "
        f"{counted(family['runs'], 'run')}; {counts}",
        f"  shapes: {family['shapes']}; cells (shape x tokens): {family['cells']}; "
        f"slices (cell x batch): {family['slices']}",
    ]
    if family["lrs_per_slice"]:
        low, high = family["lrs_per_slice"]
        lines.append(f"  LRs a slice: {low:.0f}" + (f" to {high:.0f}" if high > low else ""))
    for name in ("n_active", "n_total", "tokens", "batch_tokens", "lr", "loss"):
        if family[name] is None:
            continue
        text = (lambda x: f"{x:.4g}") if name in ("lr", "loss") else format_quantity
        low, high = family[name]
        lines.append(f"  {name}: {text(low)}" + (f" to {text(high)}" if high > low else ""))
    for name, values in family["covariates"].items():
        shown = ", ".join(f"{v:.4g}" for v in values[:8]) + (", ..." if len(values) > 8 else "")
        lines.append(f"  {name}, within slices: {shown}")
    lines.append(f"  compute: {format_quantity(family['flops'])} FLOPs")
    return "\n".join(lines)
