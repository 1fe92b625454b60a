"""Mean functions: limits, slopes, derivatives, and the same on tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytensor.tensor as pt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bayeslr.laws import batch_knee, cubic_bowl, linex, softplus, valley_excess

U = np.linspace(-3, 3, 61)


@pytest.mark.parametrize("bowl", [linex, cubic_bowl])
def test_a_bowl_is_half_a_square_without_skew(bowl: Any) -> None:
    np.testing.assert_allclose(bowl(U, 1e-4), U**2 / 2, rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize("bowl", [linex, cubic_bowl])
def test_a_bowl_has_its_skew_as_third_derivative(bowl: Any) -> None:
    step, skew = 1e-2, 0.7
    a, b, c, d = (bowl(k * step, skew) for k in (-1.5, -0.5, 0.5, 1.5))
    assert (d - 3 * c + 3 * b - a) / step**3 == pytest.approx(skew, rel=1e-3)


def test_linex_is_linear_far_below_and_exponential_above() -> None:
    skew = 2.0
    assert linex(-21.0, skew) - linex(-20.0, skew) == pytest.approx(1 / skew, rel=1e-9)
    assert linex(8.0, skew) / linex(7.0, skew) == pytest.approx(np.exp(skew), rel=1e-4)


def test_cubic_bowl_is_straight_below_its_inflection_and_smooth_there() -> None:
    skew, step = 0.8, 1e-4
    assert cubic_bowl(-21.0, skew) - cubic_bowl(-20.0, skew) == pytest.approx(0.5 / skew, rel=1e-9)
    near = -1 / skew + step * np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    slope = np.diff(cubic_bowl(near, skew)) / step
    np.testing.assert_allclose(slope, -0.5 / skew, atol=1e-6)
    assert (np.diff(cubic_bowl(U, skew), 2) > -1e-12).all()


@pytest.mark.parametrize("bowl", [linex, cubic_bowl])
@given(u=st.floats(-6, 6), skew=st.floats(1e-3, 3))
def test_a_bowl_is_never_negative_and_steeper_above(bowl: Any, u: float, skew: float) -> None:
    assert bowl(u, skew) >= -1e-9
    assert bowl(abs(u), skew) >= bowl(-abs(u), skew) - 1e-9


def test_linex_stays_finite_at_absurd_lrs() -> None:
    assert np.isfinite(linex(np.array([-1e4, 1e4]), 1.5)).all()


def test_valley_excess_is_curvature_times_u_squared_at_the_bottom() -> None:
    assert valley_excess(1e-3, 0.03, 0.5) == pytest.approx(0.03 * 1e-6, rel=1e-3)
    assert valley_excess(0.0, 0.03, 0.5) == 0.0


def test_knee_has_its_two_slopes() -> None:
    def slope(z: float) -> float:
        return float(batch_knee(z + 0.5, 0.65, 0.15) - batch_knee(z - 0.5, 0.65, 0.15))

    assert slope(-12.0) == pytest.approx(0.65, abs=1e-6)
    assert slope(12.0) == pytest.approx(0.15, abs=1e-6)
    assert 0.15 < slope(0.0) < 0.65
    assert batch_knee(0.0, 0.65, 0.15) == pytest.approx(0.0, abs=1e-15)


def test_knee_with_equal_slopes_is_a_line() -> None:
    np.testing.assert_allclose(batch_knee(U, 0.4, 0.4), 0.4 * U)


def test_softplus_does_not_overflow() -> None:
    assert softplus(1e4) == 1e4
    assert softplus(-1e4) == 0.0


def test_tensors_give_the_same_numbers() -> None:
    u = pt.as_tensor_variable(U)
    for tensor, array in (
        (valley_excess(u, 0.03, 0.7, pt), valley_excess(U, 0.03, 0.7)),
        (batch_knee(u, 0.65, 0.15, pt), batch_knee(U, 0.65, 0.15)),
        (softplus(u, pt), softplus(U)),
    ):
        np.testing.assert_allclose(tensor.eval(mode="FAST_COMPILE"), array, rtol=1e-12)
