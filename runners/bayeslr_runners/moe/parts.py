"""A stack in parts, each with a core of its own; loads no PyTorch.

The operators of a small network hardly gain from a second thread, and two single-threaded programs
do not wait for each other: a program a core trains more runs an hour than one on all cores. Which
run is in which part follows from the order of the folders alone.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

MAX_MEMBERS = 8
"""Members of one program: beyond eight, memory grows and the time a run takes hardly falls."""

_FLAG = "--part="
_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Part(NamedTuple):
    """One of the children that share a stack: which, its threads, the process that started it."""

    number: int
    num_threads: int
    parent: int


def split(run_dirs: Sequence[Path], num_cores: int) -> list[list[Path]]:
    """Folders of each part: a part a core, or several a core to keep all within `MAX_MEMBERS`.

    Sizes differ by one at most; no part is empty.
    """
    rounds = math.ceil(len(run_dirs) / (MAX_MEMBERS * num_cores))
    number = min(len(run_dirs), rounds * num_cores)
    return [list(run_dirs[i::number]) for i in range(number)]


def part_of(arguments: Sequence[str]) -> tuple[Part | None, list[Path]]:
    """Which part a command line is for (None: all there is), and the folders."""
    part = None
    if arguments and arguments[0].startswith(_FLAG):
        number, num_threads, parent = arguments[0].removeprefix(_FLAG).split(",")
        part = Part(int(number), int(num_threads), int(parent))
        arguments = arguments[1:]
    return part, [Path(argument) for argument in arguments]


def train_parts(parts: Sequence[Sequence[Path]], num_cores: int) -> int:
    """Train each part in a child of its own, ``num_cores`` children at most; the exit status.

    A part that breaks leaves the others to end; its status is returned. Whatever ends this early
    ends the children too; their runs go on from their checkpoints.
    """
    num_threads = max(1, num_cores // len(parts))
    waiting = [(Part(i, num_threads, os.getpid()), run_dirs) for i, run_dirs in enumerate(parts)]
    running: list[subprocess.Popen[bytes]] = []
    status = 0
    try:
        while waiting or running:
            while waiting and len(running) < num_cores:
                running.append(_start(*waiting.pop(0)))
            time.sleep(_POLL_SECONDS)
            for child in [child for child in running if child.poll() is not None]:
                running.remove(child)
                status = status or child.returncode
    finally:
        for child in running:
            child.terminate()
        for child in running:
            child.wait()
    return status if status >= 0 else 128 - status


def end_with(parent: int) -> None:
    """Let the kernel end this process when its parent does (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            sys.exit(1)


def _start(part: Part, run_dirs: Sequence[Path]) -> subprocess.Popen[bytes]:
    flag = f"{_FLAG}{part.number},{part.num_threads},{part.parent}"
    # Inheritable descriptors go along: a lock on the folders holds until the last part has ended.
    return subprocess.Popen(
        [sys.executable, "-m", "bayeslr_runners.moe", flag, *map(str, run_dirs)], close_fds=False
    )
