"""Claims: the training step asks nothing of the host but what is logged, on meta tensors, for every kind of model; a
fault that is planted is found; the checks of FlashAttention's arguments find a wrong one; `scripts/cuda_check` fails
when something does not hold, and says what it lacks.

The rest of it, fake cuda tensors and kernels, takes minutes: see `scripts/cuda_check`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attention import CASES
from support.cuda import __main__ as command
from support.cuda import stub
from support.cuda.parts import JOBS, PARTS, Finished, Job
from support.cuda.plant import FAULTS
from support.cuda.step import COMBINATIONS, Combination, few, try_planted, try_step
from support.cuda.varlen import Call, problems
from support.masks import random_forest
from support.models import ARCHITECTURES, EXACT
from torch import Tensor

from mtr.tree.mask import FULL, Span
from mtr.tree.plan import varlen_plan

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

# --- step -------------------------------------------------------------------------------------------------------------

STEPS = {
    "qwen3": ("varlen", "selective", "lora", "bfloat16"),
    "llama": ("flex", "none", "whole", "float32"),
    "gemma2": ("auto", "full", "lora", "float32"),
    "gemma3": ("varlen", "offload", "whole", "bfloat16"),
    "gpt_oss": ("flex", "full", "lora", "bfloat16"),
    "qwen3_moe": ("varlen", "none", "lora", "bfloat16"),
    "deepseek_v3": ("flex", "selective", "whole", "bfloat16"),
}


@pytest.mark.parametrize("kind", EXACT)
def test_a_step_waits_for_the_device_only_to_log(kind: str) -> None:
    outcome = try_step(Combination("meta", kind, *STEPS[kind]))
    assert outcome.ok, outcome
    assert outcome.skipped is None
    assert {where for _, where in outcome.synchronizations} >= {
        "mtr.training.processes.clip_gradients",
        "mtr.training.processes.total",
    }
    assert outcome.operators > 1000


def test_faults_that_are_planted_are_found() -> None:
    outcomes = try_planted("meta")
    assert len(outcomes) == len(FAULTS)
    assert [outcome.fault for outcome in outcomes if not outcome.ok] == []


def test_a_model_that_is_refused_is_not_counted_as_run() -> None:
    outcome = try_step(Combination("meta", "gpt_oss", "sdpa", *STEPS["qwen3"][1:]))
    assert outcome.skipped
    assert "sinks" in outcome.skipped


def test_a_part_of_the_combinations_has_every_option_of_every_model() -> None:
    chosen = few(COMBINATIONS)
    assert len(chosen) < len(COMBINATIONS) / 4
    for device in ("meta", "fake cuda"):
        for kind in ARCHITECTURES:
            for name in ("attention", "checkpointing", "training", "dtype"):
                wanted = {getattr(one, name) for one in COMBINATIONS}
                found = {getattr(one, name) for one in chosen if (one.device, one.kind) == (device, kind)}
                assert found == wanted, (device, kind, name)


# --- varlen -----------------------------------------------------------------------------------------------------------

TREE = random_forest(0, 20)


def call(span: Span = FULL, **changes: Callable[[Tensor], Any]) -> list[str]:
    """What is said of a backward's arguments, changed by name; all of them lie on the meta device."""
    case, plan = CASES["grouped heads"], varlen_plan(TREE, span)
    gathered = len(plan.kv_index)
    sizes = {"query": (int(plan.cu_seq_q[-1]), case.heads), "key": (gathered, case.key_heads)}
    sizes |= {"value": sizes["key"], "out": sizes["query"], "grad_out": sizes["query"]}
    rows = {name: torch.empty(*size, 8, dtype=torch.bfloat16, device="meta") for name, size in sizes.items()}
    given: dict[str, Any] = {
        **rows,
        "logsumexp": torch.empty(case.heads, int(plan.cu_seq_q[-1]), device="meta"),
        "cum_seq_q": plan.cu_seq_q.to("meta"),
        "cum_seq_k": plan.cu_seq_k.to("meta"),
        "max_q": plan.max_q,
        "max_k": plan.max_k,
        "dropout_p": 0.0,
        "is_causal": not plan.window,
        "rng_state": torch.empty(2, dtype=torch.uint64, device="meta"),
        "scale": 0.3,
    }
    if plan.window:
        given |= {"window_size_left": plan.window - 1, "window_size_right": 0}
    given |= {name: change(given[name]) for name, change in changes.items()}
    found = problems(Call("_flash_attention_backward", given), plan)
    return [problem for problem in found if "is on meta" not in problem]


