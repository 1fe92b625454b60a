"""What several verbs read from a command line in one way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from bayeslr.errors import SpecError


def key_values(words: Sequence[str], flag: str) -> dict[str, Any]:
    """Mapping from words KEY=VALUE: JSON where a value is JSON, else text.

    Raises: SpecError that names the flag.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise SpecError(f"{flag}: expected KEY=VALUE, got {word!r}")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
