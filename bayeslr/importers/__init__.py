"""Foreign formats: one module each, the only place that knows that format.

Every module has ``read(path, *, family=None, ...) -> RunTable``.
"""

from __future__ import annotations
