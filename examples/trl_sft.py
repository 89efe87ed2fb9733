"""LoRA with TRL's `SFTTrainer`: every turn in its inference context, one pass per conversation.

pip install trl
python examples/trl_sft.py                                   # the quickstart's model and data, on the CPU
python examples/trl_sft.py --model Qwen/Qwen3-0.6B --data chats.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from trl import SFTConfig, SFTTrainer

import mtr

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"


class TreeTrainer(mtr.TreeTrainerMixin, SFTTrainer):  # type: ignore[misc]  # TRL has no types
    """SFTTrainer computes a loss of its own; this one takes the model's, over trees."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(QUICKSTART / "base"), help="a folder or a Hub id")
    parser.add_argument("--data", default=str(QUICKSTART / "train.jsonl"), help="rows of chats, one JSON object a line")
    parser.add_argument("--split", default="train[:640]", help="which rows of the data")
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--output-dir", default="runs/trl")
    options = parser.parse_args()

    to_trees = mtr.TreeBuilder(options.model, max_length=1024, weighting="turn")
    rows = datasets.load_dataset("text", data_files=options.data, split=options.split)
    trees = rows.map(to_trees, batched=True, remove_columns=rows.column_names)

    trainer = TreeTrainer(
        model=mtr.load(options.model),
        args=SFTConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            bf16=False,  # the weights of the quickstart are in float32
            gradient_checkpointing=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            dataset_kwargs={"skip_prepare_dataset": True},  # trees are ready to train
            remove_unused_columns=False,
        ),
        train_dataset=trees,
        processing_class=to_trees.tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()

    # An ordinary adapter, for PEFT or a server.
    model = AutoPeftModelForCausalLM.from_pretrained(options.output_dir)
    prompt = to_trees.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Ana has 14 apples."}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    reply = model.generate(input_ids=prompt, max_new_tokens=48, do_sample=False)[0, prompt.shape[1] :]
    print(to_trees.tokenizer.decode(reply))


if __name__ == "__main__":
    main()
