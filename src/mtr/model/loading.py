"""Model and tokenizer, as the recipe asks for them, and the module whose forward is the loss of a pack."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtr.attention.choice import choose_backends, fastest
from mtr.attention.interface import (
    IMPLEMENTATION,
    Backend,
    TreeAttention,
    layer_spans,
    refusal,
)
from mtr.chat.rendering import Renderer
from mtr.errors import UserError
from mtr.model.loss import chunk_size, weighted_nll
from mtr.recipe.sections import LoraSection, ModelSection, Recipe
from mtr.tree.batch import Batch

log = logging.getLogger("mtr")

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class TreeModel(nn.Module):
    """A causal LM whose forward takes a pack and returns its sum(weight * nll)."""

    def __init__(self, model: Any, *backends: Backend) -> None:
        """
        Args:
            backends: of attention; of several the first pack shows the fastest.
        """
        super().__init__()
        self.model = model
        self.backends = backends
        base = base_model(model)
        self.spans = layer_spans(text_config(base.config))
        self.head = OutputHead(base)

    def hidden(self, batch: Batch) -> Tensor:
        """[T, hidden size]: each token's last hidden state, as its own separate pass would compute it."""
        if len(self.backends) > 1 and len(batch.predictor):  # not on a pack that is only there to take part
            config = text_config(base_model(self.model).config)
            self.backends = (fastest(self.backends, config, batch.tree, self.spans, self._compute_dtype()),)
        tree = TreeAttention(batch.tree, self.spans, self.backends[0])
        output = decoder(self.model)(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, tree=tree
        ).last_hidden_state[0]
        if not tree.calls:
            raise UserError(
                "its attention does not go through transformers' attention interface, so no mask reaches it"
            )
        hidden: Tensor = output
        return hidden

    def _compute_dtype(self) -> torch.dtype:
        if torch.is_autocast_enabled("cuda"):
            return torch.get_autocast_dtype("cuda")
        dtype: torch.dtype = self.model.dtype
        return dtype

    def forward(self, batch: Batch | None, touch: bool = False, run: Callable[[], Any] | None = None) -> Any:
        """sum(weight * nll) of a pack; 0 without one.

        Args:
            touch: let every trainable parameter take part, used or not: gradients are averaged over processes when
                all of them have arrived.
            run: call this and return what it returns; the weights are in place for it, also where they are spread
                over processes.
        """
        if run is not None:
            return run()
        loss = torch.zeros((), device=next(self.parameters()).device)
        if batch is not None:
            hidden = self.hidden(batch)[batch.predictor]
            loss = weighted_nll(
                hidden, self.head, self.head.trainable(), batch.target_id, batch.weight, self.head.chunk
            )
        if touch or batch is None:
            loss = loss + 0.0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return loss


class OutputHead:
    """Hidden states to logits, with what the model does after its output layer. Not a module: it owns no weight."""

    def __init__(self, base: Any) -> None:
        config = text_config(base.config)
        self._base = base
        self.chunk = chunk_size(config.vocab_size)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._base.get_output_embeddings()(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self._base.get_output_embeddings().parameters() if p.requires_grad]


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: Any) -> Any:
    """The causal LM without its head."""
    base = base_model(model)
    found = base.get_decoder()
    return found.model if found is base else found


def text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def use_own_attention(model: Any) -> None:
    """Back to the model's own attention and causal mask, sdpa where it has it: generation, and the per-turn oracle."""
    base = base_model(model)
    base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")


def use_tree_attention(model: Any) -> None:
    base_model(model).set_attn_implementation(IMPLEMENTATION)


def load_tokenizer(recipe: Recipe) -> Any:
    """
    Raises:
        UserError: nothing there, or it holds no tokenizer.
    """
    from transformers import AutoTokenizer

    name = _existing(recipe.model.name_or_path)
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise UserError(f"model.name_or_path: no tokenizer can be loaded from {name}: {_first_line(error)}") from None


def load_renderer(recipe: Recipe, tokenizer: Any) -> Renderer:
    tags = (recipe.thinking.open, recipe.thinking.close)
    return Renderer(
        tokenizer,
        recipe.template,
        thinking=(tags[0], tags[1]) if tags[0] and tags[1] else None,
        date=recipe.date,
        stop_ids=_stop_ids(recipe.model),
        history=recipe.thinking.history,
        train_on=recipe.train_on,
        rendering=recipe.data.rendering,
    )


