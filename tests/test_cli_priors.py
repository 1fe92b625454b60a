"""The verbs on prior cards: list, show, check."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from bayeslr.cli.priors import priors_app
from bayeslr.errors import SpecError
from bayeslr.priors import PARAMETERS, list_priors


def priors(*words: object) -> str:
    """Standard output of ``bayeslr priors ...``, which must succeed."""
    out = io.StringIO()
    with redirect_stdout(out):
        priors_app([str(word) for word in words], standalone_mode=False)
    return out.getvalue()


def test_list_names_every_card() -> None:
    text = priors("list")
    assert [line.split()[0] for line in text.splitlines()] == list_priors()
    cards = json.loads(priors("list", "--json"))
    assert [card["name"] for card in cards] == list_priors()
    assert all(card["title"] for card in cards)


def test_show_gives_each_parameter_its_source_and_the_lr_that_follows() -> None:
    text = priors("show", "moe-default")
    for name in PARAMETERS:
        assert f"\n{name}: " in text
    assert text.count("  source: ") == len(PARAMETERS)
    assert "1,300,000,000 active of 12,000,000,000" in text
    assert "500,000,000,000 tokens" in text
    assert "90 % probability" in text


def test_show_answers_for_the_target_that_is_asked_for() -> None:
    far = json.loads(priors("show", "weak", "--json", "--n-active", "70B", "--tokens", "15T"))
    near = json.loads(priors("show", "weak", "--json", "--n-active", "100M", "--tokens", "2B"))
    assert far["implied"]["lr_q50"] < near["implied"]["lr_q50"]
    assert set(far["parameters"]) == set(PARAMETERS)
    assert all(p["source"] and p["unit"] for p in far["parameters"].values())


def test_check_says_in_order_or_what_is_wrong(tmp_path: Path) -> None:
    assert "moe-default is in order" in priors("check", "moe-default")
    facts = json.loads(priors("check", "moe-default", "--json"))
    assert (facts["name"], facts["parameters"]) == ("moe-default", len(PARAMETERS))
    broken = tmp_path / "mine.toml"
    broken.write_text('extends = "moe-default"\ncolour = "red"\n')
    with pytest.raises(SpecError, match="unknown key 'colour'"):
        priors("check", broken)
    with pytest.raises(SpecError, match="the shipped cards are"):
        priors("check", "nope")
