"""The keys of `training`."""

# ruff: noqa: RUF012  (pydantic copies defaults)

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, StrictFloat, StrictInt, model_validator

from mtr.recipe.schedules import Schedule, as_kwargs, as_schedule, check_schedule
from mtr.recipe.values import Name, Positive, Section, as_signals, as_trackers, repository

Checkpointing = Literal["none", "products", "selective", "full", "offload", "auto"]
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_8bit",
    "muon",
    "schedule_free_adamw",
    "adafactor",
    "sgd",
]
SHARDED: tuple[Optimizer, ...] = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Those whose update of a weight is that of its shards, so that fsdp2 may shard it."""
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "aim", "clearml", "comet_ml", "dvclive", "swanlab"]


class TrainingSection(Section):
    output_dir: Name
    """A new or empty folder for adapter, metrics and checkpoints; with --resume or --overwrite that of the run."""
    conversations_per_step: Annotated[int, Field(gt=0, le=10**6)] = 16
    """Conversations per update, over all processes together; at most 1,000,000."""
    num_train_epochs: Annotated[float, Field(gt=0, le=10**6)] = 1
    """Passes over data.train, at most 1,000,000."""
    max_steps: Annotated[int, Field(gt=0, le=10**9)] | None = None
    """Overrides num_train_epochs and repeats the data as needed; at most 1,000,000,000."""
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 2.0e-4
    """The highest of the schedule, at most 100."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0, le=10**4)] | None = None
    """LoRA+: the B matrices of adapters learn at this many times learning_rate, at most 10,000; null: all alike."""
    lr_scheduler_type: Annotated[Schedule, BeforeValidator(as_schedule)] = "cosine"
    """A schedule of transformers. It scales all learning rates alike."""
    lr_scheduler_kwargs: Annotated[dict[str, StrictInt | StrictFloat | str], BeforeValidator(as_kwargs)] = {}
    """Its arguments, e.g. {min_lr_rate: 0.1} for cosine_with_min_lr, {num_decay_steps: 0.2} for warmup_stable_decay
    (below 1 a share of all steps)."""
    warmup_steps: Annotated[float, Field(ge=0, le=10**9)] = 0.03
    """A number of steps, at most 1,000,000,000, or if below 1, a share of all steps; never the last step."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Decoupled from the gradient where the optimizer has it so (AdamW); at most 100."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients of a larger norm are scaled down to it."""
    optim: Optimizer = "adamw_torch"
    """adamw_8bit and paged_adamw_8bit keep their moments in 8 bits (bitsandbytes); muon orthogonalizes the updates of
    matrices, adapters' included, and leaves vectors, embeddings and head to AdamW; schedule_free_adamw averages the
    weights in place of a schedule (schedulefree)."""
    gradient_checkpointing: bool | Checkpointing = True
    """What is recomputed in the backward pass: nothing (none, false), all but matmuls and attention (products), those
    that widen too (selective), each layer (full, true), each layer with its input kept in host memory (offload); auto:
    the least of these that fits, by an estimate."""
    torch_compile: bool | Literal["auto"] = "auto"
    """Compile the decoder layers: faster steps after a minute of compiling. auto: on CUDA, if they can be compiled."""
    use_liger_kernel: bool = False
    """Liger's kernels for norms, rotary embeddings and MLPs (CUDA; pip install liger-kernel)."""
    logging_steps: Positive = 1
    """Report the metrics every this many steps, and of the last step."""
    eval_steps: Positive | None = None
    """Evaluate every this many steps and at the end; null: at the end only."""
    save_steps: Positive | None = None
    """Write a checkpoint every this many steps."""
    save_total_limit: Positive | None = 2
    """Checkpoints kept; null: all."""
    max_nonfinite_steps: Positive = 5
    """Stop after this many consecutive steps whose loss or gradient is not finite; such steps make no update."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Of the order of rows, of what is held out, and of new weights."""
    load_best_at_end: bool = False
    """Keep the checkpoint with the lowest evaluation loss, and export that one."""
    early_stopping_patience: Positive | None = None
    """Stop after this many consecutive evaluations without a lower loss."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """With several processes: replicate the model, or shard weights, gradients and optimizer state."""
    preempt_signal: Annotated[list[str], BeforeValidator(as_signals)] = []
    """Signals besides SIGTERM and SIGINT that end the run with a checkpoint, e.g. SIGUSR1 from SLURM."""
    checkpoint_signal: Annotated[list[str], BeforeValidator(as_signals)] = []
    """Signals after which a checkpoint is written and the run goes on, e.g. SIGUSR2, to `mtr train` or to any process
    of the run (torchrun itself ends on them). A file `save-now` in output_dir asks for the same; it is removed."""
    on_save_error: Literal["continue", "stop"] = "stop"
    """When a checkpoint cannot be written: keep the last good one and continue, or stop."""
    report_to: Annotated[list[Tracker], BeforeValidator(as_trackers)] = []
    """Trackers besides metrics.jsonl, which is always written; `none` is the empty list."""
    push_to_hub: Annotated[str, AfterValidator(repository)] | None = None
    """Hub repository, owner/name, that the result is pushed to; created as private if it does not exist."""

    @property
    def checkpointing(self) -> Checkpointing:
        """gradient_checkpointing, with Hugging Face's true and false as full and none."""
        asked = self.gradient_checkpointing
        return ("full" if asked else "none") if isinstance(asked, bool) else asked

    @model_validator(mode="after")
    def _together(self) -> Self:
        check_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs, self.learning_rate)
        if self.parallel == "fsdp2" and self.optim not in SHARDED:
            raise ValueError(f"training.optim: {self.optim} works with training.parallel: ddp only")
        if self.optim == "schedule_free_adamw" and not self.lr_scheduler_type.startswith("constant"):
            raise ValueError(
                f"training.optim: schedule_free_adamw averages weights in place of a schedule, and the recipe has "
                f"lr_scheduler_type: {self.lr_scheduler_type}; set constant_with_warmup or constant"
            )
        if taken := sorted({"SIGTERM", "SIGINT", *self.preempt_signal} & set(self.checkpoint_signal)):
            raise ValueError(f"checkpoint_signal: {taken[0]} ends the run with a checkpoint; name another signal")
        return self
