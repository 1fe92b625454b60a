"""Child process that trains one run: ``python -m bayeslr_runners.moe RUN_DIR``.

Several folders are trained as one program: ``python -m bayeslr_runners.moe RUN_DIR...``.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from bayeslr.errors import BayeslrError
from bayeslr_runners.moe.options import Options

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def main(arguments: list[str]) -> int:
    """Train the runs of folders; the exit status, 0 if the records say all there is to say."""
    if not arguments:
        print("usage: python -m bayeslr_runners.moe RUN_DIR...", file=sys.stderr)  # noqa: T201
        return 2
    try:
        _train([Path(argument) for argument in arguments])
    except BayeslrError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _train(run_dirs: list[Path]) -> None:
    # PyTorch takes seconds to import: a broken spec is told before.
    from bayeslr_runners.moe.specfile import read_spec
    from bayeslr_runners.moe.stack import check_stack

    specs = [read_spec(run_dir) for run_dir in run_dirs]
    check_stack(specs)
    spec = specs[0]
    keep_freed_memory()
    import torch

    from bayeslr_runners.moe.train import train

    torch.set_num_threads(Options.from_mapping(spec.options).train.num_threads)
    torch.use_deterministic_algorithms(spec.options.get("device", "cpu") == "cpu")
    # Nothing here reads memory that it has not written: filling it first only takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    train(*run_dirs, progress=_terminal_line() if sys.stderr.isatty() else None)
    if sys.stderr.isatty():
        sys.stderr.write("\n")


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
