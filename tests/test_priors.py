"""Prior cards: they load, draw, name their sources, and refuse what is broken."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest

from bayeslr.errors import SpecError
from bayeslr.predict import predict, prior_posterior
from bayeslr.priors import NORMAL, PARAMETERS, Prior, list_priors, load_prior
from bayeslr.sampling import SCALES
from bayeslr.specs import Target

CARDS = (
    "dense-default", "moe-default", "no-steplaw", "steplaw", "transfer", "weak", "zhou2026",
)  # fmt: skip
ENTRY = """
[parameters.lr_tokens]
distribution = "normal"
mean = 0.1
sd = 0.15
unit = "1 (exponent)"
source = "a paper, table 1"
"""


def write(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def test_the_shipped_cards_are_there() -> None:
    assert set(CARDS) <= set(list_priors())


@pytest.mark.parametrize("name", list_priors())
def test_every_card_loads_and_each_value_names_unit_and_source(name: str) -> None:
    card = Prior.load(name)
    assert card.name == name
    assert card.title
    assert card.date
    assert list(card.parameters) == list(PARAMETERS)
    for parameter in card.parameters.values():
        assert parameter.unit.strip(), parameter.name
        assert parameter.source.strip(), parameter.name


@pytest.mark.parametrize("name", list_priors())
def test_draws_of_every_card_fall_where_its_intervals_say(name: str) -> None:
    card, num_draws = load_prior(name), 4000
    for parameter in card.parameters.values():
        draws = parameter.draw(np.random.default_rng(1), num_draws)
        assert np.isfinite(draws).all()
        assert parameter.support == "real" or (draws > 0).all()
        low, high = parameter.interval(0.9)
        inside = float(np.mean((low <= draws) & (draws <= high)))
        # 5 standard errors: fails 1 in 1.7 million parameters if correct.
        bound = 5 * math.sqrt(0.9 * 0.1 / num_draws)
        assert abs(inside - 0.9) < bound, parameter.name
        # The twin: an interval of mass 0.8 is told from one of mass 0.9.
        low, high = parameter.interval(0.8)
        assert abs(float(np.mean((low <= draws) & (draws <= high))) - 0.9) > bound


def test_draws_repeat_with_their_seed() -> None:
    parameter = load_prior("weak")["skew"]
    first, again, other = (parameter.draw(np.random.default_rng(s), 5) for s in (1, 1, 2))
    assert (first == again).all()
    assert not (first == other).any()


def test_runs_that_a_card_is_not_for_are_named() -> None:
    table = pd.DataFrame({
        "parametrization": ["mup", None], "optimizer": ["AdamW", "muon"],
        "schedule": [None, "cosine"], "param_convention": ["non_embedding"] * 2,
    })  # fmt: skip
    (told,) = load_prior("moe-default").contradictions(table)
    assert "is for parametrization sp, optimizer adamw, and runs here have mup, muon:" in told
    assert load_prior("moe-default").contradictions(table.iloc[:0]) == []
    (told,) = load_prior("transfer").contradictions(table)
    assert "mup:" not in told.partition("runs here")[2]


def test_log_reference_is_natural() -> None:
    card = load_prior("moe-default")
    assert card.log_reference["log_sparsity"] == pytest.approx(math.log(1.3 / 12))
    assert card.log_reference["log_tokens"] == pytest.approx(math.log(500e9))


def test_an_extending_card_replaces_what_it_names_and_keeps_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, f'extends = "moe-default"\n{ENTRY.replace("0.15", "0.05")}')
    card, base = load_prior(path), load_prior("moe-default")
    assert card["lr_tokens"].scale == 0.05
    assert card["lr_n_active"] == base["lr_n_active"]
    assert card.reference == base.reference
    assert card.sha256 != base.sha256


def test_the_hash_follows_the_card_and_the_one_it_extends(tmp_path: Path) -> None:
    base = write(tmp_path, Path(str(load_prior("moe-default").path)).read_text(), "base")
    child = write(tmp_path, 'extends = "base"\n', "child")
    before = load_prior(child).sha256
    base.write_text(base.read_text().replace("mean = -0.45", "mean = -0.40"))
    assert load_prior(child).sha256 != before


def test_a_missing_card_lists_the_cards() -> None:
    with pytest.raises(SpecError, match=r"no prior card 'nope'.*moe-default.*weak"):
        load_prior("nope")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("= 3", r"'mine' is not valid TOML"),
        ('extends = "moe-default"\ncolour = "red"\n', r"unknown key 'colour'; allowed: .*extends"),
        ('extends = "moe-default"\n[parameters.lr_magic]\n', r"'lr_magic'.*no such parameter"),
        (ENTRY, r"parameter 'lr_intercept' is missing \(ln LR"),
        ("extends = 'moe-default'" + ENTRY.replace("source", "sauce"), r"unknown key 'sauce'"),
        ("extends = 'moe-default'" + ENTRY.replace('source = "a paper, table 1"', ""),
         r"'lr_tokens': source is missing; each value names its unit and its source"),
        ("extends = 'moe-default'" + ENTRY.replace('unit = "1 (exponent)"', ""),
         r"unit is missing"),
        ("extends = 'moe-default'" + ENTRY.replace("normal", "cauchy"),
         r"distribution must be normal, got 'cauchy'"),
        ("extends = 'moe-default'" + ENTRY.replace("sd = 0.15", "sd = 0"), r"sd must be > 0"),
        ("extends = 'moe-default'" + ENTRY.replace("sd = 0.15", "sd = -1"), r"sd must be > 0"),
        ("extends = 'moe-default'" + ENTRY.replace("mean = 0.1", "mean = nan"), r"both finite"),
        ("extends = 'moe-default'"
         + ENTRY.replace("normal", "lognormal").replace("mean = 0.1", "median = -0.1")
         .replace("sd =", "log_sd =").replace("lr_tokens", "skew"),
         r"median of a lognormal must be > 0, got -0.1"),
        ("extends = 'moe-default'\n[reference]\ntokens = -5\n", r"\[reference\]: tokens must be"),
        ("extends = 'moe-default'\n[reference]\ntokens = 'many'\n", r"tokens must be a number"),
        ("extends = 'moe-default'\n[reference]\ntokens = inf\n", r"tokens must be finite and > 0"),
        ("extends = 'moe-default'\n[reference]\nn_active = 12e9\nn_total = 1.3e9\n",
         r"n_active \(1.2e\+10\) must not exceed n_total"),
        ("extends = 'moe-default'\nparameters = 3\n", r"parameters must be a table, got 3"),
        ("extends = 'moe-default'\n[parameters]\nlr_tokens = 0.1\n", r"must be a table with"),
        ("extends = 'nowhere'", r"no prior card 'nowhere'"),
    ],
)  # fmt: skip
def test_a_broken_card_is_told_what_and_where(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        load_prior(write(tmp_path, text))


@pytest.mark.parametrize("name", ["lr_family_sd", "loss_irreducible", "curvature_intercept"])
def test_what_is_used_in_logs_cannot_be_normal(tmp_path: Path, name: str) -> None:
    text = "extends = 'moe-default'" + ENTRY.replace("lr_tokens", name)
    told = (
        rf"'mine', parameter '{name}': distribution must be lognormal, got 'normal'; "
        r"it is positive and used in logs: give median and log_sd"
    )
    with pytest.raises(SpecError, match=told):
        load_prior(write(tmp_path, text))


@pytest.mark.parametrize("name", ["lr_tokens", "edge_batch", "noise_side"])
def test_what_may_have_either_sign_cannot_be_lognormal(tmp_path: Path, name: str) -> None:
    entry = ENTRY.replace("normal", "lognormal").replace("mean =", "median =")
    text = "extends = 'moe-default'" + entry.replace("sd =", "log_sd =").replace("lr_tokens", name)
    told = (
        rf"'{name}': distribution must be normal, got 'lognormal'; "
        r"it may have either sign: give mean and sd"
    )
    with pytest.raises(SpecError, match=told):
        load_prior(write(tmp_path, text))


def test_sds_are_lognormal_and_what_the_model_samples_in_logs_is_too() -> None:
    assert set(NORMAL) < set(PARAMETERS)
    assert not [name for name in NORMAL if name.endswith("_sd")]
    assert not set(NORMAL) & set(SCALES)


@pytest.mark.parametrize("name", list_priors())
def test_cards_and_code_tell_one_price_of_divergence(name: str) -> None:
    """Twice the tokens on top of the regret of the LR, each at most the card's bound."""
    assert "trained again" in load_prior(name)["diverged_loss"].why
    assert "training it again" in PARAMETERS["diverged_loss"]


