"""Child process that trains one run: ``python -m bayeslr_runners.moe RUN_DIR``."""

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
    """Train the run of a folder; the exit status, 0 if its records say all there is to say."""
    if len(arguments) != 1:
        print("usage: python -m bayeslr_runners.moe RUN_DIR", file=sys.stderr)  # noqa: T201
        return 2
    try:
        _train(Path(arguments[0]))
    except BayeslrError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _train(run_dir: Path) -> None:
    # PyTorch takes seconds to import: a broken spec is told before.
    from bayeslr_runners.moe.specfile import read_spec

    spec = read_spec(run_dir)
    keep_freed_memory()
    import torch

    from bayeslr_runners.moe.train import train

    torch.set_num_threads(Options.from_mapping(spec.options).train.num_threads)
    torch.use_deterministic_algorithms(spec.options.get("device", "cpu") == "cpu")
    train(run_dir, progress=_terminal_line() if sys.stderr.isatty() else None)
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
