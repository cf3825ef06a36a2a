"""A training loop of one's own with accelerate, with one line changed. LoRA with --lora_r 16.

    accelerate launch --config_file recipes/accelerate/tp2_sp.yaml recipes/accelerate_loop.py \
        --model_name_or_path Qwen/Qwen3-0.6B --train_file book.txt --output_dir out --lora_r 16

All ranks of a tensor-parallel group see the same batches; accelerate knows that from the model.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from hf_sp import from_pretrained


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_file", required=True, help="a text file")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seq_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--lora_r", type=int, default=0, help="0: train the whole model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def blocks(tokenizer: AutoTokenizer, path: str, length: int) -> list[dict[str, torch.Tensor]]:
    text = Path(path).read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, return_attention_mask=False)["input_ids"])
    return [{"input_ids": b, "labels": b} for b in tokens.split(length) if len(b) == length]


def main() -> None:
    args = arguments()
    set_seed(args.seed)
    model = from_pretrained(args.model_name_or_path)  # the one line: each rank reads its shards
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)

    if args.lora_r:
        config = LoraConfig(r=args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)

    accelerator = Accelerator(
        cpu=args.cpu, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    loader = torch.utils.data.DataLoader(
        blocks(tokenizer, args.train_file, args.seq_length), args.batch_size, shuffle=True
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    step = 0
    while step < args.max_steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    step += 1
                    accelerator.print(f"step {step}  loss {loss:.4f}  grad norm {norm:.3f}")
                optimizer.step()
                optimizer.zero_grad()
            if step == args.max_steps:
                break
    # On all ranks: one of them writes.
    accelerator.unwrap_model(model).save_pretrained(args.output_dir)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
    accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
