"""The keys of a recipe, section by section, with their types, defaults and limits: what is beyond them is a mistake.

A recipe is frozen. Key names are Hugging Face's wherever it has one. The recipe decides the mathematics of a run; the
hardware decides only its speed.
"""

# ruff: noqa: RUF012  (pydantic copies defaults)

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from mtr.recipe.schedules import as_number
from mtr.recipe.training_section import Checkpointing as Checkpointing
from mtr.recipe.training_section import TrainingSection as TrainingSection
from mtr.recipe.values import RESERVED_ARGUMENTS, Alpha, Name, Positive, Rank, Section, Tokens, as_date, as_lora_init

Backend = Literal["flex", "varlen", "segment", "sdpa", "eager"]
"""How attention over a tree is computed."""
BACKENDS: tuple[Backend, ...] = get_args(Backend)
Format = Literal["auto", "messages", "sharegpt", "prompt_completion", "instruction"]
"""A shape of rows, or auto."""


class ModelSection(Section):
    name_or_path: Name
    """A folder or a Hub id. `mtr inspect` and `mtr audit` need only its tokenizer."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; `auto` is the checkpoint's own."""
    attention: Literal["auto", Backend] = "auto"
    """How the tree mask is computed; `auto` is the faster of flex and varlen on CUDA, and segment elsewhere."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    allow_missing: list[str] = []
    """Parameters that the weights may lack, by name or pattern (`lm_head.*`); they start from random values."""
    allow_unexpected: list[str] = []
    """Tensors that the weights may hold and the model does not use, by name or pattern."""
    load_in_4bit: bool = False
    """QLoRA: frozen weights in 4 bits (NF4) with bitsandbytes, matmuls in bfloat16."""


class LoraSection(Section):
    r: Rank = 16
    """Rank of the adapters, at most 65,536."""
    alpha: Alpha = 32
    """Adapters are scaled by alpha / r; at most 1,000,000."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Turns share the dropout mask of their common history, so above 0 one pass is no longer exactly N passes."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: `all-linear` (all but the head), their names, or a regular expression."""
    target_parameters: list[str] | None = None
    """Parameters that belong to no linear layer, e.g. fused experts: [mlp.experts.gate_up_proj]."""
    modules_to_save: list[str] | None = None
    """Modules that are fully trained and saved with the adapter, e.g. [lm_head]."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    use_dora: bool = False
    """Train magnitude and direction of the weights separately."""
    rank_pattern: dict[str, Rank] = {}
    """r of modules by name or pattern, where it differs from `r`."""
    alpha_pattern: dict[str, Alpha] = {}
    """alpha of modules by name or pattern, where it differs from `alpha`."""
    init_lora_weights: Annotated[
        Literal["gaussian", "orthogonal", "pissa", "olora", "loftq"]
        | Annotated[str, Field(pattern=r"^pissa_niter_[0-9]{1,3}$")]
        | Literal[True],
        BeforeValidator(as_lora_init),
    ] = True
    """How adapters start, under PEFT's names. true: uniform A (Kaiming), B zero; gaussian: normal A, B zero;
    orthogonal: orthogonal A and B with BA = 0; pissa (exact) and pissa_niter_16 (fast): the largest singular vectors of
    the weights; olora: their QR decomposition; loftq: what 4-bit weights lose. After pissa and olora the result is a
    plain adapter of rank 2r for the original weights."""
    init_from: Name | None = None
    """Folder of an adapter to start from, in a new run with a new optimizer."""

    @property
    def takes_from_base(self) -> bool:
        """Whether the adapter starts with a part of the base weights, which is taken out of them."""
        return str(self.init_lora_weights).startswith(("pissa", "olora"))

    @model_validator(mode="after")
    def _dropout_on_modules_only(self) -> Self:
        if self.target_parameters and self.dropout:
            raise ValueError("lora.target_parameters work with lora.dropout: 0.0 only")
        return self

    @model_validator(mode="after")
    def _start(self) -> Self:
        start = f"lora.init_lora_weights: {self.init_lora_weights}"
        if self.init_lora_weights is True:
            return self
        if self.init_from:
            raise ValueError(f"{start} has no effect with lora.init_from, which brings its own weights; keep one")
        if self.target_parameters and self.init_lora_weights != "gaussian":
            raise ValueError(f"{start} is for linear layers; it does not work with lora.target_parameters")
        if self.use_dora and self.takes_from_base:
            raise ValueError(
                f"{start} does not work with lora.use_dora, whose magnitudes are those of the whole weights"
            )
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ValueError(f"{start} needs an even lora.r, and even ranks in lora.rank_pattern")
        return self


