"""Diagnostics that are kept with a run: the network's layers, its updates, spikes of its loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from bayeslr.specs import RunSpec
from bayeslr_runners.moe import MoeRunner
from bayeslr_runners.moe.alignment import expert_log_alignment_ratio, log_alignment_ratio
from bayeslr_runners.moe.experts import route
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
    assert set(ratios) == {*GROUPS, "final_norm"}
    for group in trainer.optimizer.groups:
        moved = (group.weights - before[group.name]).norm() / group.weights.norm()
        assert ratios[group.name] == pytest.approx(moved.item(), rel=1e-3), group.name


def test_update_ratio_of_a_stack_follows_each_members_lr() -> None:
    trainer = Trainer.build(spec(), replace(spec(), run_id="s", lr=0.02))
    trainer.step(0, 1.0)  # the first step of Adam is of the size of the LR
    slow, fast = (one.diagnostics["update_ratio"] for one in trainer.measure())
    for group in ("attention", "expert_down"):
        assert fast[group] == pytest.approx(2 * slow[group], rel=0.1)


def test_alignment_is_what_one_works_out_by_hand() -> None:
    """Two inputs, a step of 2 x 3: norms 5 and sqrt(14); the outputs (3, 6, 0) and (0, 0, 12)."""
    x = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    step = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    ratio = math.sqrt(9 * 5 + 16 * 9) / (5 * math.sqrt(14))
    (found,) = log_alignment_ratio(x, step)
    assert found.item() == pytest.approx(1 + math.log2(ratio), abs=1e-6)
    both = log_alignment_ratio(torch.stack([x, x]), torch.stack([step, 7 * step]), 2)
    assert both.tolist() == pytest.approx([found.item()] * 2)  # the scale of a step is no matter


def test_alignment_is_one_along_the_input_and_a_half_at_random() -> None:
    generator = torch.Generator().manual_seed(5)
    direction, answer = torch.randn(256, generator=generator), torch.randn(64, generator=generator)
    x = torch.randn(32, 1, generator=generator) * direction
    full = log_alignment_ratio(x, torch.outer(direction, answer))
    assert full.item() == pytest.approx(1.0, abs=1e-5)
    step = torch.randn(256, 64, generator=generator)
    # The squared ratio scatters by sqrt(2 / 64) of itself: 0.016 of the exponent, so 4 sd.
    assert log_alignment_ratio(x, step).item() == pytest.approx(0.5, abs=0.064)
    across = torch.randn(256, generator=generator)
    across -= (across @ direction) / (direction @ direction) * direction
    assert log_alignment_ratio(x, torch.outer(across, answer)).item() < 0.0


def test_alignment_of_experts_is_that_of_their_own_inputs() -> None:
    """Each expert's step answers to the inputs that it gets, or to those of the other."""
    one, other = torch.eye(8)[0], torch.eye(8)[1]
    x = torch.stack([one, other, one])
    routing = route(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), 1, bias_E=None,
                    normalise=False)  # fmt: skip
    x_AN = x[routing.token_A]
    own = torch.stack([torch.outer(row, torch.ones(4)) for row in (one, other)])
    assert expert_log_alignment_ratio(x_AN, own, routing).item() == pytest.approx(1.0)
    assert expert_log_alignment_ratio(x_AN, own.flip(0), routing).item() == -math.inf


def test_alignment_is_that_of_the_step_that_was_taken() -> None:
    """Of every matrix, from the weights before and after the step, and what they then read."""
    trainer = Trainer.build(spec(weight_decay=0.0))
    for number in range(3):
        trainer.step(number, 1.0)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.step(3, 0.5)
    found = trainer.measure()[0].diagnostics["update_alignment"]
    assert list(found) == ["attention", "router", "expert_up", "expert_down", "head"]
    inputs: list[torch.Tensor] = []
    hooks = [block.moe.register_forward_hook(lambda m, x, y: inputs.append(x[0]))
             for block in trainer.model.blocks]  # fmt: skip
    hidden = seen(trainer).hidden_RTD[0]
    for hook in hooks:
        hook.remove()
    moved = {n: p.detach() - before[n] for n, p in trainer.model.named_parameters()}
    assert found["head"] == pytest.approx(
        log_alignment_ratio(hidden, moved["head"].mT).item(), abs=1e-3
    )
    by_layer = [
        log_alignment_ratio(x, moved[f"blocks.{i}.moe.router"].mT).item()
        for i, x in enumerate(inputs)
    ]
    assert found["router"] == pytest.approx(sum(by_layer) / len(by_layer), abs=1e-3)
    assert all(0.0 < value <= 1.0 for value in found.values())


@pytest.mark.parametrize("changes", [{"n_experts": 1, "top_k": 1}, {"n_shared_experts": 1}])
def test_dense_and_shared_experts_have_an_alignment_too(changes: dict[str, int]) -> None:
    shape = {**SHAPE, **changes}
    n_active, n_total = MoeRunner(OPTIONS).counts(shape)
    trainer = Trainer.build(spec(shape=shape, n_active=n_active, n_total=n_total))
    trainer.step(0, 1.0)
    found = trainer.measure()[0].diagnostics["update_alignment"]
    assert {"expert_up", "expert_down"} <= set(found)
    assert all(0.0 < value <= 1.0 for value in found.values())
    assert ("router" in found) == (shape["n_experts"] > 1)


def test_a_member_of_a_stack_has_the_alignment_that_it_has_alone() -> None:
    alone, stack = Trainer.build(spec()), Trainer.build(spec(), replace(spec(), run_id="s", lr=0.1))
    for trainer in (alone, stack):
        for number in range(3):
            trainer.step(number, 1.0)
    one, first = (t.measure()[0].diagnostics["update_alignment"] for t in (alone, stack))
    assert first == pytest.approx(one, abs=1e-4)


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
