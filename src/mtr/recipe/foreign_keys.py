"""Keys of other training tools that people write into a recipe, and what to write here in place of each."""

from __future__ import annotations

_NOISE = (
    "noise differs between the turns that share a history, so one pass would no longer be the passes per turn, and mtr "
    "adds none; for regularization use training.weight_decay, a lower lora.r or fewer epochs"
)
_STEP = "a step has training.conversations_per_step conversations over all processes together"
_PACKED = "conversations are always packed, up to sequence.max_tokens tokens, and never see each other; leave it out"
_TRAINED = "only assistant messages are trained; see train_on, and `train` and `weight` of a message"
_PRECISION = "model.dtype is the dtype of the weights; what is trained is kept in float32"
_EXACT = "the tree mask needs mtr's own attention: see model.attention"
_DROPOUT = (
    "turns would share the dropout mask of their common history, so one pass would no longer be the passes per turn, "
    "and mtr switches the model's own dropout off; there is lora.dropout, with that said of it"
)
_ARGUMENT = "it is one of training.lr_scheduler_kwargs"
_LOSS = "the loss is the plain cross-entropy of the tokens; see loss.weighting for their weights"
_OPTIM = "optimizers have the defaults of their library; training.weight_decay is the one setting"
_SCHEDULE = "the schedule is training.lr_scheduler_type, warmup_steps and lr_scheduler_kwargs"