@pytest.mark.parametrize(
    "entry", ['mean = "much"', "mean = true", "mean = [1]"], ids=["text", "bool", "list"]
)
def test_text_where_a_number_belongs(tmp_path: Path, entry: str) -> None:
    text = "extends = 'moe-default'" + ENTRY.replace("mean = 0.1", entry)
    with pytest.raises(SpecError, match=r"'lr_tokens'.*mean"):
        load_prior(write(tmp_path, text))


def test_cards_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path, 'extends = "second"\n', "first")
    write(tmp_path, 'extends = "first"\n', "second")
    with pytest.raises(SpecError, match=r"extends itself through .*first.*second"):
        load_prior(first)


def test_a_parameter_that_no_card_holds_is_named() -> None:
    with pytest.raises(SpecError, match=r"'weak' has no parameter 'lr_magic'"):
        load_prior("weak")["lr_magic"]


def test_the_evidence_alone_holds_the_laws_of_similar_recipes() -> None:
    """Six laws of similar recipes lie between 4.55e-4 and 7.47e-4 at this target."""
    planned = Target(
        target_id="planned", n_active=1.3e9, n_total=12e9, tokens=500e9, batch_tokens=4e6
    )
    row = predict(prior_posterior("moe-default"), [planned]).iloc[0]
    # 4,000 draws place the median within 0.02 in ln LR; the six span 0.5.
    assert 4.55e-4 < row["lr_q50"] < 7.47e-4
    assert row["lr_q95"] / row["lr_q05"] <= 8.0
    assert row["lr_q05"] < 4.55e-4
    assert row["lr_q95"] > 7.47e-4
    # The twin: without the small sizes' exponents the weak card cannot be as narrow.
    weak = predict(prior_posterior("weak"), [planned]).iloc[0]
    assert weak["lr_q95"] / weak["lr_q05"] > row["lr_q95"] / row["lr_q05"]


