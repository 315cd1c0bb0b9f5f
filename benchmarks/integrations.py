"""Runs of Lightning and Transformers on real data, recorded by the callbacks: `python -m benchmarks.integrations`.

Each run is trained without and with the callback, in turn, each in a fresh process: closure errors, and what recording costs. Nothing is
downloaded: digits come with scikit-learn, texts are the topics of Python's own help, and the BERT starts from random weights.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntkscope
from ntkscope.experiments.demo import load_digits_data

ROOT = Path(__file__).parent.parent
MAX_OVERHEAD = 0.25
NUM_ROUNDS = 3
TOPICS = ("types", "string-methods", "debugger", "compound", "typesseq", "formatstrings")
PARAGRAPHS, HELD_OUT, LENGTH, VOCABULARY = 10, 5, 32, 1000  # of each topic; of each topic; tokens; words


@dataclass(frozen=True)
class Clock:
    """Time on the wall, and of the processor: only the second is the same on a busy machine."""

    wall: float
    cpu: float

    @staticmethod
    def now() -> "Clock":
        """Read the clocks."""
        return Clock(time.perf_counter(), time.process_time())

    def elapsed(self) -> "Clock":
        """Measure the time since."""
        now = Clock.now()
        return Clock(now.wall - self.wall, now.cpu - self.cpu)


def lightning_run(*, is_recorded: bool, folder: str, max_overhead: float | None = None, width: int = 256) -> tuple[Clock, Any]:
    """Train an MLP on 100 digits, 20 % of them with wrong labels, and follow them all."""
    import lightning.pytorch as pl

    from ntkscope.integrations.lightning import NTKScopeCallback

    data = load_digits_data(100, 0.2, 0)

    class Digits(pl.LightningModule):
        """MLP with two hidden layers and GELU."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)

    callback = NTKScopeCallback(
        probe=(data.inputs, data.labels),
        query=(data.query_inputs, data.query_labels),
        loss="cross_entropy",
        clean_targets=data.clean_labels,
        max_overhead=max_overhead,
        image_shape=(8, 8),
    )
    trainer = pl.Trainer(
        max_epochs=1000,
        callbacks=[callback] if is_recorded else [],
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(data.inputs, data.labels), batch_size=50, shuffle=True)
    module = Digits()
    start = Clock.now()
    trainer.fit(module, loader)
    return start.elapsed(), callback.recorder


def texts() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take paragraphs of six topics of Python's help, as word numbers."""
    paragraphs = {name: [p for p in re.split(r"\n\s*\n", topics.topics[name]) if len(p.split()) >= 12] for name in TOPICS}
    words = {name: [re.findall(r"\w+|[^\w\s]", p.lower()) for p in found] for name, found in paragraphs.items()}
    counted = Counter(word for found in words.values() for p in found for word in p)
    numbers = {word: index for index, (word, _) in enumerate(counted.most_common(VOCABULARY - 2), start=2)}
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, list[tuple[list[int], int]]] = {"train": [], "held out": []}
    for label, name in enumerate(TOPICS):
        order = torch.randperm(len(words[name]), generator=generator)[: PARAGRAPHS + HELD_OUT].tolist()
        for place, index in enumerate(order):
            part = "held out" if place < HELD_OUT else "train"
            parts[part].append(([numbers.get(word, 1) for word in words[name][index][:LENGTH]], label))
    made = []
    for rows in parts.values():
        ids, mask = torch.zeros(len(rows), LENGTH, dtype=torch.long), torch.zeros(len(rows), LENGTH, dtype=torch.long)
        for place, (row, _) in enumerate(rows):
            ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
        made.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in rows])})
    return made[0], made[1]


