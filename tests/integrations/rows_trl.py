"""What goes wrong without each patch of TRL's trainers."""

from __future__ import annotations

from unittest import mock

from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from integrations.rows import Raises, row

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(58))]


def tokenizer():
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def _step(scene, kind):
    """One step over two rows; whole heads that were gathered, and tokens that were counted."""
    disable_progress_bars()
    text = " ".join(WORDS[3:8])
    if kind is SFTTrainer:
        config, row, more = SFTConfig, {"text": text}, {}
    else:
        config = DPOConfig if kind is DPOTrainer else KTOConfig
        more = {"ref_model": scene.tiny(seed=4)}
        row = {"prompt": text + " ", "chosen": "w7 w8", "rejected": "w9 w10"}
        if kind is KTOTrainer:
            row = {"prompt": row["prompt"], "completion": "w7 w8", "label": True}
    arguments = config(
        output_dir=str(scene.out / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=2,
        max_steps=1,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = kind(
        model=scene.tiny(),
        args=arguments,
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=tokenizer(),
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    gathered, original = [], DTensor.full_tensor

    def spy(self, **kwargs):
        gathered.append(tuple(self.shape))
        return original(self, **kwargs)

    with mock.patch.object(DTensor, "full_tensor", spy):
        trainer.train()
    return gathered.count((61, 16)), trainer._total_train_tokens


# TRL runs the backbone alone, which gives this rank's shard, and scores it with all tokens' labels.
SHARD = Raises("RuntimeError", "is invalid for input of size")


@row("trl.trainer.sft_trainer.add_fused_lm_head", right=0, wrong=SHARD)
def whole_heads_of_sft(scene):
    return _step(scene, SFTTrainer)[0]


@row("trl.trainer.dpo_trainer.add_fused_lm_head", right=0, wrong=SHARD)
def whole_heads_of_dpo(scene):
    return _step(scene, DPOTrainer)[0]


@row("trl.trainer.kto_trainer.add_fused_lm_head", right=0, wrong=SHARD)
def whole_heads_of_kto(scene):
    return _step(scene, KTOTrainer)[0]
