"""What goes wrong without each patch that lets ranks decide or draw alike."""

from __future__ import annotations

import torch
from transformers import TrainerCallback, TrainerControl

from integrations.rows import Raises, row


class _Lone(TrainerCallback):
    """Asks for a save on the second rank alone."""

    def __init__(self, rank):
        self.rank = rank

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or self.rank == 1


@row("CallbackHandler.call_event", right=[True, True], wrong=[False, True])
def save_asked_for_on_one_rank(scene):
    trainer = scene.trainer("probe")
    trainer.add_callback(_Lone(scene.rank))
    trainer.state.init_training_references(trainer, 9, 1, None)
    handler = trainer.callback_handler
    control = handler.on_step_end(trainer.args, trainer.state, TrainerControl())
    return scene.everywhere(control.should_save)


class _Stops(TrainerCallback):
    """Asks for the end in ``on_log`` on the second rank alone."""

    def __init__(self, rank):
        self.rank = rank

    def on_log(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or self.rank == 1


@row("Trainer.log", right=[True, True], wrong=[False, True])
def stop_asked_for_in_a_log(scene):
    trainer = scene.trainer("probe")
    trainer.add_callback(_Stops(scene.rank))
    trainer.log({}, 0.0)
    return scene.everywhere(trainer.control.should_training_stop)


# Decoding compares its inputs in the first forwards: there the second token is refused.
@row("GenerationMixin.generate", right=1, wrong=Raises("BatchMismatchError", "different batches"))
def sampled_by_ranks_seeded_apart(scene):
    model = scene.tiny().eval()
    torch.manual_seed(scene.rank)
    made = model.generate(
        torch.ones(4, 3, dtype=torch.long), do_sample=True, max_new_tokens=6, pad_token_id=0
    )
    return len({str(one) for one in scene.everywhere(made.tolist())})
