"""Claims: a model with tree attention returns the loss of the separate turns, with its gradients; afterwards it is the
model that it was, bit for bit; where it is called with something else than trees, it computes what it did, or refuses.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.integrations import columns, quickstart_rows
from support.models import changed_model, load, tiny_config
from support.paths import QUICKSTART
from support.rows import conversation_row
from torch import Tensor

import mtr
from mtr.attention.interface import use_tree_attention
from mtr.chat.loading import load_renderer, load_tokenizer
from mtr.data.shapes import Reader
from mtr.integrations.batch import Trees
from mtr.model.float64 import keep_float64
from mtr.model.tree_model import TreeModel, use_tree
from mtr.prepare.builder import Builder
from mtr.recipe.loading import recipe_of_tokenizer

Models = Callable[..., Path]
BASE = str(QUICKSTART / "base")
ROWS = [conversation_row(3), conversation_row(2, thinking=False), *quickstart_rows(2)]
SLOW = pytest.mark.slow
KINDS = ["qwen3", *(pytest.param(kind, marks=SLOW) for kind in ("gemma2", "gemma3", "gpt_oss", "qwen3_moe"))]


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Norms and rotations too."""
    with keep_float64():
        yield


def batch_of(rows: list[Any] = ROWS, **options: Any) -> dict[str, Any]:
    made = mtr.TreeBuilder(BASE, **options)(columns(rows))
    return mtr.TreeCollator()([dict(zip(made, row, strict=True)) for row in zip(*made.values(), strict=True)])


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def turn_by_turn(model: Any) -> Tensor:
    """The weighted mean over separate passes, with the model's own attention."""
    recipe = recipe_of_tokenizer(BASE)
    builder = Builder(recipe, load_renderer(recipe, load_tokenizer(recipe)))
    views = [view for row in ROWS for view in builder.views(Reader().read(row, "row"))]
    losses = []
    for view in views:
        logits = model(input_ids=torch.from_numpy(view.ids)[None], use_cache=False).logits[0]
        first = len(view.prompt_ids)
        targets = torch.from_numpy(view.completion_ids)
        losses.append(torch.nn.functional.cross_entropy(logits[first - 1 : -1], targets, reduction="sum"))
    assert len(views) > len(ROWS)
    return torch.stack(losses).sum() / float(sum(view.weights.sum() for view in views))


def state(model: Any) -> dict[str, Any]:
    """All that could differ after: attributes of modules, hooks, configs."""
    modules = {
        name: {key: value for key, value in vars(module).items() if not isinstance(value, dict | Tensor)}
        for name, module in model.named_modules()
    }
    hooks = {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()}
    return {"modules": modules, "hooks": hooks, "config": copy.deepcopy(vars(model.config))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("in_float64")
def test_loss_and_gradients_are_those_of_the_turns(models: Models, kind: str) -> None:
    model = load(models(kind)).train()
    alone = turn_by_turn(model)
    expected, alone = gradients(model, alone), alone.detach()
    batch = batch_of()
    with mtr.tree_attention(model) as same:
        assert same is model
        loss = model(**batch).loss
        found, loss = gradients(model, loss), loss.detach()
        per_item = model(**batch, num_items_in_batch=7.5).loss.detach()
    torch.testing.assert_close(loss, alone, rtol=1e-10, atol=0)
    assert float(per_item) == pytest.approx(float(alone) * batch["attention_mask"].weight_sum / 7.5, rel=1e-10)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)
    use_tree(model)
    whole = TreeModel(model, "segment")(batch["attention_mask"].batch).detach()
    assert float(loss) == float(whole) / batch["attention_mask"].weight_sum


def test_without_the_ends_of_subtrees_it_is_another_loss(models: Models) -> None:
    """As a collator would make it that forgets them: the row is then one sequence."""
    model = load(models("qwen3"))
    batch = batch_of()
    trees: Trees = batch["attention_mask"]
    length = trees.batch.input_ids.shape[1]
    flat = replace(trees.batch, subtree_end=torch.full((length,), length), parent=np.arange(length) - 1)
    with torch.no_grad(), mtr.tree_attention(model):
        right, wrong = (float(model(**batch | {"attention_mask": t}).loss) for t in (trees, replace(trees, batch=flat)))
    assert abs(wrong / right - 1) > 1e-3


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("qwen3_next", marks=SLOW)])
@pytest.mark.parametrize("peft", [False, True])
def test_afterwards_it_is_the_model_that_it_was(models: Models, kind: str, peft: bool) -> None:
    model = load(models(kind))
    ids = torch.randint(0, 60, (2, 40))
    if peft:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    before, logits = state(model), model(input_ids=ids).logits
    for _ in range(2):
        with mtr.tree_attention(model), mtr.tree_attention(model):
            assert model(**batch_of()).loss > 0
            assert torch.equal(model(input_ids=ids).logits, logits), "without trees it computes what it did"
        assert state(model) == before
        assert torch.equal(model(input_ids=ids).logits, logits)
    with pytest.raises(RuntimeError, match="stop"), mtr.tree_attention(model):
        raise RuntimeError("stop")
    assert state(model) == before