_REPLACEMENTS = {
    "neftune_noise_alpha": _NOISE,
    "neftune_alpha": _NOISE,
    "neftune": _NOISE,
    "noisy_embedding_alpha": _NOISE,
    "noise_alpha": _NOISE,
    "attention_dropout": _DROPOUT,
    "attention_probs_dropout_prob": _DROPOUT,
    "hidden_dropout": _DROPOUT,
    "hidden_dropout_prob": _DROPOUT,
    "attn_dropout": _DROPOUT,
    "attn_pdrop": _DROPOUT,
    "resid_pdrop": _DROPOUT,
    "embd_pdrop": _DROPOUT,
    "router_jitter_noise": _NOISE,
    "packing": _PACKED,
    "sample_packing": _PACKED,
    "eval_packing": _PACKED,
    "packing_strategy": _PACKED,
    "padding_free": _PACKED,
    "group_by_length": _PACKED,
    "neat_packing": _PACKED,
    "per_device_train_batch_size": _STEP,
    "per_device_eval_batch_size": "evaluation takes steps of training.conversations_per_step, packed like training",
    "micro_batch_size": _STEP,
    "batch_size": _STEP,
    "train_batch_size": _STEP,
    "gradient_accumulation": f"{_STEP}; it is cut into packs of sequence.max_tokens tokens by itself",
    "gradient_accumulation_steps": f"{_STEP}; it is cut into packs of sequence.max_tokens tokens by itself",
    "auto_find_batch_size": "sequence.max_tokens: auto finds the largest packs that fit",
    "max_seq_length": "the longest turn with its context is sequence.max_length",
    "max_seq_len": "the longest turn with its context is sequence.max_length",
    "sequence_len": "the longest turn with its context is sequence.max_length",
    "cutoff_len": "the longest turn with its context is sequence.max_length",
    "model_max_length": "the longest turn with its context is sequence.max_length",
    "assistant_only_loss": _TRAINED,
    "completion_only_loss": _TRAINED,
    "train_on_inputs": _TRAINED,
    "train_on_prompt": _TRAINED,
    "roles_to_train": _TRAINED,
    "mask_history": "train_on: last trains the last assistant message of each conversation only",
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "tf32": _PRECISION,
    "torch_dtype": "it is model.dtype",
    "load_in_8bit": "quantized bases are 4 bits: model.load_in_4bit",
    "bnb_4bit_quant_type": "model.load_in_4bit is NF4 with double quantization",
    "attn_implementation": _EXACT,
    "flash_attention": _EXACT,
    "flash_attn": _EXACT,
    "use_flash_attention_2": _EXACT,
    "model_name_or_path": "it is model.name_or_path",
    "base_model": "it is model.name_or_path",
    "model_name": "it is model.name_or_path",
    "tokenizer_name_or_path": "the tokenizer is that of model.name_or_path",
    "chat_template": "the template is the tokenizer's own, chat_template.jinja; its arguments go in `template`",
    "chat_template_kwargs": "they go in `template`, e.g. template: {enable_thinking: true}",
    "dataset": "it is data.train",
    "datasets": "they go in data.train, a list of {path, weight}",
    "dataset_name": "it is data.train",
    "train_file": "it is data.train",
    "validation_file": "it is data.eval",
    "val_set_size": "it is data.eval, a share such as 0.05 or other data",
    "eval_dataset": "it is data.eval",
    "lora_r": "it is lora.r",
    "rank": "it is lora.r",
    "bias": "adapters have no bias; leave it out",
    "task_type": "mtr trains causal language models only; leave it out",
    "lora_rank": "it is lora.r",
    "lora_alpha": "it is lora.alpha",
    "lora_dropout": "it is lora.dropout",
    "lora_target_modules": "it is lora.target_modules",
    "lora_target_linear": "lora.target_modules: all-linear is the default",
    "lora_target": "it is lora.target_modules",
    "lora_modules_to_save": "it is lora.modules_to_save",
    "lora_init": "it is lora.init_lora_weights",
    "peft_use_dora": "it is lora.use_dora",
    "peft_use_rslora": "it is lora.use_rslora",
    "pissa_init": "it is lora.init_lora_weights: pissa",
    "lora_plus_ratio": "it is training.loraplus_lr_ratio",
    "lr": "it is training.learning_rate",
    "num_epochs": "it is training.num_train_epochs",
    "epochs": "it is training.num_train_epochs",
    "optimizer": "it is training.optim",
    "optim_args": _OPTIM,
    "adam_beta1": _OPTIM,
    "adam_beta2": _OPTIM,
    "adam_epsilon": _OPTIM,
    "betas": _OPTIM,
    "momentum": _OPTIM,
    "num_cycles": _ARGUMENT,
    "min_lr": _ARGUMENT,
    "min_lr_rate": _ARGUMENT,
    "lr_end": _ARGUMENT,
    "num_decay_steps": _ARGUMENT,
    "lr_scheduler": _SCHEDULE,
    "warmup_ratio": "it is training.warmup_steps: below 1 it is a share of all steps",
    "max_grad_value": "gradients are clipped by their norm: training.max_grad_norm",
    "evaluation_strategy": "set training.eval_steps",
    "eval_strategy": "set training.eval_steps",
    "evals_per_epoch": "set training.eval_steps",
    "save_strategy": "set training.save_steps",
    "saves_per_epoch": "set training.save_steps",
    "save_only_model": "checkpoints are complete, so that a run can be resumed exactly",
    "load_best_model_at_end": "it is training.load_best_at_end",
    "early_stopping": "it is training.early_stopping_patience",
    "resume_from_checkpoint": "a run is continued with mtr train --resume",
    "overwrite_output_dir": "a run is replaced with mtr train --overwrite",
    "deepspeed": "with several processes use training.parallel: fsdp2",
    "fsdp": "it is training.parallel: fsdp2",
    "fsdp_config": "it is training.parallel: fsdp2, which has no settings",
    "ddp_find_unused_parameters": "training.parallel: ddp needs no such setting; leave it out",
    "dataloader_num_workers": "it is data.num_workers",
    "dataset_num_proc": "it is data.num_workers",
    "remove_unused_columns": "columns that mtr does not read are left alone; leave it out",
    "shuffle_dataset": "it is data.shuffle",
    "push_to_hub_model_id": "it is training.push_to_hub, owner/name",
    "hub_model_id": "it is training.push_to_hub, owner/name",
    "wandb_project": "training.report_to: wandb, and the environment variable WANDB_PROJECT",
    "use_liger": "it is training.use_liger_kernel",
    "liger_kernel": "it is training.use_liger_kernel",
    "label_smoothing_factor": _LOSS,
    "label_smoothing": _LOSS,
    "z_loss": _LOSS,
    "router_aux_loss_coef": _LOSS,
}


def what_to_use(key: str) -> str | None:
    """What to write in place of a key of another tool; None where it is not known.

    Args:
        key: without its section.
    """
    return _REPLACEMENTS.get(key)
