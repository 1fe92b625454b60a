"""First program of every child process: tie the child to its parent, keep twins out, exec.

Run by path, without site-packages:
``python -I -S launch.py PARENT_PID LOCK RECORDS [LOCK RECORDS]... -- COMMAND...``.
The locks outlive the exec and belong to the whole process tree of the trainer, so a trainer that
survived its parent (where the kernel cannot prevent that) finishes before a second one starts.
"""

from __future__ import annotations

import fcntl
import os
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SIGKILL = 9


def main(parent: int, files: list[str], command: list[str]) -> None:
    """Never returns: becomes the command, or exits with 126 where it cannot be started.

    files: of each run that is trained, the path of its lock and that of its records.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            sys.exit(1)
    for lock_path, records_path in zip(files[::2], files[1::2], strict=True):
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock, True)
        end_last_line(records_path)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"cannot start {command[0]!r}: {error.strerror}\n")
        sys.exit(126)


def end_last_line(path: str) -> None:
    """Close a line that a killed writer left open, so that the next record stands alone."""
    if not os.path.exists(path):
        return
    with open(path, "rb+") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


if __name__ == "__main__":
    end = sys.argv.index("--")
    main(int(sys.argv[1]), sys.argv[2:end], sys.argv[end + 1 :])
