"""How much memory the loss takes: 16k predicting positions with a vocabulary of 150k, forward and backward, on the CPU.

    python benchmarks/loss_memory.py [--json FILE]

The full logits would take positions x vocabulary x 4 bytes. The peak is that of the resident set beyond inputs and
weights. Gradients are compared with those of the full logits for the first positions, as many as fit in memory.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from mtr.files import write_json
from mtr.model.device import peak_memory, reset_peak_memory
from mtr.model.loss import chunk_size, weighted_nll
from mtr.training.environment import environment

CPU = torch.device("cpu")


def measure(
    predictors: int = 16_384, vocabulary: int = 151_936, width: int = 64, compared: int = 1_024
) -> dict[str, Any]:
    """Peak memory of the loss at this size, and the difference between its gradients and those of the full logits."""
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False)
    head.weight.requires_grad_(False)
    hidden = torch.randn(predictors, width, requires_grad=True)
    target = torch.randint(vocabulary, (predictors,))
    weight = torch.rand(predictors, dtype=torch.float64)
    chunk = chunk_size(vocabulary)
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    began = time.perf_counter()
    torch.autograd.backward(weighted_nll(hidden, head, [], target, weight, chunk))
    seconds, peak = time.perf_counter() - began, peak_memory(CPU) - before
    assert hidden.grad is not None

    part = hidden[:compared].detach().requires_grad_()
    losses = cross_entropy(head(part), target[:compared], reduction="none") * weight[:compared]
    torch.autograd.backward(losses.sum())
    assert part.grad is not None
    difference = float((hidden.grad[:compared] - part.grad).abs().max() / part.grad.abs().max())
    full = predictors * vocabulary * 4
    return {
        "predictors": predictors,
        "vocabulary": vocabulary,
        "width": width,
        "chunk": chunk,
        "seconds": seconds,
        "peak_bytes": peak,
        "full_logits_bytes": full,
        "share_of_full_logits": peak / full,
        "max_relative_gradient_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure() | {"environment": environment(0, CPU, 1, time.strftime("%Y-%m-%d"))}
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
