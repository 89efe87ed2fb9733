"""Any trainer that derives from `transformers.Trainer`, over trees.

    class Trainer(mtr.TreeTrainerMixin, trl.SFTTrainer): ...

`transformers.Trainer` needs none of this where weights are whole numbers: the model returns its loss, and the trainer
counts labels. The mixin divides by the sum of weights, whatever they are, over all batches and processes of an update;
it keeps TRL from computing a loss of its own; and it refuses what would change the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mtr.errors import UserError
from mtr.integrations.batch import Trees
from mtr.integrations.collator import TreeCollator
from mtr.integrations.forward import SEVERAL_GPUS

_LOGITS = "needs the logits of a sequence, and a model over trees returns its loss alone"
_OTHER_LOSS = {
    "label_smoothing_factor": "it is another loss",
    "neftune_noise_alpha": "turns share the embeddings that it would make noisy",
    "router_aux_loss_coef": "the loss is that of tokens, without an auxiliary one of routers",
    "packing": "trees are packed by mtr.TreeCollator; set per_device_train_batch_size",
    "eval_packing": "trees are packed by mtr.TreeCollator; set per_device_eval_batch_size",
    "padding_free": "trees are packed by mtr.TreeCollator, without padding",
    "assistant_only_loss": "which tokens are trained was decided by mtr.TreeBuilder (train_on)",
    "completion_only_loss": "which tokens are trained was decided by mtr.TreeBuilder (train_on)",
    "chat_template_path": "trees were rendered before; give mtr.TreeBuilder a tokenizer with that template",
    "use_liger_kernel": "it replaces the forward that computes trees",
}
"""Arguments of trainers that must not be set, and why."""
_OTHER_OPTIONS = {
    "compute_loss_func": _LOGITS,
    "compute_metrics": _LOGITS,
    "preprocess_logits_for_metrics": _LOGITS,
    "formatting_func": "would never be called: rows were rendered by mtr.TreeBuilder",
}
"""Arguments beside those, and why."""


class TreeTrainerMixin:
    """Goes before a trainer's class: the loss is sum(weight * nll) / sum(weight) of each update."""

    loss_is_scaled_for_ga = True
    """The loss is divided by the weights of all batches of an update, so not by their number."""

    def __init__(self, model: Any = None, args: Any = None, **options: Any) -> None:
        """As the trainer's, all but the first two by name, with `TreeCollator()` where no data_collator is given.

        Raises:
            UserError: an argument would change the loss, or the data.
        """
        check_arguments(args, options)
        if options.get("data_collator") is None:
            options["data_collator"] = TreeCollator()
        super().__init__(model, args, **options)  # type: ignore[call-arg]
        check_arguments(self.args, options)  # type: ignore[attr-defined]  # of the trainer's own kind now

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: Any
    ) -> tuple[list[Any], float]:
        """The batches of an update, and the sum of their weights over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        total = sum(_trees(batch).weight_sum for batch in batches)
        if accelerator.num_processes > 1:
            total = float(accelerator.gather(torch.tensor([total], dtype=torch.float64, device=device)).sum())
        return batches, total

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: float | None = None
    ) -> Any:
        """
        Args:
            num_items_in_batch: of `get_batch_samples`; each batch has a mean of its own in evaluation.
        """
        total = num_items_in_batch if model.training else None
        outputs = model(**inputs, num_items_in_batch=total)
        processes: int = self.accelerator.num_processes if total is not None else 1  # type: ignore[attr-defined]
        loss = outputs.loss * processes  # whose gradients are averaged
        return (loss, outputs) if return_outputs else loss


def _trees(batch: Any) -> Trees:
    found = batch.get("attention_mask")
    if not isinstance(found, Trees):
        raise UserError("a batch without trees: leave out data_collator, or give mtr.TreeCollator()")
    return found


def check_arguments(args: Any, options: dict[str, Any]) -> None:
    """
    Args:
        args: TrainingArguments or a class that derives from it; None for its defaults.
        options: other arguments of a trainer.

    Raises:
        UserError: one of them would change the loss, or the data.
    """
    for name, why in _OTHER_LOSS.items():
        value = getattr(args, name, None)
        if value or (value is False and name == "completion_only_loss"):  # of which None is the default
            raise UserError(f"{name}={value!r} does not go with trees: {why}; leave it out")
    if getattr(args, "loss_type", None) not in (None, "nll"):
        raise UserError(f"loss_type={args.loss_type!r} does not go with trees: leave it at 'nll'")
    for name, why in _OTHER_OPTIONS.items():
        if options.get(name) is not None:
            raise UserError(f"{name} {why}; leave it out")
    if hasattr(args, "dataset_kwargs"):  # TRL's, which would tokenize, cut and pack
        if not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise UserError("trees are ready to train: set dataset_kwargs={'skip_prepare_dataset': True}")
        if args.remove_unused_columns:
            raise UserError("the trainer would take away the columns of the trees: set remove_unused_columns=False")
    if getattr(args, "n_gpu", 1) > 1:
        raise UserError(SEVERAL_GPUS)
