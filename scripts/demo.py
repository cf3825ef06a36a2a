"""The demo: the same small model trained on one process and on several, compared step by step.

Makes a byte-level tokenizer and a corpus from the source of Python's own standard library, runs
`demo_train.py` twice (the second time with `parallelize(model, tp=N, sp=True)`), and shows both
side by side: losses, gradient norms, activation bytes, collectives. Not zero if they disagree.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from array import array
from collections import deque
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
VOCAB = 1001
CORPUS_CHARS = 1_500_000
STALLED_AFTER = 600  # seconds without a line of output before a run is called stuck
PROMPT = "    def __init__(self"

console = Console(width=None if sys.stdout.isatty() else 110)


class DemoError(RuntimeError):
    """Something the demo shows did not hold."""


def tolerance(step: int, bf16: bool) -> float:
    """Largest relative difference that rounding explains at one step.

    Both runs compute the same sums in another order. A sum of n terms in working precision u has a
    relative error of about sqrt(n) * u, and independent errors add as a random walk. In fp32
    (u = 2^-24) the path of one step is 7 matmuls in each of 4 layers and the head, forward and
    backward, over at most 1024 terms, and the grad norm, which adds as many squares as the largest
    parameter has elements. In bf16 (u = 2^-9) sums are taken in fp32 and their results rounded, so
    it is the matmuls' roundings that count. Two runs differ by twice that, and each optimizer step
    adds as much again.

    Noise is normally far below the bound. For comparison: with the all-reduce of the norms'
    gradients left out, about the smallest fault there is, the first grad norm is off by 4e-4.
    """
    matmuls = 2 * (4 * 7 + 1)
    if bf16:
        return 2 * 2.0**-9 * (matmuls * step) ** 0.5
    return 2 * 2.0**-24 * ((matmuls * 1024) ** 0.5 + (256 * VOCAB) ** 0.5) * step**0.5


def prepare(data: Path) -> str:
    """Write tokenizer and tokens of the standard library's source. Returns a line about them."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    library = Path(sysconfig.get_paths()["stdlib"])
    texts, chars = [], 0
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if chars >= CORPUS_CHARS:
            break
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        texts.append(text)
        chars += len(text)
    if chars < CORPUS_CHARS / 4:
        raise DemoError(f"{library} holds {chars} characters of Python: too little to train on")

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts[:40], vocab_size=VOCAB, special_tokens=["<|end|>"], show_progress=False
    )
    tokens = array("H")
    for encoding in bpe.encode_batch(texts):
        tokens.extend(encoding.ids)
        tokens.append(0)
    data.mkdir(parents=True, exist_ok=True)
    (data / "tokens.bin").write_bytes(tokens.tobytes())
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>").save_pretrained(
        data / "tokenizer"
    )
    return (
        f"{len(texts)} files of the standard library, {chars / 1e6:.1f} M characters, "
        f"{len(tokens) / 1e6:.2f} M tokens, vocabulary {bpe.get_vocab_size()}"
    )