def test_a_model_that_cannot_be_switched_is_left_as_it_was(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(models("qwen3"))
    before = state(model)

    def half(model: Any) -> None:
        use_tree_attention(model)
        raise mtr.UserError("its mixer has moved")

    monkeypatch.setattr("mtr.integrations.forward.use_tree", half)
    with pytest.raises(mtr.UserError, match="its mixer has moved"), mtr.tree_attention(model):
        pass
    assert state(model) == before


def test_generation_in_between_training(models: Models) -> None:
    ids = torch.randint(0, 60, (1, 12))
    plain = transformers.AutoModelForCausalLM.from_pretrained(str(models("qwen3")))
    model = mtr.load(str(models("qwen3"))).train()
    loss = model(**batch_of()).loss
    first = float(loss.detach())
    asked: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **asked), plain.generate(ids, **asked))
    torch.autograd.backward(loss)
    assert float(model(**batch_of()).loss.detach()) == first


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"num_beams": 2}])
def test_masks_of_generation_are_the_models_own(models: Models, options: dict[str, Any]) -> None:
    """They are made before the model is called, for the attention that it has then."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(str(models("qwen3"))).eval()
    ids, mask = torch.randint(0, 60, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    expected = plain.generate(ids, attention_mask=mask, **asked)
    assert torch.equal(mtr.load(str(models("qwen3"))).eval().generate(ids, attention_mask=mask, **asked), expected)
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).eval()
    with mtr.tree_attention(adapted):
        assert torch.equal(adapted.generate(input_ids=ids, attention_mask=mask, **asked), expected)
    assert not {"forward", "generate", "mtr_trees"} & set(vars(plain))


def test_a_model_has_its_own_attention_without_trees(models: Models) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(models("qwen3")), attn_implementation="eager")
    ids = torch.randint(0, 60, (1, 6))
    expected = model(input_ids=ids, output_attentions=True).attentions
    with mtr.tree_attention(model):
        found = model(input_ids=ids, output_attentions=True).attentions
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected))


def test_trees_while_it_generates(models: Models) -> None:
    """Of two threads, one would compute with the other's attention."""
    model, batch, ids = mtr.load(str(models("qwen3"))).eval(), batch_of(), torch.zeros(1, 4, dtype=torch.int64)
    words = "called over trees and without them at the same time, and has one attention at a time"
    with pytest.raises(mtr.UserError, match=words):
        model.generate(ids, max_new_tokens=1, pad_token_id=0, logits_processor=[lambda *_: model(**batch)])
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: model(input_ids=ids))
    with pytest.raises(mtr.UserError, match=words):
        model(**batch)
    hook.remove()
    assert model(**batch).loss > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_after_the_block(models: Models, reentrant: bool) -> None:
    """Layers that are computed again would be so with the model's own attention, to other gradients."""
    model, batch = load(models("qwen3")).train(), batch_of()
    with mtr.tree_attention(model):
        expected = gradients(model, model(**batch).loss)
        loss = model(**batch).loss
    found = gradients(model, loss)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with mtr.tree_attention(model):
        loss = model(**batch).loss
    with pytest.raises(mtr.UserError, match="the model has no tree attention now: call backward within"):
        gradients(model, loss)


def test_a_compiled_model(models: Models) -> None:
    """Dynamo leaves calls over trees as they are."""
    model, batch = mtr.load(str(models("qwen3"))).train(), batch_of()
    expected = model(**batch).loss
    try:
        assert torch.equal(torch.compile(model, backend="eager")(**batch).loss, expected)  # type: ignore[no-untyped-call]
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(models: Models, reentrant: bool) -> None:
    model, batch = load(models("qwen3")).train(), batch_of()
    with mtr.tree_attention(model):
        expected = gradients(model, model(**batch).loss)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        loss = model(**batch).loss
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 4, dtype=torch.int64))  # own attention, before layers are computed again
        found = gradients(model, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)


def test_copies_and_saved_models(models: Models, tmp_path: Path) -> None:
    model = mtr.load(str(models("qwen3")))
    batch = batch_of()
    with torch.no_grad():
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.copy_(torch.randn_like(parameter))
        assert float(twin(**batch).loss) != float(model(**batch).loss)
        ids, asked = torch.randint(0, 60, (1, 12)), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert not torch.equal(twin.generate(ids, **asked), model.generate(ids, **asked))
    model.save_pretrained(str(tmp_path / "saved"))
    assert "mtr" not in (tmp_path / "saved" / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "saved"))
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_mixed_precision(models: Models) -> None:
    model, batch = mtr.load(str(models("qwen3"))).train(), batch_of()
    whole = float(model(**batch).loss.detach())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss.detach()
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(whole, rel=1e-2)
    assert float(loss) != whole


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_without_tree_attention_refuses_trees(models: Models, implementation: str, training: bool) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(models("qwen3")), attn_implementation=implementation)
    with pytest.raises(mtr.UserError, match="this batch holds trees, and the model would read it as one sequence"):
        model.train(training)(**batch_of())


