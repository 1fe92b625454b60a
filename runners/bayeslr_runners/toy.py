"""A trainer that trains nothing: a known valley, for trying a sweep and for writing one's own.

It speaks the whole runner protocol in a page: reads the spec, appends records, keeps a checkpoint,
goes on from it when started again. ``python -m bayeslr_runners.toy SPEC RECORDS DIR``; the recipe's
options ``seconds`` (wall time of a run) and ``noise`` (nats) are its own.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

NUM_STEPS = 10

# Loss and LR law of the toy world; the exponents are near Step Law's, the offsets make 1e5 to 1e7
# parameters and 1e5 to 1e7 tokens land at losses and LRs that small proxies have.
FLOOR, SIZE_SCALE, SIZE_EXPONENT, TOKEN_SCALE, TOKEN_EXPONENT = 1.2, 8.0, 0.15, 20.0, 0.25
LR_AT_REFERENCE, LR_SIZE_EXPONENT, LR_TOKEN_EXPONENT, LR_BATCH_EXPONENT = 8e-3, -0.3, -0.1, 0.3
REFERENCE_PARAMS, REFERENCE_TOKENS, REFERENCE_BATCH = 1e6, 1e6, 4096.0
CURVATURE, SKEW, EDGE = 0.06, 0.15, math.log(10.0)


def best_lr(n_active: float, tokens: float, batch_tokens: float) -> float:
    """Optimum LR of the toy world."""
    lr: float = (
        LR_AT_REFERENCE
        * (n_active / REFERENCE_PARAMS) ** LR_SIZE_EXPONENT
        * (tokens / REFERENCE_TOKENS) ** LR_TOKEN_EXPONENT
        * (batch_tokens / REFERENCE_BATCH) ** LR_BATCH_EXPONENT
    )
    return lr


def loss_of(spec: dict[str, Any], tokens: float) -> float | None:
    """Loss after so many tokens, in nats a token; None beyond the edge of divergence."""
    u = math.log(spec["lr"] / best_lr(spec["n_active"], tokens, spec["batch_tokens"]))
    if u > EDGE:
        return None
    floor: float = (
        FLOOR
        + SIZE_SCALE * spec["n_active"] ** -SIZE_EXPONENT
        + TOKEN_SCALE * tokens**-TOKEN_EXPONENT
    )
    noise = random.Random(f"{spec['seed']}/{spec['run_id']}/{tokens}").gauss(0.0, 1.0)
    valley = CURVATURE * u * u * math.exp(SKEW * u)
    return floor + valley + float(spec["options"].get("noise", 1e-3)) * noise


def main(spec_path: str, records_path: str, folder: str) -> None:
    """Train one run."""
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    checkpoint = Path(folder) / "checkpoint.json"
    start = json.loads(checkpoint.read_text(encoding="utf-8")) if checkpoint.exists() else 0
    for step in range(start, NUM_STEPS):
        time.sleep(float(spec["options"].get("seconds", 0.0)) / NUM_STEPS)
        low, high = (spec["tokens"] * s // NUM_STEPS for s in (step, step + 1))
        ends = [t for t in spec["decay_at"] if low < t <= high]
        with open(records_path, "a", encoding="utf-8") as records:
            for tokens in ends or [high]:
                loss = loss_of(spec, tokens)
                records.write(json.dumps({"tokens": tokens, "loss": loss}) + "\n")
                if loss is None:
                    return
        temporary = checkpoint.with_suffix(".tmp")
        temporary.write_text(json.dumps(step + 1), encoding="utf-8")
        os.replace(temporary, checkpoint)


if __name__ == "__main__":
    main(*sys.argv[1:])
