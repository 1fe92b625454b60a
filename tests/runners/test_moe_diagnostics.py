"""Diagnostics that are kept with a run: the network's layers, its updates, spikes of its loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from bayeslr.specs import RunSpec
from bayeslr_runners.moe import MoeRunner
from bayeslr_runners.moe.model import MoeTransformer
from bayeslr_runners.moe.options import GROUPS
from bayeslr_runners.moe.probe import Probe, effective_rank, probe, representation_change
from bayeslr_runners.moe.spikes import FIRST_STEPS, Spikes
from bayeslr_runners.moe.trainer import Trainer

SHAPE = {"name": "tiny", "d_model": 16, "n_layers": 3, "n_heads": 2, "d_expert": 8,
         "n_experts": 4, "top_k": 2}  # fmt: skip
OPTIONS = {"data": "synthetic", "synthetic_vocab": 16, "synthetic_order": 1, "synthetic_seed": 3,
           "synthetic_branching": 3, "synthetic_tokens": 40_000, "val_tokens": 1024,
           "threads": 1}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def spec(**changes: Any) -> RunSpec:
    n_active, n_total = MoeRunner(OPTIONS).counts(SHAPE)
    values: dict[str, Any] = {
        "run_id": "r", "family": "f", "runner": "moe", "lr": 0.01, "tokens": 12_800,
        "batch_tokens": 256, "seq_len": 32, "n_active": n_active, "n_total": n_total,
        "shape": SHAPE, "options": OPTIONS,
    }  # fmt: skip
    return RunSpec(**{**values, **changes})


def seen(trainer: Trainer, model: MoeTransformer | None = None) -> Probe:
    return probe(model or trainer.model, trainer.corpus, 32, trainer.device)


def test_nothing_has_changed_before_the_first_step() -> None:
    (measured,) = Trainer.build(spec()).measure()
    assert measured.diagnostics["representation_change"] == 0
    assert set(measured.diagnostics["update_ratio"].values()) == {0.0}


def test_update_ratio_is_that_of_the_step_that_was_taken() -> None:
    """Without weight decay the difference of the weights is the step."""
    trainer = Trainer.build(spec(weight_decay=0.0))
    for number in range(3):
        trainer.step(number, 1.0)
    before = {group.name: group.weights.clone() for group in trainer.optimizer.groups}
    trainer.step(3, 0.5)
    ratios = trainer.measure()[0].diagnostics["update_ratio"]
    assert set(ratios) == set(GROUPS)
    for group in trainer.optimizer.groups:
        moved = (group.weights - before[group.name]).norm() / group.weights.norm()
        assert ratios[group.name] == pytest.approx(moved.item(), rel=1e-3), group.name


def test_update_ratio_of_a_stack_follows_each_members_lr() -> None:
    trainer = Trainer.build(spec(), replace(spec(), run_id="s", lr=0.02))
    trainer.step(0, 1.0)  # the first step of Adam is of the size of the LR
    slow, fast = (one.diagnostics["update_ratio"] for one in trainer.measure())
    for group in ("attention", "expert_down"):
        assert fast[group] == pytest.approx(2 * slow[group], rel=0.1)


def test_activations_are_those_of_each_layer() -> None:
    trainer = Trainer.build(spec())
    with torch.no_grad():
        for block in trainer.model.blocks[1:]:  # these two add nothing to the stream
            block.attention.out.zero_()
            block.moe.experts_down.zero_()
    first, second, third = trainer.measure()[0].diagnostics["activation_rms"]
    assert first == second == third
    with torch.no_grad():
        trainer.model.embedding.mul_(10)
    assert trainer.measure()[0].diagnostics["activation_rms"][0] > 5 * first


def test_representation_change_grows_with_the_lr_and_is_relative() -> None:
    found = []
    for lr in (1e-4, 1e-2):
        trainer = Trainer.build(spec(lr=lr))
        for number in range(5):
            trainer.step(number, 1.0)
        found.append(trainer.measure()[0].diagnostics["representation_change"])
    assert 0 < 10 * found[0] < found[1]
    hidden = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert representation_change(2 * hidden, hidden) == pytest.approx(1.0)


def test_a_resumed_run_measures_its_change_from_the_same_start() -> None:
    trainer, resumed = Trainer.build(spec()), Trainer.build(spec())
    for number in range(3):
        trainer.step(number, 1.0)
    resumed.restore(trainer.state())
    assert resumed.measure() == trainer.measure()


def test_effective_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(64, 8, generator=generator))[0]
    basis = torch.linalg.qr(basis - basis.mean(0))[0]  # orthogonal, and centred
    assert effective_rank(basis) == pytest.approx(8, rel=1e-3)
    assert effective_rank(basis + 100.0) == pytest.approx(8, rel=1e-2)
    assert effective_rank(basis[:, :1] @ torch.ones(1, 8)) == pytest.approx(1, rel=1e-2)
    assert math.isnan(effective_rank(torch.full((4, 4), math.nan)))


def losses(*spikes: tuple[int, int, float], num_steps: int = 400) -> Spikes:
    """Spikes found in a falling loss with normal noise of 0.02 nats; (start, steps, nats)."""
    generator = torch.Generator().manual_seed(4)
    noise = 0.02 * torch.randn(num_steps, generator=generator)
    found = Spikes()
    for step in range(num_steps):
        height = sum(nats for start, steps, nats in spikes if start <= step < start + steps)
        found.see(2.0 + 3.0 * math.exp(-step / 40) + noise[step].item() + height)
    return found


def test_a_falling_loss_has_no_spikes() -> None:
    """Six standard deviations: fails one time in 10^6 if correct."""
    assert losses().summary() == {"loss_spikes": 0, "spike_height": 0, "spike_steps": 0}


def test_spikes_are_counted_with_height_and_length() -> None:
    found = losses((200, 4, 0.5), (300, 9, 0.3))
    assert found.count == 2
    assert found.height == pytest.approx(0.5, abs=0.1)
    assert found.longest == 9
    assert found.steps_in_spike == 0


def test_a_spike_that_does_not_end_is_one() -> None:
    found = losses((200, 1000, 1.0))
    assert (found.count, found.longest) == (1, 200)


def test_the_first_steps_and_what_is_not_finite_are_not_judged() -> None:
    found = Spikes()
    for step in range(FIRST_STEPS):
        found.see(5.0 if step % 2 else 9.0)
    found.see(math.nan)
    found.see(math.inf)
    assert found.count == 0