class ThinkingSection(Section):
    open: str | None = None
    """The tag that opens the thinking; null: found in the template or the tokenizer."""
    close: str | None = None
    """The tag that closes it."""
    history: Literal["as_data", "respell"] = "as_data"
    """Give thinking of earlier turns to the template as the data spells it, or in the field that the template reads."""

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.open is None) != (self.close is None):
            raise ValueError("give both thinking.open and thinking.close, or neither")
        if self.open is not None and (self.open == self.close or not self.open.strip() or not str(self.close).strip()):
            raise ValueError("thinking.open and thinking.close must be two different tags, and not empty")
        return self


class Source(Section):
    path: Name
    """A file (.jsonl, .json, .parquet, .csv, .arrow; compressed too), a glob, a folder, or a Hub id."""
    name: str | None = None
    """The configuration of a Hub data set."""
    split: str = "train"
    """Of a Hub data set, or of a folder that `datasets` saved with splits."""
    weight: Annotated[float, Field(gt=0, le=10**4)] = 1.0
    """How often an epoch contains each row, at most 10,000: 0.5 draws half of the rows, 2.0 takes each row twice."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    format: Format | None = None
    """The shape of its rows; null: data.format."""


def as_sources(value: Any) -> Any:
    """`data.train: file.jsonl` is short for a list of one source."""
    if isinstance(value, (str, dict)):
        value = [value]
    return [{"path": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


PERCENT = r"([0-9]{1,3}\.?[0-9]*) ?%"
"""No share of data.train, which is a number."""


def _only_sources(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(sources := as_sources(value), list):
        share = ", or a share such as 0.05" if info.field_name == "eval" else ""
        raise ValueError(f"must be a file, a folder, a pattern or a Hub id, or a list of them{share}")
    return sources


class FilterSection(Section):
    """Conversations outside these limits are skipped and counted."""

    min_turns: Positive | None = None
    """Fewest turns; a turn is an assistant message."""
    max_turns: Positive | None = None
    """Most turns."""
    min_messages: Positive | None = None
    """Messages of every role count."""
    max_messages: Positive | None = None
    """Most messages."""

    @model_validator(mode="after")
    def _some_fit(self) -> Self:
        for unit in ("turns", "messages"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if least and most and least > most:
                raise ValueError(f"min_{unit} ({least}) is above max_{unit} ({most}), so no row would be left")
        return self


Column = Literal["conversations", "system", "prompt", "completion", "instruction", "input", "output", "history"]


class DataSection(Section):
    train: Annotated[list[Source], BeforeValidator(_only_sources), Field(min_length=1)]
    """A file, glob, folder or Hub id, or a list of them, each with its weight."""
    eval: Annotated[list[Source], BeforeValidator(_only_sources)] = []
    """Held-out conversations, as data.train, or a share of data.train such as 0.05."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this share of data.train for evaluation. `eval: 0.05` is short for it."""
    format: Format = "auto"
    """The shape of the rows; auto: that of each source's first row."""
    messages: str = "messages"
    """The column of the messages."""
    tools: str = "tools"
    """The column of the tool schemas; rows without it have none."""
    columns: dict[Column, str | None] = {}
    """Names of the other shapes' columns where they differ from the usual ones; null: not read."""
    on_bad_row: Literal["error", "skip"] = "error"
    """skip: count a bad row, write it to rejects.jsonl and continue."""
    filter: FilterSection = FilterSection()
    """Which conversations are used, by their length."""
    group_by: str | None = None
    """A column: rows with the same value stay together under shuffling and, where they fit, in one step."""
    streaming: bool = True
    """Read Hub data as it arrives, without downloading it first. Local files are always read row by row."""
    shuffle: bool = True
    """Draw a new order for each epoch from training.seed; false: rows in their order."""
    shuffle_buffer: Annotated[int, Field(gt=0, le=10**8)] = 10_000
    """Rows in the buffer that shuffles a stream, at most 100,000,000; local files are shuffled exactly."""
    rendering: Literal["auto", "whole"] = "auto"
    """auto: conversations of 32 turns and more are assembled from pieces that are each rendered once, and compared with
    the full rendering: all turns of the first ones, then some of each; whole: every prompt is rendered in full."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    """Background processes that prepare steps, at most 1,024; null: 2 with an accelerator, else none."""

    @model_validator(mode="before")
    @classmethod
    def _share_for_eval(cls, raw: Any) -> Any:
        share = as_number(raw.get("eval")) if isinstance(raw, dict) else None
        if isinstance(share, str) and (percent := re.fullmatch(PERCENT, share)):
            raise ValueError(f"eval: a share is written as a number: {float(percent[1]) / 100:g} (got {share!r})")
        return {**raw, "eval": [], "eval_fraction": share} if type(share) in (int, float) else raw

    @model_validator(mode="after")
    def _one_evaluation(self) -> Self:
        if self.eval and self.eval_fraction:
            raise ValueError("eval_fraction holds out a share of data.train, and data.eval names other data: keep one")
        return self


class SequenceSection(Section):
    strategy: Literal["auto", "single_pass", "per_turn", "per_turn_unpacked"] = "auto"
    """One pass over each conversation, or one for each turn; auto: one pass where it is exact for the model, which a
    probe finds out, else per turn. Unpacked, each turn has a row of its own, with the model's own attention; per_turn
    falls back to that where turns that share a row would not be exact."""
    merge: Literal["conversation", "step"] = "conversation"
    """What forms one tree: the turns of a conversation, or of all conversations of a step that share a prefix."""
    max_length: Tokens = 4096
    """Longest path from root to leaf in tokens: what inference would see. At most 1,000,000,000."""
    max_tokens: Tokens | Literal["auto"] = 16384
    """Most tokens in one pack, at most 1,000,000,000. Larger trees are split into several that repeat the shared
    prefix; auto: what fits in memory, found by a short probe before training."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a turn longer than max_length."""
    on_oom: Literal["error", "split"] = "error"
    """When a pack does not fit in the device's memory: stop, or repeat the step with smaller packs."""

    @property
    def laid_out(self) -> Literal["single_pass", "per_turn", "per_turn_unpacked"]:
        """The strategy; auto is one pass as long as nothing is known of the model."""
        return "single_pass" if self.strategy == "auto" else self.strategy

    @property
    def unpacked(self) -> bool:
        """Whether each turn has a row of its own."""
        return self.strategy == "per_turn_unpacked"

    @property
    def budget(self) -> int:
        """Most tokens in one pack: max_tokens as a number; for auto, the value without a probe."""
        if self.unpacked:
            return self.max_length
        return max(16384, self.max_length) if self.max_tokens == "auto" else self.max_tokens

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.budget < self.max_length:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) is below max_length ({self.max_length}), so a long turn would not fit "
                "in any pack: raise sequence.max_tokens or lower sequence.max_length"
            )
        return self


