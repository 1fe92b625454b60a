"""Tokens a second of the proxy trainer: beside Mixtral, beside a dense model, stacked.

.venv/bin/python -m pytest benchmarks/test_training.py --benchmark-only

Rates are compared step by step in turn, so that a busy machine slows both sides alike; the ratio is
the median over the turns. BENCH_THREADS sets the threads (default: every core).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bayeslr.specs import RunSpec
from bayeslr_runners.moe import MoeRunner
from bayeslr_runners.moe.__main__ import keep_freed_memory
from bayeslr_runners.moe.parts import split
from bayeslr_runners.moe.trainer import Trainer

BATCH_TOKENS, SEQ_LEN, VOCAB = 2048, 128, 256
NUM_EXPERTS, TOP_K, NUM_LAYERS = 8, 2, 3
THREADS = int(os.environ.get("BENCH_THREADS", os.cpu_count() or 1))
ROUNDS = 9


@pytest.fixture(scope="module", autouse=True)
def whole_machine() -> None:
    as_in_training(THREADS)


def as_in_training(num_threads: int) -> None:
    """As in the trainer's own process."""
    keep_freed_memory()
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def spec(d_model: int, *, batch_tokens: int = BATCH_TOKENS, seq_len: int = SEQ_LEN,
         **shape: int) -> RunSpec:  # fmt: skip
    whole = {"d_model": d_model, "n_layers": NUM_LAYERS, "n_heads": d_model // 32,
             "d_expert": d_model, "n_experts": NUM_EXPERTS, "top_k": TOP_K} | shape  # fmt: skip
    options = {"qk_norm": False, "data": "synthetic", "synthetic_vocab": VOCAB,
               "synthetic_order": 1, "synthetic_tokens": 200_000}  # fmt: skip
    n_active, n_total = MoeRunner(options).counts(whole)
    return RunSpec(
        run_id="b", family="b", runner="moe", lr=3e-3, tokens=1 << 20, batch_tokens=batch_tokens,
        seq_len=seq_len, n_active=n_active, n_total=n_total, shape=whole, options=options,
    )  # fmt: skip


def stepper(*specs: RunSpec) -> Callable[[], object]:
    trainer = Trainer.build(*specs, stacked=True)  # as `train` does on a CPU
    return lambda: trainer.step(0, 1.0)


def in_turn(sides: Sequence[Callable[[], object]], repeats: Sequence[int]) -> list[list[float]]:
    """Seconds of a call of each side, turn by turn."""
    for side in sides:
        side()
        side()
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(ROUNDS):
        for side, count, kept in zip(sides, repeats, seconds, strict=True):
            started = time.perf_counter()
            for _ in range(count):
                side()
            kept.append((time.perf_counter() - started) / count)
    return seconds


def ratio(seconds: Sequence[Sequence[float]]) -> float:
    """Median over the turns of the second side's time over the first's."""
    ours, theirs = seconds
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def report(benchmark: Any, measure: Callable[[], dict[str, float]]) -> None:
    benchmark.extra_info |= {"threads": THREADS, "torch": torch.__version__}
    benchmark.extra_info |= benchmark.pedantic(measure, rounds=1)
    print(benchmark.name, benchmark.extra_info)


def matmul(size: int = 1024) -> Callable[[], object]:
    a, b = torch.randn(size, size), torch.randn(size, size)
    return lambda: a @ b


