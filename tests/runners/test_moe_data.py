"""Corpora: the split, the batches, the synthetic language."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from bayeslr.errors import SpecError
from bayeslr_runners.moe.data import (
    Corpus,
    check_lengths,
    is_validation,
    load_corpus,
    train_batch,
    val_batches,
)
from bayeslr_runners.moe.language import UNIFORM_SHARE, MarkovLanguage
from bayeslr_runners.moe.options import DataOptions


@pytest.fixture
def counting() -> Corpus:
    """Tokens that say their own position."""
    return Corpus(np.arange(1000), np.arange(5000, 5100), 6000, "x")


def test_standard_library_is_read_the_same_twice() -> None:
    first, again = load_corpus(DataOptions()), load_corpus(DataOptions())
    assert first.fingerprint == again.fingerprint
    assert np.array_equal(first.val, again.val)
    assert first.vocab_size == 256
    assert len(first.train) > 2_000_000
    assert 0.01 < len(first.val) / len(first.train) < 0.15
    assert b"import" in first.val.tobytes()


def test_files_are_split_whole(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"<{i}>")
    corpus = load_corpus(DataOptions(data="path", path=str(tmp_path), val_fraction=0.3))
    train = set(corpus.train.tobytes().split(b"\0"))
    val = set(corpus.val.tobytes().split(b"\0"))
    assert train.isdisjoint(val)
    assert train | val == {f"<{i}>".encode() for i in range(60)}
    assert val == {f"<{i}>".encode() for i in range(60) if is_validation(f"{i}.txt", 0.3)}


def test_the_split_of_a_file_does_not_depend_on_the_other_files(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"<{i}>")
    before = load_corpus(DataOptions(data="path", path=str(tmp_path), val_fraction=0.3))
    (tmp_path / "0new.txt").write_text("<new>")
    after = load_corpus(DataOptions(data="path", path=str(tmp_path), val_fraction=0.3))
    assert set(before.val.tobytes().split(b"\0")) <= set(after.val.tobytes().split(b"\0"))
    assert before.fingerprint != after.fingerprint


def test_a_single_file_is_split_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(200)))
    corpus = load_corpus(DataOptions(data="path", path=str(path), val_fraction=0.25))
    assert corpus.train.tolist() == list(range(150))
    assert corpus.val.tolist() == list(range(150, 200))


def test_a_token_array_keeps_its_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([3, 999, 2, 5], dtype=np.int32))
    assert load_corpus(DataOptions(data="path", path=str(path))).vocab_size == 1000
    with pytest.raises(SpecError, match="holds token 999, outside a vocabulary of 500"):
        load_corpus(DataOptions(data="path", path=str(path), vocab_size=500))


@pytest.mark.parametrize(
    "name",
    ["missing.txt", "floats.npy", "text.npy", "empty.npy", "empty.txt", "empty.bin", "odd.bin",
     "folder"],
)  # fmt: skip
def test_unusable_data_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    for empty in ("empty.npy", "empty.bin"):
        (tmp_path / empty).touch()
    np.save(tmp_path / "floats.npy", np.zeros(5))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(SpecError, match=name):
        load_corpus(DataOptions(data="path", path=str(tmp_path / name)))


def test_too_short_data_are_refused(counting: Corpus) -> None:
    check_lengths(counting, seq_len=99)
    with pytest.raises(SpecError, match="validation data hold 100 tokens, but seq_len is 100"):
        check_lengths(counting, seq_len=100)


def test_a_batch_depends_on_seed_and_step_alone(counting: Corpus) -> None:
    def batch(seed: int, step: int) -> np.ndarray:
        return train_batch(counting, seed=seed, step=step, num_sequences=4, seq_len=8)[0]

    later = batch(1, 7)
    batch(1, 8)
    assert np.array_equal(batch(1, 7), later)
    assert not np.array_equal(batch(1, 8), later)
    assert not np.array_equal(batch(2, 7), later)


def test_targets_are_the_next_tokens(counting: Corpus) -> None:
    inputs, targets = train_batch(counting, seed=0, step=0, num_sequences=64, seq_len=8)
    assert np.array_equal(targets, inputs + 1)
    assert targets.max() < 1000


def test_the_global_generator_is_left_alone(counting: Corpus) -> None:
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    train_batch(counting, seed=0, step=0, num_sequences=4, seq_len=8)
    assert np.random.random() == expected  # noqa: NPY002


def test_validation_windows_do_not_overlap(counting: Corpus) -> None:
    windows = np.concatenate(
        [x for x, _ in val_batches(counting, val_tokens=64, num_sequences=3, seq_len=8)]
    )
    assert windows.shape == (8, 8)
    assert len(set(windows.ravel().tolist())) == 64
    assert windows.min() >= 5000


def language(**changes: int) -> MarkovLanguage:
    values = {"vocab_size": 8, "order": 2, "branching": 3, "seed": 4} | changes
    return MarkovLanguage.build(**values)


def test_entropy_rate_equals_the_dense_calculation() -> None:
    """Against the eigenvector and the full transition matrix."""
    chain = language()
    num_contexts, vocab = len(chain.successors), chain.vocab_size
    next_token = np.full((num_contexts, vocab), UNIFORM_SHARE / vocab)
    rows = np.arange(num_contexts)[:, None]
    next_token[rows, chain.successors] += (1 - UNIFORM_SHARE) * chain.probabilities
    transition = np.zeros((num_contexts, num_contexts))
    for context in range(num_contexts):
        for token in range(vocab):
            following = (context * vocab + token) % num_contexts
            transition[context, following] += next_token[context, token]
    values, vectors = np.linalg.eig(transition.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    entropy = -(next_token * np.log(next_token)).sum(1)
    assert chain.entropy_rate() == pytest.approx(stationary @ entropy, abs=1e-9)
    assert chain.stationary() == pytest.approx(stationary, abs=1e-9)


def test_no_context_model_does_better_than_the_entropy_rate() -> None:
    """4 standard errors around the rate: fails 1 in 16 000 if correct."""
    chain = language()
    sample = chain.sample(400_000, seed=9)
    length = -(-400_000 // (400_000 // 1024))
    rows = sample[: len(sample) // length * length].reshape(-1, length).astype(int)
    context = rows[:, :-2] * 8 + rows[:, 1:-1]
    probability = np.full((64, 8), UNIFORM_SHARE / 8)
    np.add.at(
        probability,
        (np.arange(64)[:, None], chain.successors),
        (1 - UNIFORM_SHARE) * chain.probabilities,
    )
    surprise = -np.log(probability[context, rows[:, 2:]]).ravel()
    error = 4 * surprise.std() / math.sqrt(len(surprise))
    assert abs(surprise.mean() - chain.entropy_rate()) < error
    # A test with power: the entropy of the tokens alone is far outside.
    share = np.bincount(sample) / len(sample)
    assert -(share * np.log(share)).sum() > chain.entropy_rate() + 10 * error


def test_synthetic_corpus_knows_its_floor() -> None:
    options = DataOptions(data="synthetic", synthetic_tokens=50_000, val_tokens=1000)
    corpus = load_corpus(options)
    assert corpus.floor is not None
    assert 0 < corpus.floor < math.log(corpus.vocab_size)
    assert len(corpus.train) == 50_000
    assert load_corpus(options).fingerprint == corpus.fingerprint
    other = DataOptions(
        data="synthetic", synthetic_tokens=50_000, val_tokens=1000, synthetic_seed=1
    )
    assert load_corpus(other).fingerprint != corpus.fingerprint


def test_too_large_a_language_is_refused() -> None:
    with pytest.raises(SpecError, match="synthetic_vocab \\^ synthetic_order"):
        language(vocab_size=256, order=3)
