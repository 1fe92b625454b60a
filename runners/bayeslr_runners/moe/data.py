"""Token sources: the standard library's text, the user's files, or the synthetic language.

Training and validation never share a file. A batch is a pure function of (seed, step), so a
resumed run sees what the unbroken one would have seen.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bayeslr.errors import SpecError
from bayeslr_runners.moe.language import MarkovLanguage
from bayeslr_runners.moe.options import DataOptions

Tokens = NDArray[np.integer]

# Folders whose content differs between distributions of the same Python.
_NOT_LIBRARY = frozenset(
    ("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test")
)
_SEPARATOR = b"\0"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training and validation tokens, with what identifies them.

    ``floor`` is the least possible loss in nats per token, where it is known.
    """

    train: Tokens
    val: Tokens
    vocab_size: int
    fingerprint: str
    floor: float | None = None


def load_corpus(options: DataOptions) -> Corpus:
    """Load the tokens that the options name. Raises: SpecError if there is nothing to read."""
    if options.data == "synthetic":
        return _synthetic(options)
    if options.data == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _bytes_by_file(root, sorted(_library_files(root)), options)
    path = Path(options.path or "").expanduser()
    if not path.exists():
        raise SpecError(f"options: path {str(path)!r} does not exist")
    if path.is_dir():
        files = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return _bytes_by_file(path, files, options)
    return _one_file(path, options)


def train_batch(
    corpus: Corpus, *, seed: int, step: int, num_sequences: int, seq_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Inputs and next-token targets of one step, each (num_sequences, seq_len).

    The windows start anywhere in the training tokens; they depend on seed and step alone.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = rng.integers(0, len(corpus.train) - seq_len, size=num_sequences)
    return _windows(corpus.train, starts, seq_len)


def val_batches(
    corpus: Corpus, *, val_tokens: int, num_sequences: int, seq_len: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Non-overlapping validation windows, spread evenly over the validation tokens.

    They are the same for every run with the same data and ``seq_len``.
    """
    available = (len(corpus.val) - 1) // seq_len
    wanted = min(available, max(1, val_tokens // seq_len))
    starts = (np.arange(wanted) * available // wanted) * seq_len
    for first in range(0, wanted, num_sequences):
        yield _windows(corpus.val, starts[first : first + num_sequences], seq_len)


def check_lengths(corpus: Corpus, *, seq_len: int) -> None:
    """Raise SpecError if either side of the split cannot hold a single window."""
    for side, tokens in (("training", corpus.train), ("validation", corpus.val)):
        if len(tokens) <= seq_len:
            raise SpecError(
                f"options: the {side} data hold {len(tokens)} tokens, but seq_len is {seq_len}; "
                "give more data, or change val_fraction"
            )


def is_validation(relative_path: str, val_fraction: float) -> bool:
    """Whether a file belongs to the validation side; decided by the hash of its path alone."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2.0**64


def _windows(
    tokens: Tokens, starts: NDArray[np.integer], seq_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    window = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    return window[:, :-1], window[:, 1:]


def _library_files(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        for name in files:
            # _sysconfigdata_*.py is written when Python is built and names the machine.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name).relative_to(root).as_posix()


def _bytes_by_file(root: Path, relative_paths: list[str], options: DataOptions) -> Corpus:
    if not relative_paths:
        raise SpecError(
            f"options: no text was found under {root}; use data = 'synthetic', or data = 'path' "
            "with a file or folder of your own"
        )
    sides: dict[bool, list[bytes]] = {False: [], True: []}
    digest = hashlib.sha256()
    for relative in relative_paths:
        try:
            content = (root / relative).read_bytes()
        except OSError as error:
            raise SpecError(f"options: cannot read {root / relative}: {error.strerror}") from error
        digest.update(f"{relative}\0{len(content)}\0".encode())
        digest.update(content)
        sides[is_validation(relative, options.val_fraction)].append(content)
    if not sides[True] or not sides[False]:
        side = "training" if sides[True] else "validation"
        raise SpecError(
            f"options: with {len(relative_paths)} file(s) and val_fraction = "
            f"{options.val_fraction} no file under {root} falls on the {side} side; change "
            "val_fraction, or join the text into one file (then its end is the validation side)"
        )
    train, val = (
        np.frombuffer(_SEPARATOR.join(sides[side]), dtype=np.uint8) for side in (False, True)
    )
    return Corpus(train, val, 256, digest.hexdigest())


def _one_file(path: Path, options: DataOptions) -> Corpus:
    try:
        if path.suffix == ".npy":
            tokens: Tokens = np.load(path, mmap_mode="r")
        elif path.suffix == ".bin":
            tokens = np.memmap(path, dtype=np.uint16, mode="r")
        else:
            tokens = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    # NumPy's words for a file that is empty, cut off or no array at all.
    except (OSError, ValueError, EOFError) as error:
        raise SpecError(f"options: cannot read {path} as an array of tokens: {error}") from error
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise SpecError(
            f"options: {path} must hold a one-dimensional array of whole numbers, got "
            f"{tokens.dtype} with shape {tokens.shape}"
        )
    if len(tokens) < 2:
        raise SpecError(f"options: {path} holds {len(tokens)} tokens")
    largest = int(tokens.max())
    is_bytes = tokens.dtype == np.uint8
    vocab_size = options.vocab_size or (256 if is_bytes else largest + 1)
    if largest >= vocab_size or int(tokens.min()) < 0:
        raise SpecError(
            f"options: {path} holds token {largest if largest >= vocab_size else tokens.min()}, "
            f"outside a vocabulary of {vocab_size}; set vocab_size"
        )
    num_val = max(1, round(len(tokens) * options.val_fraction))
    digest = hashlib.sha256(np.ascontiguousarray(tokens).data)
    return Corpus(tokens[:-num_val], tokens[-num_val:], vocab_size, digest.hexdigest())


def _synthetic(options: DataOptions) -> Corpus:
    seed = options.synthetic_seed
    language = MarkovLanguage.build(
        vocab_size=options.synthetic_vocab,
        order=options.synthetic_order,
        branching=options.synthetic_branching,
        seed=seed,
    )
    num_val = max(options.val_tokens * 2, round(options.synthetic_tokens * options.val_fraction))
    train = language.sample(options.synthetic_tokens, seed=2 * seed + 1)
    val = language.sample(num_val, seed=2 * seed + 2)
    digest = hashlib.sha256(train.data)
    digest.update(val.data)
    return Corpus(train, val, options.synthetic_vocab, digest.hexdigest(), language.entropy_rate())