class LossSection(Section):
    weighting: Literal["token", "turn", "conversation"] = "token"
    """What has weight 1 in the mean: each supervised token, each turn, or each conversation."""


class GenerationSection(Section):
    conversations: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Conversations of data.eval that are generated turn by turn before and after training, at most 1,000,000; 0:
    none."""
    max_new_tokens: Annotated[int, Field(gt=0, le=10**6)] = 256
    """Most tokens in a completion, at most 1,000,000; a turn that is not finished by then counts as wrong."""


class Recipe(Section):
    model: ModelSection
    """Which model, and how it is loaded."""
    template: dict[str, Any] = {}
    """Arguments for the chat template, e.g. {enable_thinking: true}."""
    thinking: ThinkingSection = ThinkingSection()
    """How thinking is marked; found in the template by itself."""
    train_on: Literal["all", "last"] = "all"
    """Train on every assistant message, or on the last one of each conversation; the others are context."""
    date: Annotated[str | None, BeforeValidator(as_date)] = None
    """The date for templates that print one; null: today, recorded in the saved recipe."""
    lora: LoraSection | None = LoraSection()
    """The adapter; null: train all weights."""
    data: DataSection
    """Which conversations, and how they are read."""
    sequence: SequenceSection = SequenceSection()
    """How turns become trees and packs; most of it changes speed and memory only."""
    loss: LossSection = LossSection()
    """What the loss is a mean over."""
    generation: GenerationSection = GenerationSection()
    """Held-out conversations that the model answers, turn by turn, before and after training."""
    training: TrainingSection
    """Steps, optimizer, checkpoints, and where the result goes."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.model.load_in_4bit and self.lora is None:
            raise ValueError("model.load_in_4bit needs lora: 4-bit weights cannot be trained")
        if self.training.parallel == "fsdp2" and self.model.load_in_4bit:
            raise ValueError("model.load_in_4bit works with training.parallel: ddp only")
        if self.training.parallel == "fsdp2" and self.sequence.on_oom == "split":
            raise ValueError(
                "sequence.on_oom: split works with training.parallel: ddp only; with fsdp2 every process takes part in "
                "each pack, so one process cannot repeat its packs alone"
            )
        if self.lora is None and self.training.loraplus_lr_ratio is not None:
            raise ValueError("training.loraplus_lr_ratio needs lora: it is the learning rate of the adapters' B")
        if self.lora is not None:
            self._check_lora_start(self.lora)
        if self.generation.conversations and not (self.data.eval or self.data.eval_fraction):
            raise ValueError("generation.conversations needs data.eval: held-out conversations to generate")
        if self.training.early_stopping_patience and self.training.eval_steps is None:
            raise ValueError("training.early_stopping_patience needs training.eval_steps")
        return self

    def _check_lora_start(self, lora: LoraSection) -> None:
        """
        Raises:
            ValueError: the adapters cannot start so from weights that are quantized, or that are not.
        """
        start = f"lora.init_lora_weights: {lora.init_lora_weights}"
        if lora.takes_from_base and self.model.load_in_4bit:
            raise ValueError(
                f"{start} takes a part out of the weights, and what is left would be quantized anew, so that the "
                "adapter would fit no other copy of the model; with model.load_in_4bit use loftq"
            )
        if lora.init_lora_weights == "loftq" and not self.model.load_in_4bit:
            raise ValueError(f"{start} makes up for what 4-bit weights lose, so it needs model.load_in_4bit: true")

    @field_validator("template")
    @classmethod
    def _not_reserved(cls, template: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(RESERVED_ARGUMENTS & template.keys()):
            raise ValueError(f"{', '.join(taken)} is set by mtr; only the template's own arguments are allowed here")
        try:
            json.dumps(template, allow_nan=False)  # nan would differ from itself when the run is resumed
        except ValueError:
            raise ValueError("its numbers must be finite") from None
        return template

    def dump(self) -> str:
        """The complete recipe as YAML, including defaults."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)

    def replace(self, **sections: dict[str, Any]) -> Recipe:
        """A copy with some keys changed, e.g. `replace(sequence={"strategy": "per_turn"})`.

        Raises:
            ValidationError: the changed recipe is not valid.
        """
        raw = self.model_dump()
        for section, keys in sections.items():
            raw[section] = {**(raw[section] or {}), **keys}
        return Recipe.model_validate(raw)
