"""Child process that trains one run: ``python -m bayeslr_runners.moe RUN_DIR``.

Several folders are trained as one program, or one a core (`parts`):
``python -m bayeslr_runners.moe RUN_DIR...``.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from bayeslr.errors import BayeslrError
from bayeslr_runners.moe.options import Options
from bayeslr_runners.moe.parts import Part, end_with, part_of, split, train_parts

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def main(arguments: list[str]) -> int:
    """Train the runs of folders; the exit status, 0 if the records say all there is to say."""
    if not arguments:
        print("usage: python -m bayeslr_runners.moe RUN_DIR...", file=sys.stderr)  # noqa: T201
        return 2
    try:
        return _train(*part_of(arguments))
    except BayeslrError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _train(part: Part | None, run_dirs: list[Path]) -> int:
    # PyTorch takes seconds to import: a broken spec is told before.
    from bayeslr_runners.moe.specfile import read_spec
    from bayeslr_runners.moe.stack import check_stack

    specs = [read_spec(run_dir) for run_dir in run_dirs]
    check_stack(specs)
    options = Options.from_mapping(specs[0].options).train
    num_threads = part.num_threads if part else options.num_threads
    if part:
        end_with(part.parent)
    elif options.device == "cpu" and len(run_dirs) > 1:
        parts = split(run_dirs, num_threads)
        if len(parts) > 1:
            return train_parts(parts, num_threads)
    keep_freed_memory()
    import torch

    from bayeslr_runners.moe.train import train

    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(options.device == "cpu")
    # Nothing here reads memory that it has not written: filling it first only takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    shown = sys.stderr.isatty() and (part is None or part.number == 0)
    train(*run_dirs, progress=_terminal_line() if shown else None)
    if shown:
        sys.stderr.write("\n")
    return 0


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks for reuse.

    By default it returns each block of a few megabytes to the system and has it cleared again on
    the next step: a third of the time of a small network.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _terminal_line() -> Callable[[str], None]:
    def show(line: str) -> None:
        sys.stderr.write(f"\r\033[K{line}")
        sys.stderr.flush()

    return show


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
