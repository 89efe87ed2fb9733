"""Claims: whatever makes a model's forward random is switched off before training, also in the inner configs that some
models have, and is named; what is random in no model stays as it is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DbrxConfig, GPT2Config, LlamaConfig, MixtralConfig

from mtr.model.loading import switch_noise_off

_DBRX: dict[str, Any] = {
    "attn_config": {"attn_pdrop": 0.5, "kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    "ffn_config": {"moe_jitter_eps": 0.5, "ffn_hidden_size": 16, "hidden_size": 16},
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 1,
    "max_seq_len": 64,
    "vocab_size": 32,
    "resid_pdrop": 0.5,
}


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (LlamaConfig(attention_dropout=0.1), {"attention_dropout"}),
        (MixtralConfig(router_jitter_noise=0.1), {"router_jitter_noise"}),
        (GPT2Config(), {"attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"}),
        (DbrxConfig(**_DBRX), {"resid_pdrop", "attn_config.attn_pdrop", "ffn_config.moe_jitter_eps"}),
        (DbrxConfig(), set()),
        (LlamaConfig(), set()),
    ],
)
def test_noise_is_named_and_off(config: Any, keys: set[str]) -> None:
    assert set(switch_noise_off(config)) == keys
    assert switch_noise_off(config) == []


def test_a_model_with_inner_configs_answers_alike_in_training() -> None:
    def differs(config: DbrxConfig) -> float:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).train()
        one, two = (model(torch.arange(8)[None]).logits.detach() for _ in range(2))
        return float((one - two).abs().max())

    config = DbrxConfig(**_DBRX)
    assert differs(config) > 0
    switch_noise_off(config)
    assert differs(config) == 0
