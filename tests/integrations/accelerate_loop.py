"""Jobs: accelerate without a Trainer, ``Accelerator()`` knowing nothing of the model."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from integrations.data import Rows, collate
from integrations.scene import full, refused, reset_accelerate, same, weights


def train_on(accelerator, model, optimizer, batch, norms, schedule=None):
    """A micro-batch as accelerate's guide has it; the norm of each step's gradients is noted."""
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            norms.append(float(full(accelerator.clip_grad_norm_(model.parameters(), 0.5))))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
    return loss


def loop(scene):
    """Two epochs by hand, with accumulation, clipping, a schedule and ragged last batches."""
    reset_accelerate()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = scene.tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0 / (i + 1))
    torch.manual_seed(77 + scene.rank)
    loader = DataLoader(Rows(11), batch_size=2, shuffle=True, collate_fn=collate)
    test = DataLoader(Rows(7, seed=8), batch_size=2, collate_fn=collate)
    loader, test, model, optimizer, schedule = accelerator.prepare(
        loader, test, model, optimizer, schedule
    )
    losses, norms, rates, first = [], [], [], []
    for _ in range(2):
        for batch in loader:
            first.append(batch["input_ids"].tolist())
            loss = train_on(accelerator, model, optimizer, batch, norms, schedule)
            losses.append(float(loss))
            rates.append(schedule.get_last_lr()[0])
    model.eval()
    rows = []
    for batch in test:
        with torch.no_grad():
            out = model(**batch).logits.argmax(-1)[:, -1]
        rows += accelerator.gather_for_metrics(out).tolist()
    folder = scene.folder("accelerate")
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        folder,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    accelerator.wait_for_everyone()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return {
        "accelerate": {
            "losses": losses,
            "norms": norms,
            "rates": rates,
            "first": first,
            "rows": len(rows),
            "predictions": rows,
            "wrapped": type(model).__name__,
            "saved": same(weights(unwrapped), dict(plain.named_parameters())),
        }
    }


def loader_first(scene):
    """A loader that has been prepared before the model: each rank has other batches."""
    reset_accelerate()
    late = Accelerator()
    late.prepare(DataLoader(Rows(4), collate_fn=collate))
    return refused(lambda: late.prepare(scene.tiny()))
