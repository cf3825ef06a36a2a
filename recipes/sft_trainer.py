"""TRL's SFTTrainer, full fine-tune, with one line changed.

    accelerate launch --config_file recipes/accelerate/tp2_sp.yaml recipes/sft_trainer.py \
        --config recipes/configs/sft_full.yaml

    torchrun --standalone --nproc_per_node 2 recipes/sft_trainer.py \
        --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara --output_dir out

Any argument of TRL's SFTConfig, ScriptArguments and ModelConfig, on the command line or in the
YAML. A dataset is a name on the Hub, a folder, or a .json, .jsonl or .txt file. For LoRA:
sft_lora.py.
"""

from dataclasses import dataclass, field

import torch
from datasets import DatasetDict, load_dataset
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

from hf_sp import from_pretrained

FILES = {"json": "json", "jsonl": "json", "txt": "text"}


@dataclass
class ParallelArguments:
    tp: int | None = field(
        default=None,
        metadata={"help": "default: what accelerate's config says, else all processes"},
    )
    sp: bool = field(default=True, metadata={"help": "--sp False: plain tensor parallelism"})
    dp_shard: int | None = field(default=None, metadata={"help": "groups that shard the weights"})
    dp_replicate: int = field(default=1, metadata={"help": "copies of these groups"})


def load(script: ScriptArguments) -> DatasetDict:
    kind = FILES.get(script.dataset_name.rpartition(".")[2])
    if kind is not None:
        return load_dataset(kind, data_files={script.dataset_train_split: script.dataset_name})
    return load_dataset(script.dataset_name, name=script.dataset_config)


def main() -> None:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, ParallelArguments))
    script, training, model_args, parallel = parser.parse_args_and_config()

    model = from_pretrained(  # the one line: each rank reads its shards
        model_args.model_name_or_path,
        tp=parallel.tp,
        sp=parallel.sp,
        dp_shard=parallel.dp_shard,
        dp_replicate=parallel.dp_replicate,
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
    )
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)

    dataset = load(script)
    evaluation = dataset.get(script.dataset_test_split) if training.eval_strategy != "no" else None
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()  # on all ranks; plain transformers loads it
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
