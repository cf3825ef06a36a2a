"""What goes wrong without each patch that lets groups of ranks be the processes."""

from __future__ import annotations

from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather, gather_object

from integrations.data import even_rows
from integrations.rows import PerRank, Raises, row


def _shown(scene):
    """An accelerator that is shown the one group of two ranks."""
    accelerator = Accelerator()
    accelerator.prepare(scene.tiny())
    return accelerator


@row("PartialState.is_main_process", right=PerRank(True, False), wrong=True)
def writes_with_accelerate(scene):
    return _shown(scene).is_main_process


# What is to be done by one rank is done.
@row("PartialState.use_distributed", right=PerRank(1, 0), wrong=1)
def done_on_the_main_process(scene):
    done = []
    _shown(scene).on_main_process(done.append)(1)
    return len(done)


@row("TrainingArguments.should_save", right=PerRank(True, False), wrong=True)
def writes_with_trainer(scene):
    return scene.trainer("probe").args.should_save


@row("TrainingArguments.should_log", right=PerRank(True, False), wrong=True)
def logs_with_trainer(scene):
    return scene.trainer("probe", log_on_each_node=False).args.should_log


@row("Trainer.is_world_process_zero", right=PerRank(True, False), wrong=True)
def first_of_trainer(scene):
    return scene.trainer("probe").is_world_process_zero()


@row("Trainer._save_rng_state", right=2, wrong=1)
def files_of_random_states(scene):
    trainer, folder = scene.trainer("probe"), scene.fresh("rng")
    trainer._save_rng_state(str(folder))
    scene.everywhere(None)
    return len(list(folder.iterdir()))


# Ranks that wait for another, before the block or after it.
@row("TrainingArguments.main_process_first", right=1, wrong=0)
def waits_for_the_first(scene):
    arguments = scene.trainer("probe").args
    with mock.patch.object(dist, "barrier", wraps=dist.barrier) as barrier:
        with arguments.main_process_first(local=False):
            pass
        return barrier.call_count


# accelerate makes room for the processes that it counts, of all ranks' tensors.
@row(
    "accelerate.utils.operations._gpu_gather",
    right=3,
    wrong=Raises("RuntimeError", "output tensor list"),
)
def rows_of_a_gather(scene):
    _shown(scene)
    return len(gather(torch.ones(3)))


@row("accelerate.utils.operations._gpu_gather_object", right=1, wrong=Raises("IndexError", "range"))
def objects_of_a_gather(scene):
    _shown(scene)
    return len(gather_object(["one"]))


@row("Accelerator.reduce", right=3.0, wrong=6.0)
def sum_over_the_groups(scene):
    return float(_shown(scene).reduce(torch.tensor(3.0)))


class _Counted(torch.utils.data.Dataset):
    def __init__(self):
        self.rows, self.read = even_rows(8), 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.read += 1
        return self.rows[i]


# Rows that a rank reads, where one reads for all.
@row("DataLoaderDispatcher.__init__", right=PerRank(8, 0), wrong=8)
def rows_read_of_a_dispatched_loader(scene):
    rows, options = _Counted(), {"accelerator_config": {"dispatch_batches": True}}
    trainer = scene.trainer("probe", train_dataset=rows, **options)
    list(trainer.get_train_dataloader())
    return rows.read