def transformers_run(*, is_recorded: bool, folder: str, dropout: float = 0.0) -> tuple[Clock, Any]:
    """Train a small BERT to tell six topics of Python's help apart on 60 paragraphs, and follow them all."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from ntkscope.integrations.transformers import NTKScopeCallback

    train, held_out = texts()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=len(TOPICS),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    callback = NTKScopeCallback(
        probe=train,
        query=held_out,
        loss="cross_entropy",
    )
    rows = [{name: value[index] for name, value in train.items()} for index in range(len(train["labels"]))]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=400,
        per_device_train_batch_size=30,
        learning_rate=5e-4,
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=BertForSequenceClassification(config), args=arguments, train_dataset=rows)
    if is_recorded:
        trainer.add_callback(callback)
    start = Clock.now()
    trainer.train()
    return start.elapsed(), callback.recorder


RUNS: dict[str, tuple[Callable[..., tuple[Clock, Any]], dict[str, Any]]] = {
    "lightning": (lightning_run, {}),
    "lightning, wide, at most 25 %": (lightning_run, {"max_overhead": MAX_OVERHEAD, "width": 1024}),
    "transformers": (transformers_run, {}),
    "transformers, dropout 0.1": (transformers_run, {"dropout": 0.1}),
}


def run_once(name: str, *, is_recorded: bool) -> dict[str, Any]:
    """Make one run in this process."""
    warnings.simplefilter("ignore")
    run, options = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        took, recorder = run(is_recorded=is_recorded, folder=folder, **options)
    found: dict[str, Any] = {"wall": took.wall, "cpu": took.cpu}
    if is_recorded:
        found |= {"snapshots": len(recorder.trace), "steps": recorder.num_steps}
        found |= {"training": recorder.seconds["training"], "recording": recorder.seconds["recording"]}
        found["windows"] = [measure_window(recorder, window) for window in (None, (recorder.num_steps // 20, recorder.num_steps))]
    return found


def measure_window(recorder: ntkscope.Recorder, window: tuple[int, int] | None) -> dict[str, Any]:
    """Analyze one window of a run."""
    analysis = ntkscope.analyze(recorder, window=window)
    return {
        "window": f"{analysis.window.start_step}:{analysis.window.stop_step}",
        "energy error": f"{analysis.closure.energy_error:.1%}",
        "gradient error": f"{analysis.closure.gradient_error:.1%}",
        "trustworthy": analysis.closure.trustworthy,
        "gradients received / of the probe": None if analysis.agreement is None else round(analysis.agreement.factor, 3),
        "signal": f"{analysis.channels.signal_rank} of {analysis.channels.num_modes}",
        "noise AUROC": (analysis.summary()["auroc"] or {}).get("half_time"),
        "test motion error": None if analysis.transfer is None else f"{analysis.transfer.fit.relative_error:.0%}",
    }


def in_fresh_process(name: str, *, is_recorded: bool) -> dict[str, Any]:
    """Make one run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.integrations", "--once", name, *(["--recorded"] if is_recorded else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure_ranks() -> None:
    """Measure what following rank 0's orders costs a step of two ranks on one machine, and what sharing a kernel saves."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "benchmarks.integrations", "--rank"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout if done.returncode == 0 else done.stderr[-3000:])


def rank_job() -> None:
    """Be one of two ranks."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    data = load_digits_data(120, 0.2, 0)
    for label, options in (("not recorded", None), ("rank 0 alone", {}), ("shared", {"distributed": True})):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 32, 3), nn.GELU(), nn.Conv2d(32, 64, 3), nn.GELU(), nn.Flatten(), nn.Linear(1024, 10)]
        model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers)
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
        recorder = None
        if options is not None and (options or dist.get_rank() == 0):
            recorder = ntkscope.Recorder(
                ddp, probe=(data.inputs, data.labels), loss="cross_entropy", schedule=[30, 100], drift=None, **options
            )
            recorder.attach(optimizer)
        times = []
        for _ in range(100):
            start = time.perf_counter()
            optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(data.inputs[:16]), data.labels[:16]).backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
        if dist.get_rank() == 0:
            plain = sorted(times)[len(times) // 2]
            kernel = "" if recorder is None else f", snapshot {recorder.seconds['snapshot']:.2f} s"
            print(f"two ranks, {label}: median step {plain * 1e3:.2f} ms{kernel}")
        dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure all runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.integrations", description=main.__doc__)
    parser.add_argument("which", nargs="*", default=[*RUNS, "ranks"])
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--once")
    parser.add_argument("--recorded", action="store_true")
    parser.add_argument("--rank", action="store_true")
    arguments = parser.parse_args()
    if arguments.rank:
        rank_job()
        return
    if arguments.once:
        print(json.dumps(run_once(arguments.once, is_recorded=arguments.recorded)))
        return
    for name in arguments.which:
        if name == "ranks":
            measure_ranks()
            continue
        rounds = [[in_fresh_process(name, is_recorded=is_recorded) for is_recorded in (False, True)] for _ in range(arguments.rounds)]
        for kind in ("wall", "cpu"):
            plain, recorded = (min(pair[index][kind] for pair in rounds) for index in (0, 1))
            print(f"{name}: {kind} time without {plain:.1f} s, with {recorded:.1f} s, {recorded / plain - 1:.0%} more")
        for _, found in rounds:
            share = found["recording"] / found["training"]
            taken = f"{found['snapshots']} snapshots in {found['steps']} steps"
            print(f"  {taken}; recording took {found['recording']:.1f} s, {share:.0%} of training")
            for row in found["windows"]:
                print("   ", row)


if __name__ == "__main__":
    main()
