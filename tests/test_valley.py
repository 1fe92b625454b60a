"""The valley model: its log density against an independent one, its padding, its simulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from bayeslr import laws
from bayeslr.features import build_design
from bayeslr.models import simulate, valley
from bayeslr.models.compiled import CompiledModel, compile_model, compiled_model
from bayeslr.models.simulate import PlannedSlice
from bayeslr.pointwise import log_likelihood
from bayeslr.posterior import make_posterior
from bayeslr.priors import PER_COVARIATE, Prior
from bayeslr.runs import RunTable, concat, make_table
from bayeslr.sampling import SCALES, _data_start, _recentred, configure_jax, held
from tests.model_fixtures import made_up_runs, run_record, true_log_lr

LOSS_LAW = (
    "loss_irreducible", "loss_n_active", "loss_tokens", "loss_exponent_n_active",
    "loss_exponent_tokens",
)  # fmt: skip

Point = Mapping[str, NDArray[np.float64]]


def two_families() -> RunTable:
    """Two families, a slice of unfinished runs, known standard errors, diverged runs.

    Of the other family each run has two decay branches, at two seeds; the middle ones have another
    weight decay.
    """
    first = made_up_runs(offsets=(-1.4, 0.0, 2.1))
    middle = true_log_lr(3e7, 2e9, 131_072.0)
    rows = [
        run_record(
            f"p{i}", 3e7, 1e9, 131_072.0, np.exp(middle + u), 3.1 + 0.02 * u**2,
            status="partial", loss_se=0.002,
        )
        for i, u in enumerate((-0.7, 0.0, 0.7))
    ] + [
        run_record(
            f"o{i}{seed}", 5e7, tokens, 262_144.0, np.exp(middle + u),
            2.9 + 0.02 * u**2 + 0.001 * seed, family="other", seed=seed,
            weight_decay=0.3 if i == 1 else 0.1,
        )
        for i, u in enumerate((-0.7, 0.0, 0.7)) for seed in (0, 1) for tokens in (4e9, 8e9)
    ]  # fmt: skip
    return concat([first, make_table(rows)])


def log_density(point: Point, arrays: Mapping[str, NDArray[Any]], card: Prior) -> float:
    """The model of the docstring in NumPy and SciPy, written without a look at its tensors."""
    normal = stats.norm.logpdf
    total = 0.0
    p: dict[str, Any] = {}
    for name, entry in card.parameters.items():
        if name in (*LOSS_LAW, *PER_COVARIATE, "diverged_loss"):
            continue
        if name in ("noise_sd", "penalty_scale"):
            continue
        if entry.kind == "normal":
            p[name] = point[name]
            total += np.sum(normal(point[name], entry.location, entry.scale))
        else:
            log_value = point[f"{name}_log__"]
            p[name] = np.exp(log_value)
            total += np.sum(normal(log_value, np.log(entry.location), entry.scale))

    # The noise is sampled as the typical row's own: its sd is that over the geometric mean share.
    shares = 1 / np.sqrt(
        1 + p["noise_run"] ** 2 * arrays["run_in_trunk"]
        + p["noise_order"] ** 2 * arrays["run_in_order"]
    )  # fmt: skip
    told = arrays["run_has_loss"] > 0
    log_sd = point["log_noise"] - np.mean(np.log(shares[told]))
    p["noise_sd"] = np.exp(log_sd)
    noise = card["noise_sd"]
    total += np.sum(normal(log_sd, np.log(noise.location), noise.scale))

    ref_n, ref_all, ref_d = (card.reference[k] for k in ("n_active", "n_total", "tokens"))
    mid_batch = arrays["centre"][3]
    x_n, x_s, x_d = arrays["centre"][:3] - np.log([ref_n, ref_n / ref_all, ref_d])

    def level(name: str, mean: Any, sd: str) -> Any:
        nonlocal total
        total += np.sum(normal(point[name], mean, p[sd]))
        return point[name]

    batch_level = level(
        "best_batch_level",
        p["best_batch_intercept"] + p["best_batch_n_active"] * x_n + p["best_batch_tokens"] * x_d,
        "best_batch_family_sd",
    )
    # The batch penalty is sampled as its steepness over the family's batches, by hand: its slope
    # (e^(a z) - 1) / a and its bend e^(a z) at their mean, the bend times their spread.
    to_best, a = arrays["family_log_batch"] - batch_level, p["penalty_skew"]
    bend = np.exp(a * to_best)
    steepness = np.hypot((bend - 1) / a, arrays["family_batch_spread"] * bend)
    several = arrays["family_batch_spread"] > 0
    log_penalty = point["log_steepness"] - np.where(several, np.log(steepness), 0.0)
    p["penalty_scale"] = np.exp(log_penalty)
    penalty = card["penalty_scale"]
    total += np.sum(normal(log_penalty, np.log(penalty.location), penalty.scale))
    bend_level = level(
        "log_curvature_level",
        np.log(p["curvature_intercept"]) + p["curvature_n_active"] * x_n
        + p["curvature_tokens"] * x_d,
        "curvature_family_sd",
    )  # fmt: skip
    log_skew = level("log_skew", np.log(p["skew"]), "skew_family_sd")
    log_edge = level("log_edge_offset", np.log(p["edge_offset"]), "edge_family_sd")

    def unit(name: str, mean: Any, sd: Any, share: Any) -> Any:
        """What of an effect is standard normal; a share of the centring is in its raw variable."""
        nonlocal total
        raw, sd = point[f"{name}_raw"], sd + np.zeros_like(share)
        total += np.sum(normal(raw, share * mean, sd**share))
        return sd**-share * (raw - share * mean)

    def effect(name: str, mean: Any, sd: str, share: Any) -> Any:
        return mean + p[sd] * unit(name, mean, p[sd], share)

    def nested(*levels: tuple[str, Any, str, Any]) -> list[Any]:
        """Effects of shapes, cells and slices, (name, offset, sd, share) each.

        A group of one and its member are two standard normals, turned so that the first lies along
        what they add up to.
        """
        (top, law, sd_h, share_h), (middle, off_c, sd_c, share_c), (low, off_s, sd_s, share_s) = (
            (name, offset, p[sd], share) for name, offset, sd, share in levels
        )
        h_of, c_of = arrays["cell_shape"], arrays["slice_cell"]
        alone_h = np.bincount(h_of, minlength=len(law)) == 1
        alone_c = np.bincount(c_of, minlength=len(h_of)) == 1
        x_h = unit(top, law, sd_h, share_h)
        mean_c = np.where(alone_h, law, law + sd_h * x_h)[h_of] + off_c
        both_c = np.where(alone_h[h_of], np.hypot(sd_h, sd_c), sd_c)
        x_c = unit(middle, mean_c, both_c, share_c)
        mean_s = np.where(alone_c, mean_c, mean_c + both_c * x_c)[c_of] + off_s
        both_s = np.where(alone_c[c_of], np.hypot(both_c[c_of], sd_s), sd_s)
        x_s = unit(low, mean_s, both_s, share_s)
        bottom = mean_s + both_s * x_s
        for c, s in ((c, int(np.flatnonzero(c_of == c)[0])) for c in np.flatnonzero(alone_c)):
            x_c[c] = (both_c[c] * x_s[s] + sd_s * x_c[c]) / both_s[s]
        for h, c in ((h, int(np.flatnonzero(h_of == h)[0])) for h in np.flatnonzero(alone_h)):
            x_h[h] = (sd_h * x_c[c] + sd_c * x_h[h]) / both_c[c]
        return [law + sd_h * x_h, mean_c + both_c * x_c, bottom]

    slope = effect(
        "family_slope",
        np.array([[p[f"lr_{k}"] for k in
                   ("n_active", "sparsity", "tokens", "batch_below", "batch_above")]]),
        "lr_slope_family_sd", arrays["family_has_slope"],
    )  # fmt: skip
    own_batch = arrays["family_log_batch"]
    zero = own_batch - batch_level
    below, above = slope[:, 3], slope[:, 4]
    lr_level = point["lr_anchor"] - (
        below * zero + (above - below) * (np.log1p(np.exp(2 * zero)) - np.log(2)) / 2
    )
    total += np.sum(
        normal(
            lr_level,
            p["lr_intercept"] + p["lr_n_active"] * x_n + p["lr_sparsity"] * x_s
            + p["lr_tokens"] * x_d,
            p["lr_family_sd"],
        )
    )  # fmt: skip
    g, h, c, s = (arrays[k] for k in ("shape_family", "cell_shape", "slice_cell", "run_slice"))
    d_n, d_s, d_d = (arrays[k] for k in ("shape_d_n_active", "shape_d_sparsity", "cell_d_tokens"))
    of_shape = arrays["shape_d_tokens"]
    lr_law = lr_level[g] + slope[g, 0] * d_n + slope[g, 1] * d_s + slope[g, 2] * of_shape
    slope_h = effect(
        "lr_tokens_shape", slope[g, 2], "lr_tokens_shape_sd", arrays["shape_has_slope"]
    )
    loss_level = np.exp(point["log_loss_level"])
    odds = np.exp(point["loss_ratio"])
    p["loss_irreducible"] = loss_level / (1 + odds.sum(axis=0))
    p["loss_n_active"], p["loss_tokens"] = odds * p["loss_irreducible"]
    slopes = np.exp(point["log_loss_slope"])
    p["loss_exponent_n_active"] = slopes[0] / p["loss_n_active"]
    p["loss_exponent_tokens"] = slopes[1] / p["loss_tokens"]
    # The card's parts hold at its reference; its own exponents carry them to the family's centre.
    own_n, own_d = np.exp(arrays["family_log_n_active"]), np.exp(arrays["family_log_tokens"])
    carried = {
        "loss_n_active": (own_n / ref_n) ** -card["loss_exponent_n_active"].location,
        "loss_tokens": (own_d / ref_d) ** -card["loss_exponent_tokens"].location,
    }
    for name in LOSS_LAW:
        median = card[name].location * carried.get(name, 1.0)
        total += np.sum(normal(np.log(p[name] / median), 0, card[name].scale))
    loss_law = loss_level[g] - p["loss_n_active"][g] * (
        1 - np.exp(-p["loss_exponent_n_active"][g] * arrays["shape_own_n_active"])
    )
    gc, d_nc = g[h], d_n[h]
    best_batch = effect(
        "best_batch",
        batch_level[gc] + p["best_batch_n_active"] * d_nc + p["best_batch_tokens"] * d_d,
        "best_batch_cell_sd", arrays["cell_has_batch"],
    )  # fmt: skip
    early = arrays["cell_unannealed"]
    gs = gc[c]
    z = arrays["slice_log_batch"] - best_batch[c]
    below, above = slope[gs, 3], slope[gs, 4]
    knee = below * z + (above - below) * (np.log1p(np.exp(2 * z)) - np.log(2)) / 2
    _, lr_c, lr_opt = nested(
        ("lr_shape", lr_law, "lr_shape_sd", arrays["shape_has_lr"]),
        ("lr_cell", slope_h[h] * (d_d - of_shape[h]) + p["lr_unannealed"] * early,
         "lr_cell_sd", arrays["cell_has_lr"]),
        ("lr_opt", knee, "lr_slice_sd", arrays["slice_has_lr"]),
    )  # fmt: skip
    bend = effect(
        "curvature_slice",
        bend_level[gs] + p["curvature_n_active"] * d_nc[c] + p["curvature_tokens"] * d_d[c]
        + p["curvature_batch"] * (arrays["slice_log_batch"] - mid_batch),
        "curvature_slice_sd", arrays["slice_has_curvature"],
    )  # fmt: skip
    zero = own_batch[gs] - best_batch[c]
    skew_z, skew_zero = p["penalty_skew"] * z, p["penalty_skew"] * zero
    zero_knee = below * zero + (above - below) * (np.log1p(np.exp(2 * zero)) - np.log(2)) / 2
    penalty = p["penalty_scale"][gs] * np.exp(p["penalty_tokens"] * d_d[c])
    _, _, floor = nested(
        ("loss_shape", loss_law, "loss_shape_sd", arrays["shape_has_floor"]),
        ("loss_cell",
         -p["loss_tokens"][gc]
         * (1 - np.exp(-p["loss_exponent_tokens"][gc] * arrays["cell_own_tokens"]))
         + p["loss_unannealed"] * early,
         "loss_cell_sd", arrays["cell_has_floor"]),
        ("floor",
         penalty * (np.exp(skew_z) - skew_z - np.exp(skew_zero) + skew_zero)
         / p["penalty_skew"] ** 2,
         "loss_slice_sd", arrays["slice_has_floor"]),
    )  # fmt: skip
    gr = gs[s]
    log_lr, covariates, at_reference = arrays["run_log_lr"].copy(), 0.0, 0.0
    for k, z_run in enumerate(arrays["run_covariates"].T):
        of = [
            covariate(point, card, g, k, float(point["log_curvature_level"][g]))
            for g in range(len(bend_level))
        ]  # fmt: skip
        total += sum(prior for *_, prior in of)
        shift, own_bend, best, by_size = (np.array([one[i] for one in of])[gr] for i in range(4))
        best = best + by_size * d_nc[c][s]
        log_lr += shift * z_run
        covariates = covariates + own_bend * (z_run - best) ** 2
        at_reference = at_reference + own_bend * best**2
    skew, u = np.exp(log_skew)[gr], log_lr - lr_opt[s]
    # A cubic from its inflection at -1 / skew up, its tangent there below.
    straight = 2 / (3 * skew**2) - (u + 1 / skew) / skew
    excess = np.exp(bend)[s] * np.where(skew * u > -1, u**2 + skew * u**3 / 3, straight)
    excess = excess + covariates
    widened = np.exp(
        p["noise_batch"][gr] * (arrays["slice_log_batch"] - mid_batch)[s]
        + p["noise_tokens"][gr] * d_d[c][s]
        + p["noise_side"][gr] * np.tanh(log_lr - lr_opt[s])
    )
    sd = np.sqrt(
        widened**2 * (p["noise_sd"][gr] ** 2 + (p["noise_share"] * excess) ** 2)
        + arrays["run_loss_se"] ** 2
    )
    z = point["shared_noise"]
    total += np.sum(normal(z))
    for i in np.flatnonzero(arrays["run_has_loss"]):
        # Variances of the run, the order and the row itself.
        parts = np.array([p["noise_run"] ** 2 * arrays["run_in_trunk"][i],
                          p["noise_order"] ** 2 * arrays["run_in_order"][i], 1.0])  # fmt: skip
        roots = sd[i] * np.sqrt(parts / parts.sum())
        common = roots[0] * z[arrays["run_trunk"][i]] + roots[1] * z[arrays["run_order"][i]]
        total += stats.t.logpdf(
            arrays["run_loss"][i],
            1 + p["noise_dof"],
            (floor[s] + excess - at_reference)[i] + common,
            roots[2],
        )
    edge = lr_c[c] + zero_knee + p["edge_batch"] * (knee - zero_knee) + np.exp(log_edge)[gs]
    edge = edge[s]
    risk = 1 / (1 + np.exp(-(log_lr - edge) / p["edge_width"]))
    for i in np.flatnonzero(arrays["run_has_end"]):
        total += np.log(risk[i] if arrays["run_diverged"][i] else 1 - risk[i])
    return float(total)


def covariate(
    point: Point, card: Prior, g: int, k: int, valley_bend: float
) -> tuple[float, float, float, float, float]:
    """Shift, curvature, best value, how it moves with size, and their log density, in terms of what
    is sampled; the Jacobian by differences.
    """
    names = ("covariate_bend", "covariate_tie", "covariate_optimum_slope",
             "covariate_n_active")  # fmt: skip
    sampled = np.array([point[name][g, k] for name in names])

    def told(x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Shift, log curvature, best value, its exponent."""
        shift = np.tanh(x[1]) * np.exp((x[0] - valley_bend) / 2)
        own = np.exp(x[0]) - np.exp(valley_bend) * shift**2
        return np.array([shift, np.log(own), x[2] / own, x[3]])

    jacobian = [(told(sampled + e) - told(sampled - e)) / 2e-5 for e in 1e-5 * np.eye(4)]
    density = np.linalg.slogdet(np.array(jacobian))[1]
    values = told(sampled)
    for value, name in zip(
        values, ("shift", "curvature", "optimum", "n_active"), strict=True
    ):  # fmt: skip
        entry = card[f"covariate_{name}"]
        middle = np.log(entry.location) if entry.kind == "lognormal" else entry.location
        density += stats.norm.logpdf(value, middle, entry.scale)
    return float(values[0]), float(np.exp(values[1])), *values[2:].tolist(), float(density)


