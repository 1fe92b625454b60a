"""Verbs on prior cards: list, show, check."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from bayeslr.cli.model import echoed, prediction_lines, target_of

priors_app = typer.Typer(
    help="Prior cards: published laws as distributions, with their sources.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
CardArgument = Annotated[str, typer.Argument(help="Name of a card, or a .toml file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


@priors_app.command("list")
def list_cards(json: JsonOption = False) -> None:
    """Names and titles of the shipped cards."""
    from bayeslr.priors import list_priors, load_prior

    cards = [load_prior(name) for name in list_priors()]
    if json:
        typer.echo(json_module.dumps([{"name": c.name, "title": c.title} for c in cards]))
        return
    for card in cards:
        typer.echo(f"{card.name:14s} {card.title}")


@priors_app.command()
def show(
    card: CardArgument,
    n_active: Annotated[str, typer.Option(help="Target: active parameters.")] = "1.3B",
    n_total: Annotated[str | None, typer.Option(help="Target: all parameters.")] = None,
    tokens: Annotated[str, typer.Option(help="Target: training tokens.")] = "500B",
    batch_tokens: Annotated[str, typer.Option(help="Target: tokens a step.")] = "4M",
    json: JsonOption = False,
) -> None:
    """Every prior with its source, and the LR interval that the card implies for a target."""
    from bayeslr.predict import predict, prior_posterior
    from bayeslr.priors import PARAMETERS, load_prior
    from bayeslr.runs.files import json_text

    prior = load_prior(card)
    if n_total is None:
        share = prior.reference["n_total"] / prior.reference["n_active"]
        target = target_of(n_active, None, tokens, batch_tokens, None, "non_embedding")
        n_total = str(target.n_active * share)
    target = target_of(n_active, n_total, tokens, batch_tokens, None, "non_embedding")
    table = predict(prior_posterior(prior), [target])
    if json:
        document: dict[str, Any] = {
            "name": prior.name,
            "title": prior.title,
            "sha256": prior.sha256,
            "reference": dict(prior.reference),
            "parameters": {
                name: {"distribution": p.kind, "location": p.location, "scale": p.scale,
                       "unit": p.unit, "source": p.source, "why": p.why}
                for name, p in prior.parameters.items()
            },
            "implied": table.to_dict("records")[0],
        }  # fmt: skip
        typer.echo(json_text(document))
        return
    typer.echo(f"{prior.name}: {prior.title} ({prior.date}; sha256 {prior.sha256[:12]})")
    typer.echo("Holds for: " + ", ".join(f"{k} {v}" for k, v in prior.holds_for.items()))
    typer.echo("Reference: " + ", ".join(f"{k} {v:.3g}" for k, v in prior.reference.items()))
    for name, p in prior.parameters.items():
        low, high = p.interval(0.9)
        typer.echo(f"\n{name}: {PARAMETERS[name]}")
        typer.echo(
            f"  {p.kind} {p.location:g}, {p.scale:g} ({p.unit}); 90 %: {low:.3g} to {high:.3g}"
        )
        typer.echo(f"  source: {p.source}")
        if p.why:
            typer.echo(f"  why: {p.why}")
    typer.echo("\n" + echoed(target))
    typer.echo("\n".join(prediction_lines(table)))


@priors_app.command()
def check(card: CardArgument, json: JsonOption = False) -> None:
    """Read a card, and say what is wrong with it."""
    from bayeslr.priors import load_prior

    prior = load_prior(card)
    if json:
        facts = {
            "name": prior.name, "title": prior.title, "sha256": prior.sha256,
            "parameters": len(prior.parameters),
        }  # fmt: skip
        typer.echo(json_module.dumps(facts))
        return
    typer.echo(f"{prior.name} is in order: {len(prior.parameters)} parameters, {prior.title}")
