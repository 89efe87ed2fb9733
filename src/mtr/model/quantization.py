"""4-bit weights: quantized for QLoRA, dequantized where a model is published in them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from mtr.errors import UserError


def four_bits(device: torch.device) -> dict[str, Any]:
    """Arguments that load NF4 weights with double quantization, matmuls in bfloat16, as in QLoRA.

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
    return {"quantization_config": config}


def unquantised(config: Any) -> dict[str, Any]:
    """Arguments that dequantize MXFP4 weights on loading: gpt-oss is published in them, and they have no backward."""
    quantisation = getattr(config, "quantization_config", None) or {}
    if quantisation.get("quant_method") != "mxfp4":
        return {}
    from transformers import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}