def random_point(compiled: CompiledModel, rng: np.random.Generator) -> NDArray[np.float64]:
    x = compiled.start + 0.2 * rng.normal(size=compiled.size)
    x[compiled.index("covariate_optimum_slope")] *= 0.01  # best values of the order of one
    return np.asarray(x)


def named(compiled: CompiledModel, x: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    return {
        name: x[compiled.index(name)].reshape(shape)
        for name, shape in zip(compiled.names, compiled.shapes, strict=True)
    }


@pytest.fixture(scope="module")
def arrays() -> valley.Arrays:
    return valley.model_data(build_design(two_families()))


@pytest.fixture(scope="module")
def compiled(arrays: valley.Arrays, card: Prior) -> CompiledModel:
    configure_jax(2)
    return compile_model(arrays, card, 2)


def test_log_density_equals_an_independent_computation(
    compiled: CompiledModel, arrays: valley.Arrays, card: Prior
) -> None:
    data = tuple(arrays.values())
    for seed in range(3):
        x = random_point(compiled, np.random.default_rng(seed))
        expected = log_density(named(compiled, x), arrays, card)
        assert float(compiled.log_density(x, data)) == pytest.approx(expected, rel=1e-9)
    one_batch = {**arrays, "family_batch_spread": 0.0 * arrays["family_batch_spread"]}
    expected_there = log_density(named(compiled, x), one_batch, card)
    found = float(compiled.log_density(x, tuple(one_batch.values())))
    assert found == pytest.approx(expected_there, rel=1e-9)
    assert found != pytest.approx(expected, rel=1e-9)
    # The twin: one family's label swapped is another density.
    wrong = {**arrays, "shape_family": 1 - arrays["shape_family"]}
    assert log_density(named(compiled, x), wrong, card) != pytest.approx(expected, rel=1e-6)


def test_the_likelihood_run_by_run_is_the_models(
    compiled: CompiledModel, arrays: valley.Arrays, card: Prior
) -> None:
    """Other losses and LRs move both alike: covariates, shared noise and unfinished runs too."""
    rng = np.random.default_rng(3)
    runs = two_families()
    design = build_design(runs)
    x = random_point(compiled, rng)
    draws = compiled.draws(x[None, None], tuple(arrays.values()))
    fitted = make_posterior(draws, design, runs, card, method="prior", seed=1, statistics={})

    def told(log_lr: NDArray[np.float64], loss: NDArray[np.float64]) -> tuple[float, float]:
        data = {**arrays, "run_log_lr": log_lr, "run_loss": loss}
        moved = dataclasses.replace(design, log_lr=log_lr, loss=loss)
        by_run = log_likelihood(dataclasses.replace(fitted, design=moved), np.array([0]))
        return float(compiled.log_density(x, tuple(data.values()))), float(by_run[0])

    lr, loss = arrays["run_log_lr"], arrays["run_loss"]
    before = told(lr, loss)
    for after in (
        told(lr + 0.3 * rng.normal(size=len(lr)), loss),
        told(lr, loss + 0.1 * rng.normal(size=len(lr))),
    ):
        assert after[0] != pytest.approx(before[0], abs=0.1)
        assert after[1] - before[1] == pytest.approx(after[0] - before[0], rel=1e-9)


def test_runs_at_one_batch_but_for_rounding_tell_nothing_of_a_penalty() -> None:
    batches = (524_288.0, 524_300.0, 524_288.0)
    rows = [
        run_record(f"{i}", n, 2e9, batch, 1e-3, 3.0 + i / 10)
        for i, (n, batch) in enumerate(zip((1e8, 2e8, 4e8), batches, strict=True))
    ]
    spread = valley.model_data(build_design(make_table(rows)))["family_batch_spread"]
    assert spread.tolist() == [0.0]
    rows.append(run_record("twice", 1e8, 2e9, 1_048_576.0, 1e-3, 3.0))
    spread = valley.model_data(build_design(make_table(rows)))["family_batch_spread"]
    assert spread == pytest.approx(np.std(np.log([1, 1, 1, 2])), abs=1e-3)


def test_a_point_centred_otherwise_is_the_same_point(
    compiled: CompiledModel, arrays: valley.Arrays, card: Prior
) -> None:
    """Scales at their medians, for those are what the search for the mode holds."""
    rng = np.random.default_rng(7)
    x = random_point(compiled, rng)
    for name, at in held(compiled).items():
        if name in SCALES:
            x[at] = np.log(card[name].location)
    shares = list(valley.EFFECTS.values())
    other = {**arrays, **{name: rng.uniform(size=arrays[name].shape) for name in shares}}
    moved = _recentred(x, compiled, arrays, other)
    assert not np.allclose(moved, x)
    before = compiled.draws(x[None, None], tuple(arrays.values()))
    after = compiled.draws(moved[None, None], tuple(other.values()))
    for name, values in before.items():
        assert after[name] == pytest.approx(values, rel=1e-9, abs=1e-9), name


def test_every_parameter_of_the_card_is_in_the_model(compiled: CompiledModel, card: Prior) -> None:
    names = {name.removesuffix("_log__") for name in compiled.names}
    through_others = {
        *LOSS_LAW, *PER_COVARIATE, "noise_sd", "penalty_scale", "diverged_loss"
    }  # fmt: skip
    assert set(card.parameters) - names == through_others - {"covariate_n_active"}
    assert {"covariate_bend", "covariate_tie", "covariate_optimum_slope"} < names
    assert {"log_loss_level", "loss_ratio", "log_loss_slope", "log_noise", "log_steepness"} < names


def test_cards_of_two_references_share_no_compilation(
    arrays: valley.Arrays, card: Prior, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels are carried from a card's reference to the data inside the compiled graph."""
    monkeypatch.setattr("bayeslr.models.compiled._COMPILED", {})
    monkeypatch.setattr("bayeslr.models.compiled.compile_model", lambda *_: object())
    elsewhere = dataclasses.replace(card, reference={**card.reference, "tokens": 1e9})
    first = compiled_model(arrays, card, 2)
    assert compiled_model(arrays, card, 2) is first
    assert compiled_model(arrays, elsewhere, 2) is not first


def test_regressors_are_centred_on_the_data(arrays: valley.Arrays) -> None:
    c = arrays["slice_cell"]
    h = arrays["cell_shape"][c]
    for values in (
        arrays["shape_d_n_active"][h], arrays["shape_d_sparsity"][h], arrays["cell_d_tokens"][c]
    ):  # fmt: skip
        assert np.mean(values) == pytest.approx(0.0, abs=1e-12)


def test_padding_adds_the_padded_effects_prior_and_nothing_else(
    compiled: CompiledModel, arrays: valley.Arrays, card: Prior
) -> None:
    sizes = {"run": 64, "slice": 16, "cell": 8, "shape": 5, "family": 2, "shared": 24}
    padded_arrays = valley.model_data(build_design(two_families()), sizes)
    padded = compile_model(padded_arrays, card, 2)
    rng = np.random.default_rng(4)
    x = random_point(compiled, rng)
    wide, extra = rng.normal(size=padded.size), np.ones(padded.size, dtype=bool)
    for name in compiled.names:
        at = padded.index(name)[: len(compiled.index(name))]
        wide[at], extra[at] = x[compiled.index(name)], False
    assert extra.sum() > 0
    difference = float(padded.log_density(wide, tuple(padded_arrays.values()))) - float(
        compiled.log_density(x, tuple(arrays.values()))
    )
    assert difference == pytest.approx(float(stats.norm.logpdf(wide[extra]).sum()), rel=1e-9)


def test_padded_effects_start_at_nothing(card: Prior) -> None:
    sizes = {"run": 64, "slice": 16, "cell": 8, "shape": 5, "family": 2}
    padded_arrays = valley.model_data(build_design(two_families()), sizes)
    padded = compile_model(padded_arrays, card, 2)
    start = _data_start(padded, padded_arrays, card)
    for name, used in (("floor", 11), ("loss_cell", 7), ("lr_opt", 11), ("lr_shape", 3)):
        np.testing.assert_array_equal(start[padded.index(f"{name}_raw")[used:]], 0.0)


LAYOUT = [
    PlannedSlice(
        family="f", n_active=n, n_total=8 * n, tokens=d, batch_tokens=b, num_lrs=5, annealed=a
    )
    for n in (3e7, 1e8) for d, a in ((2e9, True), (6e9, True), (1e9, False))
    for b in (131_072.0, 524_288.0)
]  # fmt: skip


def scores(card: Prior, num_tables: int, disturbance: float) -> NDArray[np.float64]:
    """Gradients of the log density at the truth, (table, parameter), all effects centred."""
    design, where = simulate._skeleton(LAYOUT)
    rng = np.random.default_rng(11)
    arrays = valley.model_data(design, {"run": sum(s.num_lrs for s in LAYOUT)})
    compiled = compile_model(arrays, card, 1)
    ones = {k: np.ones_like(v) for k, v in arrays.items() if "_has_" in k and k[:3] != "run"}
    found = []
    for _ in range(num_tables):
        truth = simulate._draw(card, design, np.arange(design.num_slices), rng)
        records, _ = simulate._runs(card, LAYOUT, where, truth, rng)
        lost = np.array([r["status"] == "diverged" for r in records])
        loss = np.array([r["loss"] or 0.0 for r in records])
        slice_of = np.repeat(where, [s.num_lrs for s in LAYOUT])
        annealed = design.annealed[design.cell_of_slice[slice_of]]
        data = {
            **arrays, **ones,
            "run_slice": slice_of,
            "run_log_lr": np.log([r["lr"] for r in records]),
            "run_loss": loss + disturbance * rng.normal(size=len(loss)),
            "run_loss_se": np.zeros(len(loss)),
            "run_has_loss": (~lost).astype(float),
            "run_has_end": annealed.astype(float),
            "run_diverged": lost.astype(float),
        }  # fmt: skip
        centred = {
            "family_slope": truth["family_slope"], "best_batch": truth["best_batch"],
            "lr_shape": truth["lr_shape"] + _lr_law(truth, arrays),
            "lr_tokens_shape": truth["lr_tokens_shape"] + truth["family_slope"][0, 2],
            "loss_shape": truth["loss_shape"] + _loss_law(truth, arrays),
            "lr_cell": truth["lr_cell"], "loss_cell": truth["loss_cell"],
            "lr_opt": truth["lr_opt"], "curvature_slice": truth["log_curvature"],
            "floor": truth["floor"],
        }  # fmt: skip
        zero = arrays["family_log_batch"] - truth["best_batch_level"]
        below, above = truth["family_slope"][:, 3], truth["family_slope"][:, 4]
        anchor = truth["lr_level"] + laws.batch_knee(zero, below, above)
        x = np.empty(compiled.size)
        for name in compiled.names:
            if name == "shared_noise":
                value = rng.normal(size=1)  # no run of this layout shares any
            elif name == "log_noise":
                value = np.log(truth["noise_sd"])
            elif name == "log_steepness":
                slope, bend = laws.linex_derivatives(zero, truth["penalty_skew"])
                spread = arrays["family_batch_spread"]
                value = np.log(truth["penalty_scale"] * np.hypot(slope, spread * bend))
            elif name == "lr_anchor":
                value = anchor
            elif name == "log_loss_level":
                value = np.log(truth["loss_level"])
            elif name == "loss_ratio":
                parts = np.stack([truth["loss_n_active"], truth["loss_tokens"]])
                value = np.log(parts / (truth["loss_level"] - parts.sum(axis=0)))
            elif name == "log_loss_slope":
                value = np.log([
                    truth[f"loss_{of}"] * truth[f"loss_exponent_{of}"]
                    for of in ("n_active", "tokens")
                ])  # fmt: skip
            elif name.endswith("_raw"):
                value = centred[name.removesuffix("_raw")]
            elif name.endswith("_log__"):
                value = np.log(truth[name.removesuffix("_log__")])
            else:
                value = truth[name]
            x[compiled.index(name)] = np.ravel(value)
        found.append(-np.asarray(compiled.value_and_grad(x, tuple(data.values()))[1]))
    return np.array(found)


def _lr_law(truth: Point, arrays: valley.Arrays) -> NDArray[np.float64]:
    slope = truth["family_slope"][0]
    return np.asarray(
        truth["lr_level"][0] + slope[0] * arrays["shape_d_n_active"]
        + slope[1] * arrays["shape_d_sparsity"] + slope[2] * arrays["shape_d_tokens"]
    )  # fmt: skip


def _loss_law(truth: Point, arrays: valley.Arrays) -> NDArray[np.float64]:
    exponent = truth["loss_exponent_n_active"][0]
    return np.asarray(
        truth["loss_level"][0]
        + truth["loss_n_active"][0] * np.expm1(-exponent * arrays["shape_own_n_active"])
    )


def largest_z(gradients: NDArray[np.float64]) -> float:
    """Largest mean score in standard errors: near zero where simulator and density agree."""
    mean, sd = gradients.mean(axis=0), gradients.std(axis=0, ddof=1)
    return float(np.max(np.abs(mean) / (sd / np.sqrt(len(gradients)))))


def test_the_simulator_draws_from_the_model(card: Prior) -> None:
    """The expected score at the truth is zero, whatever the parameter, if both are one model."""
    configure_jax(2)
    # About 130 scores, each t with 199 degrees of freedom: one beyond 4.8 in 1 of 2,000 seeds.
    assert largest_z(scores(card, 200, 0.0)) < 4.8
    # The twin: losses with noise that the model knows nothing of.
    assert largest_z(scores(card, 60, 0.01)) > 4.8


def test_the_simulator_repeats_with_its_seed_and_leaves_the_global_generator(card: Prior) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, again = (
        simulate.simulate(card, LAYOUT[:2], np.random.default_rng(5)).runs.data_hash
        for _ in range(2)
    )
    other = simulate.simulate(card, LAYOUT[:2], np.random.default_rng(6)).runs.data_hash
    assert first == again != other
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
