from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bayeslr.errors import BayeslrError, SpecError
from bayeslr.units import (
    bits_to_nats,
    counted,
    flops_in,
    format_flops,
    format_interval,
    format_lr,
    format_quantity,
    gpu_hours,
    parse_count,
    parse_quantity,
    train_flops,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1.3B", 1.3e9),
        ("1.3b", 1.3e9),
        ("1.3 G", 1.3e9),
        ("500e9", 5e11),
        ("4M", 4e6),
        ("12T", 1.2e13),
        ("64k", 64e3),
        ("1_000", 1000),
        ("1,000,000", 1e6),
        (" 7 ", 7),
        (".5M", 5e5),
        ("1e-3", 1e-3),
        (3, 3.0),
        (2.5e9, 2.5e9),
    ],
)
def test_quantities_are_read(text: str | float, number: float) -> None:
    assert parse_quantity(text) == pytest.approx(number, rel=1e-15)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "1.3 billion",
        "1e",
        "0x10",
        "--3",
        "1.3BB",
        "1/2",
        "nan B",
        "1,3B",
        "1,5e18",
        "1,00",
    ],
)
def test_what_is_no_number_is_named_with_its_value(text: str) -> None:
    with pytest.raises(SpecError, match="tokens must be a number") as caught:
        parse_quantity(text, name="tokens")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, "-4M", "0B", math.inf, math.nan, "1e999"])
def test_only_finite_positive_numbers_pass(value: str | float) -> None:
    with pytest.raises(SpecError, match="n_active must be finite and > 0"):
        parse_quantity(value, name="n_active")


def test_a_user_error_is_a_value_error_with_an_exit_code() -> None:
    with pytest.raises(ValueError, match="value") as caught:
        parse_quantity("many")
    assert isinstance(caught.value, BayeslrError)
    assert caught.value.exit_code == 2


def test_counts_are_whole_and_never_zero() -> None:
    assert parse_count("1.5K") == 1500
    assert parse_count(0.2) == 1
    assert isinstance(parse_count("4M"), int)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1_300_000_000, "1.3B"),
        (5e11, "500B"),
        (1.2e13, "12T"),
        (4_194_304, "4.194M"),
        (93_000, "93K"),
        (12, "12"),
        (0.5, "0.5"),
        (3.9e21, "3.9e+21"),
        (1e9 - 1e-3, "1B"),
        (999_960, "1M"),
        (math.inf, "inf"),
    ],
)
def test_quantities_are_printed(number: float, text: str) -> None:
    assert format_quantity(number) == text


@given(st.floats(min_value=1e-3, max_value=1e14))
def test_printing_keeps_four_figures(number: float) -> None:
    assert parse_quantity(format_quantity(number)) == pytest.approx(number, rel=5.1e-4)


def test_flops_and_bits() -> None:
    assert train_flops(1.3e9, 5e11) == pytest.approx(3.9e21)
    assert bits_to_nats(1.0) == pytest.approx(math.log(2))


def test_words_for_people() -> None:
    assert counted(1, "run") == "1 run"
    assert counted(0.0, "divergent transition") == "0 divergent transitions"
    assert format_lr(5.6e-4) == "5.60e-4"
    assert format_lr(math.nan) == "nan"
    assert format_interval(2e-4, 8e-4) == "90 % interval 2.00e-4 to 8.00e-4"


def test_gpu_hours_are_flops_at_a_sustained_rate() -> None:
    assert flops_in(20, 4e14) == 2.88e19
    assert gpu_hours(2.88e19, 4e14) == pytest.approx(20, rel=1e-15)
    assert format_flops(2.88e19) == "2.88e+19 FLOPs"
    assert format_flops(2.88e19, 4e14) == "2.88e+19 FLOPs (20 GPU-hours)"
    assert format_flops(7.2e22, 4e14) == "7.2e+22 FLOPs (50,000 GPU-hours)"