def load_config(recipe: Recipe) -> Any:
    """The model's config, checked: a model that would not be exact is refused here, before its weights are read."""
    from transformers import AutoConfig

    name = _existing(recipe.model.name_or_path)
    try:
        config = AutoConfig.from_pretrained(
            name, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise UserError(f"model.name_or_path: no model config at {name}: {_first_line(error)}") from None
    reason = refusal(text_config(config), recipe.sequence.max_length)
    if reason:
        raise UserError(f"{name} ({config.model_type}) cannot be trained exactly: {reason}")
    return config


def compute_dtype(recipe: Recipe, config: Any, dtype: str | None = None) -> torch.dtype:
    """What the model computes in: as asked for, or as its checkpoint is stored."""
    asked = dtype or recipe.model.dtype
    stored = getattr(text_config(config), "dtype", None) or getattr(config, "dtype", None) or torch.float32
    return DTYPES[asked] if asked != "auto" else stored


def load_model(
    recipe: Recipe,
    device: torch.device,
    dtype: str | None = None,
    quantise: bool = False,
    random_weights: bool = False,
) -> Any:
    """The causal LM with LoRA (or trained whole), on `device`, without dropout of its own.

    Args:
        dtype: of DTYPES; overrides the recipe's.
        quantise: heed `model.load_in_4bit`; without it the weights are whole.
        random_weights: only a config has to be there; the weights are drawn. To measure speed, not to train.

    Raises:
        UserError: the model cannot be loaded, would not be exact, or has no such modules.
    """
    from mtr.model.probe import check_exact

    config = load_config(recipe)
    choose_backends(recipe.model.attention, text_config(config), device, compute_dtype(recipe, config, dtype))
    quantisation = unquantised(config)
    if quantise and recipe.model.load_in_4bit:
        quantisation = four_bits(device)
    check_exact(config, trust_remote_code=recipe.model.trust_remote_code)
    asked = dtype or recipe.model.dtype
    for key in _dropout_keys(config):
        log.warning("%s of the model is set to 0: only lora.dropout is applied in training", key)
        setattr(text_config(config), key, 0.0)
    if random_weights:
        model = _random_model(recipe, config, asked, device)
    else:
        model = _pretrained_model(recipe, config, asked, device, quantisation)
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped kernels have no float64
    if recipe.lora is not None:
        model = _add_lora(model, recipe.lora, recipe.training.seed)
    elif model.dtype == torch.float16:
        raise UserError("model.dtype: float16 weights cannot be trained whole; use bfloat16 or float32, or lora")
    return model


def _pretrained_model(
    recipe: Recipe, config: Any, dtype: str, device: torch.device, quantisation: dict[str, Any]
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            recipe.model.name_or_path,
            config=config,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
            dtype="auto" if dtype == "auto" else DTYPES[dtype],
            use_safetensors=True,
            **quantisation,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(
            f"model.name_or_path: no weights can be loaded from {recipe.model.name_or_path}: {_first_line(error)}"
        ) from None
    return model if getattr(model, "is_loaded_in_4bit", False) else model.to(device)


def _random_model(recipe: Recipe, config: Any, dtype: str, device: torch.device) -> Any:
    """Built where it will run and in its dtype: at no time is there a second copy, nor one in float32."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    wanted = compute_dtype(recipe, config, dtype)
    torch.manual_seed(recipe.training.seed)
    with device:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code, dtype=wanted)


def _add_lora(model: Any, lora: LoraSection, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    names = [name for name, _ in model.named_modules()]
    for wanted in lora.modules_to_save or []:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            raise UserError(f"lora.modules_to_save: the model has no module {wanted!r}")
    if lora.modules_to_save and getattr(text_config(model.config), "tie_word_embeddings", False):
        log.warning(
            "the model ties its embeddings and its head: modules_to_save trains a copy of its own of what it names"
        )
    for wanted in lora.target_parameters or []:
        if not any(name == wanted or name.endswith(f".{wanted}") for name, _ in model.named_parameters()):
            raise UserError(f"lora.target_parameters: the model has no parameter {wanted!r}")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        target_parameters=lora.target_parameters,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
    )
    try:
        with warnings.catch_warnings():  # PEFT's own patterns for fused experts, which all-linear leaves alone
            warnings.filterwarnings(
                "ignore", message=".*keys did not match any targeted module", category=RuntimeWarning
            )
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # said above
            adapted = get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise UserError(f"lora: {_first_line(error)}") from None
    if lora.init_from:
        _load_adapter(adapted, Path(lora.init_from))
    return adapted


def _load_adapter(model: Any, folder: Path) -> None:
    """Go on from an adapter: it must be of this base model and of this shape.

    Raises:
        UserError: there is none, or it does not fit; the message names what differs.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    key = f"lora.init_from: {folder}"
    try:
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = load_file(str(folder / "adapter_model.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{key} holds no adapter that can be read: {_first_line(error)}") from None
    config = model.active_peft_config
    was, now = str(saved.get("base_model_name_or_path")), str(config.base_model_name_or_path)
    if Path(was).name != Path(now).name:
        raise UserError(f"{key} is an adapter of {was}, and model.name_or_path is {now}")
    names = {"r": "r", "lora_alpha": "alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    names |= {"rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
    for name, ours in names.items():
        if saved.get(name) != getattr(config, name):
            raise UserError(f"{key} has {ours} {saved.get(name)}, the recipe says lora.{ours}: {getattr(config, name)}")
    wanted = get_peft_model_state_dict(model).keys()
    if strange := sorted(wanted ^ weights.keys()):
        what = "does not adapt" if strange[0] in wanted else "adapts more:"
        raise UserError(
            f"{key} {what} {strange[0]}; give lora.target_modules, target_parameters and modules_to_save as it has them"
        )
    set_peft_model_state_dict(model, weights)


def four_bits(device: torch.device) -> dict[str, Any]:
    """QLoRA's weights: NF4, quantisation constants quantised too, products in bfloat16.

    Raises:
        UserError: bitsandbytes is missing, or there is no CUDA device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.load_in_4bit needs bitsandbytes: pip install 'mtr[qlora]'")
    if device.type != "cuda":
        raise UserError("model.load_in_4bit needs a CUDA device; this machine has none")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def unquantised(config: Any) -> dict[str, Any]:
    """gpt-oss is published in 4 bits, which have no backward: its weights are expanded on loading."""
    quantisation = getattr(config, "quantization_config", None) or {}
    if quantisation.get("quant_method") != "mxfp4":
        return {}
    from transformers import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}


def adapted_modules(model: Any) -> list[str]:
    """Names of the modules that LoRA adapted, layer numbers left out."""
    names = {
        ".".join("*" if part.isdigit() else part for part in name.split(".lora_")[0].split("."))
        for name, _ in model.named_parameters()
        if ".lora_A." in name
    }
    return sorted(name.removeprefix("base_model.model.") for name in names)


def _dropout_keys(config: Any) -> list[str]:
    """Keys of the config that add noise in training: a shared trunk would share it, so the model has none."""
    keys = vars(text_config(config)).items()
    noisy = ("dropout", "pdrop", "jitter_noise")
    return [key for key, value in keys if key.endswith(noisy) and isinstance(value, float) and value > 0]


def _existing(name: str) -> str:
    """Refuse what is plainly a path and not there, before it is asked for on the Hub."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name
    if looks_local and not Path(name).is_dir() and ("/" in name or name.startswith(".")):
        raise UserError(f"model.name_or_path: no such model folder: {name}")
    return name


def _stop_ids(section: ModelSection) -> list[int]:
    """What generation stops at, the first one first: the generation config's, or where there is none the config's."""
    from transformers import GenerationConfig, PretrainedConfig

    name, revision = section.name_or_path, section.revision
    try:
        eos = GenerationConfig.from_pretrained(name, revision=revision).eos_token_id
    except (OSError, ValueError):
        try:
            config = PretrainedConfig.get_config_dict(name, revision=revision)[0]
        except (OSError, ValueError):
            return []
        eos = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    return list(eos) if isinstance(eos, list) else [eos] if eos is not None else []


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