def mixtral(d_model: int) -> Callable[[], object]:
    """A training step of the same shape, batch, losses, clipping and optimizer."""
    transformers = pytest.importorskip("transformers", reason="Mixtral needs transformers")
    config = transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=d_model, intermediate_size=d_model,
        num_hidden_layers=NUM_LAYERS, num_attention_heads=d_model // 32,
        num_key_value_heads=d_model // 32, num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K, max_position_embeddings=SEQ_LEN, sliding_window=None,
        output_router_logits=True, router_aux_loss_coef=0.01, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    token = torch.randint(0, VOCAB, (BATCH_TOKENS // SEQ_LEN, SEQ_LEN))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=token, labels=token).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


@pytest.mark.parametrize("d_model", [64, 96, 256])
def test_beside_mixtral(benchmark: Any, d_model: int) -> None:
    sides = [stepper(spec(d_model)), mixtral(d_model)]

    def measure() -> dict[str, float]:
        seconds = in_turn(sides, (2, 2))
        return {"times_mixtral": ratio(seconds),
                "tokens_per_s": BATCH_TOKENS / statistics.median(seconds[0])}  # fmt: skip

    report(benchmark, measure)


@pytest.mark.parametrize("d_model", [64, 96, 256])
def test_beside_a_dense_model_of_equal_active_width(benchmark: Any, d_model: int) -> None:
    dense = spec(d_model, n_experts=1, top_k=1, d_expert=TOP_K * d_model)
    sides = [stepper(spec(d_model)), stepper(dense)]

    def measure() -> dict[str, float]:
        seconds = in_turn(sides, (2, 2))
        return {"times_dense": ratio(seconds),
                "tokens_per_s": BATCH_TOKENS / statistics.median(seconds[0])}  # fmt: skip

    report(benchmark, measure)


@pytest.mark.parametrize("d_model", [32, 64])
@pytest.mark.parametrize("one_thread", [False, True], ids=["whole machine", "one thread"])
def test_eight_lrs_stacked(benchmark: Any, d_model: int, one_thread: bool) -> None:
    """Aggregate rate of a stack, in its parts, over that of its members one after another.

    At a small batch. Each single run has all threads; ``one thread`` compares one core with itself.
    """
    num_threads = 1 if one_thread else THREADS
    alone = spec(d_model, batch_tokens=1024, seq_len=64)
    members = [replace(alone, run_id=str(i), lr=1e-3 * 2 ** (i / 2)) for i in range(8)]
    with contextlib.ExitStack() as stack:
        parts = stack.enter_context(parts_in_step(members, num_threads))
        torch.set_num_threads(num_threads)
        stack.callback(torch.set_num_threads, THREADS)
        sides = [parts, stepper(alone)]

        def measure() -> dict[str, float]:
            seconds = in_turn(sides, (2, 8))
            return {"times_one_by_one": 8 * ratio(seconds),
                    "tokens_per_s": 8 * 1024 / statistics.median(seconds[0])}  # fmt: skip

        report(benchmark, measure)


@contextlib.contextmanager
def parts_in_step(specs: Sequence[RunSpec], num_cores: int) -> Iterator[Callable[[], object]]:
    """A step of every part of a stack, each part in a process of its own as in the product."""
    by_name = {Path(spec.run_id): spec for spec in specs}
    context = multiprocessing.get_context("spawn")
    doors = []
    for folders in split(list(by_name), num_cores):
        ours, theirs = context.Pipe()
        part = [by_name[folder] for folder in folders]
        context.Process(target=_steps_on_demand, args=(theirs, part), daemon=True).start()
        doors.append(ours)

    def step() -> None:
        for door in doors:
            door.send(True)
        for door in doors:
            door.recv()

    yield step
    for door in doors:
        door.send(False)


def _steps_on_demand(door: Any, specs: Sequence[RunSpec]) -> None:
    as_in_training(1)
    step = stepper(*specs)
    while door.recv():
        step()
        door.send(True)


@pytest.mark.parametrize("d_model", [32, 64, 96, 256])
def test_share_of_matmul_peak(benchmark: Any, d_model: int) -> None:
    """FLOPs of the parameters that a token passes, head included, over a 1024-wide matmul's."""
    run = spec(d_model)
    flops = 6.0 * (run.n_active + VOCAB * d_model) * BATCH_TOKENS
    sides = [stepper(run), matmul()]

    def measure() -> dict[str, float]:
        seconds = in_turn(sides, (2, 4))
        return {"share_of_peak": flops / (2.0 * 1024**3) * ratio(seconds),
                "gflops_per_s": flops / statistics.median(seconds[0]) / 1e9}  # fmt: skip

    report(benchmark, measure)