def test_a_model_that_reads_no_mask_refuses_the_labels(models: Models) -> None:
    """As with attention of other packages: the labels are not those of a sequence."""
    model = transformers.AutoModelForCausalLM.from_pretrained(str(models("qwen3")))
    for rows in ([conversation_row(1)], ROWS):
        batch = batch_of(rows)
        with pytest.raises(ValueError, match="batch_size"):
            model(input_ids=batch["input_ids"], labels=batch["labels"])


def test_what_it_cannot_compute_is_refused(models: Models) -> None:
    model = mtr.load(str(models("qwen3")), max_length=64).train()
    with pytest.raises(mtr.UserError, match="is trained on a batch without trees: map the data with"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(mtr.UserError, match=r"a turn of \d+ tokens, and the model was found to be exact for 64: give"):
        model(**batch_of())
    batch = batch_of([conversation_row(1)])
    with pytest.raises(mtr.UserError, match="returns no logits: leave out label_smoothing_factor"):
        model(**batch).logits  # noqa: B018
    with pytest.raises(mtr.UserError, match="one process with several GPUs would cut a batch of trees"):
        model(**batch, num_items_in_batch=torch.ones(2, 1))
    trees = replace(batch["attention_mask"], largest_id=10**6)
    with pytest.raises(mtr.UserError, match="token id 1000000, and the model has embeddings for"):
        model(**batch | {"attention_mask": trees})


def test_another_forward_is_refused(models: Models) -> None:
    """As Liger puts one in place of that of a model."""
    model, batch = mtr.load(str(models("qwen3"))), batch_of()
    model.forward = MethodType(type(model).forward, model)
    with pytest.raises(mtr.UserError, match=r"so no loss of trees is computed: .*, as use_liger_kernel does"):
        model(**batch)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel, lambda model: model.model, type])
def test_what_is_no_causal_lm(models: Models, wrap: Callable[[Any], Any]) -> None:
    given = wrap(transformers.AutoModelForCausalLM.from_pretrained(str(models("qwen3"))))
    with pytest.raises(mtr.UserError, match=r"is no causal LM of transformers; give it the model itself, before DDP"):
        mtr.tree_attention(given).__enter__()


def test_models_that_are_not_exact(models: Models, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = changed_model(models("llama"), tmp_path / "dynamic", rope_parameters=rope, max_position_embeddings=512)
    with pytest.raises(mtr.UserError, match=r"cannot be computed exactly over a tree: its dynamic RoPE .* at most 512"):
        mtr.load(str(folder))
    assert mtr.load(str(folder), max_length=512)(**batch_of()).loss > 0
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama", attention_dropout=0.1))
    with pytest.raises(mtr.UserError, match="its attention_dropout is above 0"), mtr.tree_attention(model):
        pass
    assert not hasattr(model, "mtr_trees")
    bidirectional = transformers.AutoModelForCausalLM.from_config(
        tiny_config("gemma3", use_bidirectional_attention=True)
    )
    with pytest.raises(mtr.UserError, match="use_bidirectional_attention"), mtr.tree_attention(bidirectional):
        pass


def test_weights_are_loaded_strictly(models: Models, tmp_path: Path) -> None:
    folder = changed_model(
        models("qwen3"), tmp_path / "model", lambda t: {k: v for k, v in t.items() if "layers.1.mlp" not in k}
    )
    with pytest.raises(mtr.UserError, match=r"nothing is there for 3 parameters .*layers\.1\.mlp"):
        mtr.load(str(folder))
    with pytest.raises(mtr.UserError, match=r"mtr.load: .*model\.dtype.*float8"):
        mtr.load(str(models("qwen3")), dtype="float8")  # type: ignore[arg-type]
    with pytest.raises(mtr.UserError, match=r"attention='flash': the backends are auto, flex, varlen"):
        mtr.load(str(models("qwen3")), attention="flash")  # type: ignore[arg-type]
    with pytest.raises(mtr.UserError, match="attention: flex trains on CUDA only"):
        mtr.load(str(models("qwen3")), attention="flex")(**batch_of())
    with pytest.raises(mtr.UserError, match="no such model folder: /nowhere/at/all"):
        mtr.load("/nowhere/at/all")
    noisy = changed_model(models("qwen3"), tmp_path / "noisy", attention_dropout=0.1)
    assert json.loads((noisy / "config.json").read_text())["attention_dropout"] == 0.1
    assert mtr.load(str(noisy)).config.attention_dropout == 0.0
