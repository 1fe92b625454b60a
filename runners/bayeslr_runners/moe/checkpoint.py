"""Atomic checkpoints: a reader finds the old one or the new one, never a torn one."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from bayeslr.errors import StorageError


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the state beside the old checkpoint, then take its place.

    Raises: StorageError if the disk refuses; the old checkpoint is then untouched.
    """
    # Serialised in memory first: a failed write then is a plain OSError, with nothing half done.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageError(
            f"cannot write {path}: {error.strerror}; free some space and start the run again, it "
            "goes on from its last checkpoint"
        ) from error


def load(path: Path) -> dict[str, Any] | None:
    """The checkpoint, None if there is none. Raises: StorageError if it cannot be read."""
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file raises whatever the part of the unpickler that trips over it raises.
    except Exception as error:
        raise StorageError(
            f"{path} cannot be read ({type(error).__name__}); delete it to start the run afresh"
        ) from error
    return state
