"""What may make the host wait for the device in a step, and why."""

from __future__ import annotations

GROUPED = "grouped product in float32"

ON_PURPOSE = {
    "mtr.training.processes.clip_gradients": "the gradient's norm is logged, and an update that is not finite left out",
    "mtr.training.processes.total": "the step's loss is logged, and an update that is not finite left out",
    "mtr.attention.choice._timed": "attention: auto measures its candidates, once a run",
}
"""By function."""

KNOWN = {GROUPED: "experts in float32: torch's CUDA kernel is for bfloat16, other products are made group by group"}
"""By what is done, in torch itself."""
