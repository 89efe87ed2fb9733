"""The same conversations through another trainer, TRL, if it is installed.

TRL gets what its users would give it: each turn as a sequence of its own, thinking included, labels on the completion,
packed without padding ("bfd"), the model's own attention with positions that keep the sequences apart. One optimizer
step covers all packs, so that its loss is the weighted mean that mtr computes. Times are taken by a callback:

    forward_backward  from the beginning of the step to the call of the optimizer; no clipping
    step              the same and the optimizer

Data loading is left out on both sides, and so is TRL's preparation of the data set. The learning rate is 0, so that
every step does the same work on the same weights.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mtr.attention.interface import use_own_attention
from mtr.bench.timing import spread, wait
from mtr.bench.tokenizer import make_tokenizer
from mtr.errors import UserError
from mtr.recipe.sections import Recipe
from mtr.tree.layout import View


def check_trl() -> None:
    """
    Raises:
        UserError: TRL is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise UserError("--vs trl: TRL is not installed; pip install 'mtr[trl]', or pip install trl")


def time_trl(
    model: Any,
    recipe: Recipe,
    views: list[list[View]],
    device: torch.device,
    repeats: int,
    single_pass: dict[str, float],
) -> dict[str, Any]:
    """Seconds that TRL's SFTTrainer takes for these conversations, after a warm-up step.

    Args:
        single_pass: `seconds` and `loss` of the single pass, to compare with.

    Returns:
        The `trl` of `mtr bench --json`.
    """
    sequences = [view for group in views for view in group]
    use_own_attention(model)
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        model.set_attn_implementation("flash_attention_2")
    clock = _clock(device)
    with _no_progress_bars():
        packs, loss = _train(model, recipe, sequences, device, repeats + 1, clock)
    if recipe.training.checkpointing != "none":
        model.disable_input_require_grads()  # TRL turns them on for LoRA with checkpointing
    model.zero_grad(set_to_none=True)
    forward_backward, step = clock.forward_backward[1:], clock.step[1:]
    comparable = len({float(weight) for view in sequences for weight in view.weights}) == 1
    return {
        "version": importlib.metadata.version("trl"),
        "attention": model.config._attn_implementation,
        "packs": packs,
        "num_tokens": sum(view.num_tokens for view in sequences),
        "seconds": {"forward_backward": spread(forward_backward), "step": spread(step)},
        "loss": loss,
        "relative_loss_difference": abs(loss / single_pass["loss"] - 1) if comparable else None,
        "speedup": statistics.median(forward_backward) / single_pass["seconds"],
    }


def _train(
    model: Any, recipe: Recipe, sequences: Sequence[View], device: torch.device, steps: int, clock: Any
) -> tuple[int, float]:
    """Steps over all sequences; how many packs a step has, and the loss of the last one."""
    import datasets
    import trl
    from transformers import PrinterCallback

    rows = {
        "input_ids": [view.ids.tolist() for view in sequences],
        "labels": [[-100] * len(view.prompt_ids) + view.completion_ids.tolist() for view in sequences],
    }
    with tempfile.TemporaryDirectory() as folder:
        data = datasets.Dataset.from_dict(rows)
        packs = len(trl.pack_dataset(data, recipe.sequence.budget, "bfd"))
        arguments = trl.SFTConfig(
            output_dir=folder,
            packing=True,
            packing_strategy="bfd",
            max_length=recipe.sequence.budget,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=packs,
            max_steps=steps,
            learning_rate=0.0,
            max_grad_norm=0.0,
            gradient_checkpointing=recipe.training.checkpointing != "none",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=False,  # the weights' own dtype on both sides, no autocast
            fp16=False,
            use_cpu=device.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=recipe.training.seed,
        )
        trainer = trl.SFTTrainer(
            model=model, args=arguments, train_dataset=data, processing_class=make_tokenizer([]), callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return packs, losses[-1]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _clock(device: torch.device) -> Any:
    """A callback that notes for each step the seconds until its gradients are there, and until it is done."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.began = 0.0
            self.forward_backward: list[float] = []
            self.step: list[float] = []

        def _since(self) -> float:
            wait(device)
            return time.perf_counter() - self.began

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait(device)
            self.began = time.perf_counter()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.forward_backward.append(self._since())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.step.append(self._since())

    return Clock()
