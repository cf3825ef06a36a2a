"""A training loop of one's own with torchrun alone: tensor, data and expert parallel ranks.

    torchrun --nproc_per_node 8 recipes/torchrun_loop.py --tp 2 --dp_shard 4 --ep 8 \
        --model_name_or_path Qwen/Qwen3-30B-A3B --train_file book.txt --output_dir out

The ranks of a tensor-parallel group see the same batch, each group another one. Gradients are the
mean over the groups. --ep 1 for models without experts.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, set_seed

from hf_sp import from_pretrained, parallel_state


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_file", required=True, help="a text file")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--tp", type=int, default=None)
    parser.add_argument("--dp_shard", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--seq_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=2, help="of each group")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def blocks(tokenizer: AutoTokenizer, path: str, length: int) -> torch.Tensor:
    text = Path(path).read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, return_attention_mask=False)["input_ids"])
    return tokens[: len(tokens) // length * length].view(-1, length)


def main() -> None:
    args = arguments()
    set_seed(args.seed)
    degrees = {"tp": args.tp, "dp_shard": args.dp_shard, "ep": args.ep}
    model = from_pretrained(args.model_name_or_path, **degrees)  # each rank reads its shards
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)

    state = parallel_state(model)
    groups, group = state.data, state.everyone.rank // state.tp
    first = state.everyone.rank == 0
    set_seed(args.seed + group)  # dropout: alike in a group, other places in each
    device = next(model.parameters()).device
    rows = blocks(tokenizer, args.train_file, args.seq_length).to(device)
    # Shuffled alike on all ranks; each group takes every groups-th batch.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    batches = rows[order[: len(rows) // args.batch_size * args.batch_size]]
    batches = batches.view(-1, args.batch_size, args.seq_length)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model.train()
    number = group
    for step in range(1, args.max_steps + 1):
        total = torch.zeros((), device=device)
        for _ in range(args.gradient_accumulation_steps):
            batch = batches[number % len(batches)]
            number += groups
            loss = model(input_ids=batch, labels=batch).loss / args.gradient_accumulation_steps
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if groups > 1:
            # Each rank of a group has the group's loss: the mean over all ranks is the groups'.
            torch.distributed.all_reduce(total)
            total /= state.everyone.size
        if first:
            print(f"step {step}  loss {total:.5f}  grad norm {norm:.4f}", flush=True)
    # On all ranks: one of them writes.
    model.save_pretrained(args.output_dir)
    if first:
        tokenizer.save_pretrained(args.output_dir)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