def run(title: str, command: list[str], env: dict[str, str], log_path: Path, steps: int) -> None:
    """Run one training with a progress bar; its other output goes to a log."""
    tail: deque[str] = deque(maxlen=25)
    last_line = time.monotonic()
    process = subprocess.Popen(
        command,
        env={**os.environ, **env, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that the launcher and its ranks can be stopped together
    )
    stuck = threading.Event()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(5):
            if time.monotonic() - last_line > STALLED_AFTER:
                stuck.set()
                os.killpg(process.pid, signal.SIGKILL)
                return

    threading.Thread(target=watch, daemon=True).start()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    try:
        with (
            log_path.open("w", encoding="utf-8") as log,
            Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ):
            task = progress.add_task(f"{title:<22}", total=steps, note="starting")
            if not console.is_terminal:
                console.print(f"{title}: starting", highlight=False)
            for line in process.stdout:
                last_line = time.monotonic()
                if not line.startswith("@demo "):
                    log.write(line)
                    tail.append(line)
                    continue
                event = json.loads(line.removeprefix("@demo "))
                note = event.get("phase") or f"loss {event['loss']:.4f}"
                progress.update(task, note=note, completed=event.get("step"))
                step = event.get("step", 0)
                if not console.is_terminal and (step % 20 == 0 or step == steps):
                    at = f"step {step}/{steps}, " if step else ""
                    console.print(f"{title}: {at}{note}", highlight=False)
            code = process.wait()
            progress.update(task, note="done" if code == 0 else "failed")
    finally:
        done.set()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if stuck.is_set():
        raise DemoError(f"{title}: no output for {STALLED_AFTER} s, stopped. Log: {log_path}")
    if code != 0:
        console.print(escape("".join(tail)), highlight=False)
        raise DemoError(f"{title}: exit status {code}. The whole log: {log_path}")


def difference(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def compare(one: dict, many: dict) -> tuple[Table, list[str]]:
    """Make the step table; also say which values differ by more than rounding explains."""
    bf16 = one["device"] == "cuda"
    problems = []
    tp = many["tp"]
    table = Table(title="Training, step by step: stock Trainer, accumulation 2, clipping active")
    for head in ("step", "loss\n1 process", f"loss\nhf_sp tp={tp}", "relative\ndifference"):
        table.add_column(head, justify="right")
    for head in ("grad norm\n1 process", f"grad norm\nhf_sp tp={tp}", "relative\ndifference"):
        table.add_column(head, justify="right")
    table.add_column("rounding\nexplains", justify="right")

    if [e["step"] for e in one["log"]] != [e["step"] for e in many["log"]]:
        raise DemoError("the runs logged different steps")
    every = max(1, len(one["log"]) // 10)
    for a, b in zip(one["log"], many["log"], strict=True):
        limit = tolerance(a["step"], bf16)
        cells = [str(a["step"])]
        over = False
        for name in ("loss", "grad_norm"):
            d = difference(a[name], b[name])
            if not d <= limit:  # NaN is a disagreement too
                over = True
                problems.append(
                    f"step {a['step']}: {name} {a[name]:.6g} and {b[name]:.6g} differ by {d:.1e}, "
                    f"rounding explains {limit:.1e}"
                )
            cells += [f"{a[name]:.5f}", f"{b[name]:.5f}", f"{d:.1e}"]
        if over or a["step"] == 1 or a["step"] % every == 0 or a is one["log"][-1]:
            table.add_row(*cells, f"< {limit:.0e}", style="red" if over else None)

    limit = tolerance(len(one["log"]) + 1, bf16)
    d = difference(one["eval_loss"], many["eval_loss"])
    table.add_section()
    table.add_row(
        "eval",
        f"{one['eval_loss']:.5f}",
        f"{many['eval_loss']:.5f}",
        f"{d:.1e}",
        "",
        "",
        "",
        f"< {limit:.0e}",
    )
    if not d <= limit:
        problems.append(f"eval loss differs by {d:.1e}, rounding explains {limit:.1e}")
    return table, problems


def cost_rows(one: dict, many: dict) -> list[tuple[str, dict]]:
    tp = many["tp"]
    return [
        ("1 process", one["counts"]["all"]),
        (f"tp={tp}: sp=False, kernels=False", many["counts"]["tp"]),
        (f"tp={tp}: sp=True, kernels=False", many["counts"]["sp"]),
        (f"tp={tp}: sp=True (default)", many["counts"]["all"]),
    ]


def cost_table(one: dict, many: dict) -> Table:
    table = Table(title="What a step costs a rank (counted, not timed)")
    table.add_column("")
    for head in ("kept for\nbackward", "per\nlayer", "share", "peak of\na step"):
        table.add_column(head, justify="right")
    table.add_column("collectives\nof a layer")

    def calls(kinds: dict) -> str:
        return ", ".join(f"{n} {kind}" for kind, (n, _) in sorted(kinds.items())) or "none"

    base = one["counts"]["all"]["layer_alive_bytes"]
    for name, c in cost_rows(one, many):
        table.add_row(
            name,
            f"{c['alive_bytes'] / 2**20:.1f} MiB",
            f"{c['layer_alive_bytes'] / 2**20:.2f} MiB",
            f"{100 * c['layer_alive_bytes'] / base:.0f} %",
            f"{c['peak_bytes'] / 2**20:.1f} MiB",
            f"forward: {calls(c['layer_forward'])}\nbackward: {calls(c['layer_backward'])}",
        )
    return table


def check_checkpoint(one: Path, many: Path, tokenizer_dir: Path) -> str:
    """Load what the parallel run saved with plain transformers, and let it write some Python."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    reference, model = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (one, many)
    )
    a, b = reference.state_dict(), model.state_dict()
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        odd = sorted(a.keys() ^ b.keys()) or [n for n in a if a[n].shape != b[n].shape]
        raise DemoError(f"the two checkpoints hold different tensors: {odd[:5]}")
    worst = max(((a[n] - b[n]).norm() / a[n].norm()).item() for n in a)
    console.print(
        f"Checkpoint of the parallel run, in plain transformers: the same {len(a)} tensors, "
        f"the furthest off by {worst:.1e} of its norm.",
        highlight=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(0)
    out = model.generate(
        input_ids=prompt.input_ids,
        attention_mask=prompt.attention_mask,
        max_new_tokens=60,
        do_sample=True,
        temperature=0.7,
        top_k=20,
        pad_token_id=0,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def draw(one: dict, many: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grey, blue, orange = "#6b7280", "#2563eb", "#d97706"
    tp, bf16 = many["tp"], one["device"] == "cuda"
    steps = [e["step"] for e in one["log"]]
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")

    left.plot(steps, [e["loss"] for e in one["log"]], color=grey, lw=5, alpha=0.45)
    left.plot(steps, [e["loss"] for e in many["log"]], color=blue, lw=1.5)
    left.legend(["1 process", f"hf_sp tp={tp} sp=True"], frameon=False)
    left.set(title="training loss", xlabel="step", ylabel="loss")

    for name, colour in (("loss", blue), ("grad_norm", orange)):
        gaps = [
            max(difference(a[name], b[name]), 1e-9)
            for a, b in zip(one["log"], many["log"], strict=True)
        ]
        middle.semilogy(steps, gaps, color=colour, lw=1.5, label=name.replace("_", " "))
    bound = [tolerance(s, bf16) for s in steps]
    middle.semilogy(steps, bound, color=grey, ls="--", lw=1, label="rounding explains")
    middle.legend(frameon=False)
    middle.set(title="relative difference of the two runs", xlabel="step")

    rows = cost_rows(one, many)
    # Lying, so that the names have room beside the bars.
    names = [name.replace(": ", "\n").replace(", ", "\n") for name, _ in rows]
    sizes = [c["layer_alive_bytes"] / 2**20 for _, c in rows]
    bars = right.barh(names, sizes, color=[grey, orange, orange, blue], height=0.6)
    labels = [f"{size:.1f} MiB, {100 * size / sizes[0]:.0f} %" for size in sizes]
    right.bar_label(bars, labels, padding=3)
    right.set(title="activations kept for backward\nper layer and rank", xlabel="MiB")
    right.set_xlim(0, max(sizes) * 1.6)
    right.invert_yaxis()
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def choose_device(tp: int | None) -> tuple[str, int, str]:
    """Pick NCCL where there are GPUs for it. The model has 4 key-value heads, so tp is 2 or 4."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus >= (tp or 2):
        tp = tp or (4 if gpus >= 4 else 2)
        return "cuda", tp, f"{tp} x {torch.cuda.get_device_name(0)}, bf16, NCCL"
    tp = tp or 2
    return "cpu", tp, f"{tp} processes on the CPU, fp32, gloo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="default: ./demo_out")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--tp", type=int, choices=(2, 4), help="default: what the machine has")
    options = parser.parse_args()
    out = options.out.resolve()
    started = time.monotonic()

    with console.status("reading the standard library, training a tokenizer"):
        device, tp, where = choose_device(options.tp)
        data = out / "data"
        about = prepare(data)
    console.print(f"[bold]Data[/bold]      {about}", highlight=False)
    console.print("[bold]Model[/bold]     Llama, 4 layers x 256, 8 heads (4 kv), from scratch")
    console.print(f"[bold]Machine[/bold]   {where}\n", highlight=False)

    script = str(HERE / "demo_train.py")
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    results = []
    for name, title, ranks in (("one", "1 process", 1), ("many", f"hf_sp tp={tp} sp=True", tp)):
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *(launcher if ranks > 1 else []), script]
        command += ["--data", str(data), "--results", str(folder), "--steps", str(options.steps)]
        env = {
            "HF_SP_DEMO_DEVICE": device,
            "OMP_NUM_THREADS": str(max(1, min(8, cores // ranks))),
        }
        if ranks > 1:
            command += ["--tp", str(ranks)]
        if device == "cpu":  # one GPU is too few: NCCL wants one for each rank
            env["CUDA_VISIBLE_DEVICES"] = ""
        elif ranks == 1:  # or the Trainer would spread one process over all of them
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
            env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
        run(title, command, env, out / f"{name}.log", options.steps)
        results.append(json.loads((folder / "result.json").read_text()))
    one, many = results

    table, problems = compare(one, many)
    console.print()
    console.print(table)
    console.print(cost_table(one, many))
    with console.status("loading the checkpoint with plain transformers"):
        completion = check_checkpoint(
            out / "one" / "model", out / "many" / "model", data / "tokenizer"
        )
    console.print(Panel(escape(completion), title="it writes (a sort of) Python", expand=False))
    with console.status("drawing"):
        draw(one, many, out / "demo.png")
    console.print(f"{out / 'demo.png'}: curves and memory", highlight=False, soft_wrap=True)
    if problems:
        listed = "\n  ".join(problems[:8])
        raise DemoError(f"the runs disagree at {len(problems)} places\n  {listed}")
    console.print(
        f"[bold green]The runs agree[/bold green] at all {len(one['log'])} steps, "
        f"in {time.monotonic() - started:.0f} s altogether.",
        highlight=False,
    )


if __name__ == "__main__":
    # So that a terminated demo takes its ranks with it: `run` cleans up on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except DemoError as error:
        console.print(f"[bold red]FAILED[/bold red] {escape(str(error))}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