@pytest.mark.parametrize("span", [FULL, Span("sliding", 9)], ids=str)
def test_right_arguments_of_flash_attention(span: Span) -> None:
    assert call(span) == []


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("cum_seq_q", Tensor.long, "cum_seq_q is torch.int64"),
        ("cum_seq_k", lambda x: x.repeat_interleave(2)[::2], "not a contiguous int32"),
        ("query", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "side by side"),
        ("value", Tensor.half, "value is torch.float16 and query torch.bfloat16"),
        ("key", lambda x: x[1:], "cum_seq_k that does not end at the last key"),
        ("max_k", lambda x: x - 1, "max_k that is not the longest row's"),
        ("logsumexp", lambda x: x.T, "logsumexp"),
        ("logsumexp", Tensor.double, "logsumexp is not a contiguous float32"),
        ("is_causal", lambda x: not x, "is_causal and window"),
        ("rng_state", lambda x: x[:1], "rng_state"),
        ("grad_out", lambda x: x[:, 1:], "grad_out of shape"),
        ("out", lambda x: x.cpu() if x.is_cuda else torch.empty(x.shape, dtype=x.dtype), "out is on cpu"),
    ],
)
def test_a_wrong_argument_of_flash_attention_is_found(name: str, change: Callable[[Tensor], Any], said: str) -> None:
    found = call(FULL, **{name: change})
    assert any(said in problem for problem in found), found


def test_a_window_that_is_off_by_one_is_found() -> None:
    found = call(Span("sliding", 9), is_causal=lambda x: x)
    assert found == []
    (problem,) = call(Span("sliding", 9), window_size_left=lambda x: x + 1)
    assert "(False, 9, 0), not (False, 8, 0)" in problem


# --- the command ------------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, finish: Callable[[Job], Finished], *arguments: str) -> int:
    monkeypatch.setattr(command, "run_apart", lambda job, quick: finish(job))
    monkeypatch.setattr(sys, "argv", ["cuda_check", *arguments])
    return command.main()


def test_what_does_not_hold_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def finish(job: Job) -> Finished:
        result = {"case": "sinks", "calls": 2, "problems": [], "seconds": 0.1, "ok": True}
        return Finished(job, [result, result | {"ok": good, "problems": [] if good else ["wrong"]}], 1.0, None)

    for good in (True, False):
        file = tmp_path / f"{good}.json"
        code = run(monkeypatch, finish, "--only", "varlen", "--json", str(file))
        assert code == (0 if good else 1)
        assert json.loads(file.read_text())["ok"] is good
        assert ("wrong" in capsys.readouterr().out) is not good


def test_a_part_without_results_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, lambda job: Finished(job, [], 1.0, "missing: no C++ compiler")) == 1
    out = capsys.readouterr().out
    assert out.count("missing: no C++ compiler") == len(JOBS)
    assert max(map(len, out.splitlines())) <= 80
    assert [part for part in PARTS if f"{part}: DOES NOT HOLD" not in out] == []
    assert not Finished(JOBS[0], [], 1.0, None).ok


def test_what_the_stub_lacks_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(stub.MissingError, match="before torch is imported"):
        stub.load()
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(stub, "BUILD", tmp_path)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(stub, "_has_cuda", lambda: False)
        with pytest.raises(stub.MissingError, match="no C\\+\\+ compiler: install g\\+\\+"):
            stub.load()
        patch.setenv("CXX", "false")
        with pytest.raises(stub.MissingError, match="false cannot compile"):
            stub.load()
    monkeypatch.setattr(stub, "_has_cuda", lambda: True)
    with pytest.raises(stub.MissingError, match="built for CUDA"):
        stub.load()
