"""A stock Trainer script with one line changed. Trains a causal LM on a text file.

    torchrun --standalone --nproc_per_node 2 recipes/train_trainer.py \
        --model_name_or_path Qwen/Qwen3-0.6B --train_file book.txt --output_dir out --bf16

    accelerate launch --config_file recipes/accelerate/tp2_sp.yaml recipes/train_trainer.py \
        --model_name_or_path Qwen/Qwen3-0.6B --train_file book.txt --output_dir out --bf16

Without --model_name_or_path it trains a small Llama from scratch, with a byte-level tokenizer made
from the text: nothing is downloaded, and it runs on a laptop. All of TrainingArguments is accepted.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_sp import from_pretrained, parallelize


@dataclass
class ScriptArguments:
    train_file: str = field(metadata={"help": "a text file"})
    model_name_or_path: str | None = field(default=None, metadata={"help": "default: from scratch"})
    tokenizer: str | None = field(default=None, metadata={"help": "default: the model's"})
    seq_length: int = field(default=512, metadata={"help": "tokens in an example; any number"})
    tp: int | None = field(
        default=None,
        metadata={"help": "default: what accelerate's config says, else all processes"},
    )
    sp: bool = field(default=True, metadata={"help": "--sp False: plain tensor parallelism"})
    dp_shard: int | None = field(default=None, metadata={"help": "groups that shard the weights"})
    dp_replicate: int = field(default=1, metadata={"help": "copies of these groups"})


class Blocks(torch.utils.data.Dataset):
    """Consecutive blocks of tokens; the last one may be shorter."""

    def __init__(self, tokens: list[int], length: int) -> None:
        self.blocks = torch.tensor(tokens).split(length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[i], "labels": self.blocks[i]}


def make_tokenizer(text: str) -> PreTrainedTokenizerBase:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        text.splitlines(keepends=True), vocab_size=1001, special_tokens=["<|end|>"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )


def make_model(tokenizer: PreTrainedTokenizerBase) -> AutoModelForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config)


def main() -> None:
    script, training = HfArgumentParser(
        (ScriptArguments, TrainingArguments)
    ).parse_args_into_dataclasses()
    set_seed(training.seed)  # before the model is made: every rank starts from the same weights
    text = Path(script.train_file).read_text(encoding="utf-8")

    source = script.tokenizer or script.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(source) if source else make_tokenizer(text)
    degrees = {"tp": script.tp, "sp": script.sp, "dp_shard": script.dp_shard}
    degrees["dp_replicate"] = script.dp_replicate
    if script.model_name_or_path:
        # The one line: each rank reads its shards.
        model = from_pretrained(script.model_name_or_path, **degrees)
    else:
        model = parallelize(make_model(tokenizer), **degrees)

    tokens = tokenizer(text, return_attention_mask=False)["input_ids"]
    tokens = tokens[: len(tokens) // script.seq_length * script.seq_length]
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=Blocks(tokens, script.seq_length),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()  # on all ranks; plain transformers loads it
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