def test_the_implied_interval_is_that_of_the_card() -> None:
    """At the reference and the best batch, ln LR* is the intercept and its misfits."""
    card = load_prior("moe-default")
    best = math.exp(card["best_batch_intercept"].location)
    planned = Target(target_id="r", batch_tokens=best, **card.reference)
    row = predict(prior_posterior(card), [planned]).iloc[0]
    location, scale = card["lr_intercept"].location, card["lr_intercept"].scale
    # Off a best batch that is not known LR* is lower: 0.04 of the median. The rest is 3.5 standard
    # errors of 2,000 draws.
    assert math.log(row["lr_q50"]) == pytest.approx(location - 0.04, abs=0.06)
    half = NormalDist().inv_cdf(0.95) * scale
    assert math.log(row["lr_q95"] / row["lr_q05"]) > 2 * half


@pytest.mark.parametrize("name", list_priors())
def test_every_card_states_the_loss_law_at_its_own_reference(name: str) -> None:
    """Chinchilla's refit (2404.10102): 482.01 N^-0.3478 and 2085.43 D^-0.3658."""
    card = load_prior(name)
    by_size = 482.01 * card.reference["n_active"] ** -0.3478
    by_tokens = 2085.43 * card.reference["tokens"] ** -0.3658
    assert card["loss_n_active"].location == pytest.approx(by_size, rel=0.02)
    assert card["loss_tokens"].location == pytest.approx(by_tokens, rel=0.02)
    # Carried to data of another scale it stays near the refit: 60M parameters, 2B tokens.
    carried = (
        card.log_loss_part("n_active", math.log(6e7)),
        card.log_loss_part("tokens", math.log(2e9)),
    )
    refit = math.log(482.01 * 6e7**-0.3478), math.log(2085.43 * 2e9**-0.3658)
    assert carried == pytest.approx(refit, abs=0.3)
