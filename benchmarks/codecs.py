"""What small messages cost in Dice: a real FKD run with each codec against the same run with plain float32 messages.

``python benchmarks/codecs.py --root DIR`` trains every arm for every seed (teachers once per seed) and prints the bytes
of a message, the Dice on test images, and the paired difference to plain messages in Dice points, with the interval
over patients for each seed and the interval over seeds. Interrupted, it goes on with the run it was in.

One JSON object per line.
"""

from __future__ import annotations

import json
from typing import Any

from _paired_runs import Arm, measure, parser


def codec(name: str, **settings: Any) -> dict[str, Any]:
    """Return a codec as YAML would have it."""
    return {"class_path": f"fkd_med.communication.{name}", "init_args": settings}


def packing(coded: dict[str, Any], delta: bool = False) -> str:
    """Return a packing: of weights, or of deltas whose losses are sent later."""
    settings: dict[str, Any] = {"codec": coded}
    if delta:
        settings |= {"of": "delta", "error_feedback": True}
    return json.dumps({"class_path": "fkd_med.communication.Packing", "init_args": settings})


def arm(name: str, up: str, down: str, *overlays: str) -> Arm:
    """Return an arm with these packings."""
    return Arm(name, ("--federation.uplink", up, "--federation.downlink", down), overlays, reference="plain")


INT8 = packing(codec("Int8", rounding="nearest"))
ARMS = [
    Arm("plain"),
    Arm("small_messages", (), ("algorithms/small_messages.yaml",), reference="plain"),
    arm("float16", packing(codec("Float16")), packing(codec("Float16"))),
    arm("int8", packing(codec("Int8")), INT8),
    arm("topk_0.1", packing(codec("TopK", fraction=0.1), delta=True), INT8),
    arm("low_rank_0.95", packing(codec("LowRank", energy=0.95, inner=codec("Int8")), delta=True), INT8),
    Arm("small_messages_recalibrated", (), ("algorithms/small_messages.yaml", "algorithms/recalibrate.yaml"), "plain"),
]

if __name__ == "__main__":
    measure(ARMS, parser(__doc__ or "", seeds=3).parse_args())
