"""Full fine-tuning with `transformers.Trainer`: every turn in its inference context, one pass per conversation.

python examples/transformers_trainer.py                      # the quickstart's model and data, on the CPU
python examples/transformers_trainer.py --model Qwen/Qwen3-0.6B --data chats.jsonl --eval chats-eval.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import torch
import transformers

import mtr

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(QUICKSTART / "base"), help="a folder or a Hub id")
    parser.add_argument("--data", default=str(QUICKSTART / "train.jsonl"), help="rows of chats, one JSON object a line")
    parser.add_argument("--eval", default=str(QUICKSTART / "eval.jsonl"))
    parser.add_argument("--split", default="train[:640]", help="which rows of the data")
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--output-dir", default="runs/transformers")
    options = parser.parse_args()

    # Rows of chats, read as lines of JSON, become rows of trees. What is not trained is counted, with the reason.
    to_trees = mtr.TreeBuilder(options.model, max_length=1024)
    train = datasets.load_dataset("text", data_files=options.data, split=options.split)
    train = train.map(to_trees, batched=True, remove_columns=train.column_names)
    held_out = datasets.load_dataset("text", data_files=options.eval, split="train")
    held_out = held_out.map(to_trees, batched=True, remove_columns=held_out.column_names)
    held_out = held_out.filter(lambda row: len(row["weight"]) > 0)  # a row without a trained turn has no loss
    counts = mtr.count_turns(train)
    print(f"{counts.turns:,} turns in {counts.tokens:,} tokens; {counts.per_turn_tokens:,} if each were a sequence")
    print(f"not trained: {dict(counts.untrained_turns) or 'nothing'}")

    # The model returns the loss of a batch of trees, so the trainer needs nothing but the collator.
    model = mtr.load(options.model)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            per_device_eval_batch_size=16,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=mtr.TreeCollator(),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"eval loss {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")

    # What is saved is an ordinary model. Without trees this one is, too.
    trainer.save_model()
    to_trees.tokenizer.save_pretrained(options.output_dir)
    prompt = to_trees.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Ana has 14 apples."}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"].to(model.device)
    reply = model.eval().generate(prompt, max_new_tokens=48, do_sample=False)[0, prompt.shape[1] :]
    print(to_trees.tokenizer.decode(reply))


if __name__ == "__main__":
    main()
