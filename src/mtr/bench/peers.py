"""The same conversations through another trainer, where it is installed.

TRL gets what its users would give it: each turn as a sequence of its own, thinking included, labels on the completion,
packed without padding ("bfd"), the model's own attention with positions that keep the sequences apart. One optimizer
step holds all packs, so that its loss is the weighted mean that mtr computes. Times are taken from its own callbacks:

    forward_backward  from the begin of the step to where the optimizer is called; no clipping
    step              with the optimizer

Its data loading is left out on both sides, and so is its preparation of the data set. The learning rate is 0, so that
every step does the same work on the same weights.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import tempfile
import time
from typing import Any

import torch

from mtr.attention.interface import use_own_attention
from mtr.bench.synthetic import make_tokenizer
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
    """Seconds of TRL's SFTTrainer for these conversations, after a warm-up step.

    Args:
        single_pass: `seconds` and `loss` of ours, to compare with.
    """
    import datasets
    import trl
    from transformers import PrinterCallback

    sequences = [view for group in views for view in group]
    use_own_attention(model)
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        model.set_attn_implementation("flash_attention_2")
    rows = {
        "input_ids": [view.ids.tolist() for view in sequences],
        "labels": [[-100] * len(view.prompt_ids) + view.completion_ids.tolist() for view in sequences],
    }
    showed = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    clock = _clock(device)
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
            max_steps=repeats + 1,
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
    if showed:
        datasets.enable_progress_bars()
    if recipe.training.checkpointing != "none":
        model.disable_input_require_grads()  # TRL asks for them where LoRA is checkpointed
    model.zero_grad(set_to_none=True)
    seconds = {"forward_backward": clock.forward_backward[1:], "step": clock.step[1:]}
    comparable = len({float(weight) for view in sequences for weight in view.weights}) == 1
    return {
        "version": importlib.metadata.version("trl"),
        "attention": model.config._attn_implementation,
        "packs": packs,
        "num_tokens": sum(view.num_tokens for view in sequences),
        "seconds": {name: _spread(taken) for name, taken in seconds.items()},
        "loss": losses[-1],
        "relative_loss_difference": abs(losses[-1] / single_pass["loss"] - 1) if comparable else None,
        "speedup": statistics.median(seconds["forward_backward"]) / single_pass["seconds"],
    }


def _spread(taken: list[float]) -> dict[str, float]:
    return {"min": min(taken), "median": statistics.median(taken), "max": max(taken)}


def _clock(device: torch.device) -> Any:
    """A callback that notes when a step began, when its gradients were there, and when it was done."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.began = 0.0
            self.forward_backward: list[float] = []
            self.step: list[float] = []

        def _since(self) -> float:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - self.began

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._since()
            self.began = time.perf_counter()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.forward_backward.append(self._since())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.step.append(self._since())

    return Clock()
