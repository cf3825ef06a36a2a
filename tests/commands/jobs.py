"""Training that is counted while it runs; rank functions, for a pool."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_sp import parallelize
from hf_sp.commands.rank import DTYPES, OPTIMIZERS, Run, prepare
from hf_sp.estimate import TrainingCount, count_training


def counted(config: dict, run: Run) -> TrainingCount:
    """The count of real tensors on real ranks."""
    made = AutoConfig.for_model(**config)
    ids = torch.arange(run.batch * run.seq).view(run.batch, run.seq) % made.vocab_size

    def build():
        model = AutoModelForCausalLM.from_config(made, dtype=DTYPES[run.dtype])
        how = {"cp": run.cp, "cp_mode": run.cp_mode, "ep": run.ep, "dp_shard": run.dp_shard}
        return prepare(parallelize(model, run.tp, run.sp, **how), run)

    return count_training(
        build,
        lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss,
        OPTIMIZERS[run.optimizer],
    )
