"""`ntkscope demo`."""

from pathlib import Path
from typing import Annotated

import typer

from .failures import failures_reported


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for checkpoint.pt, summary.json and report.html.")] = Path(
        "ntkscope-demo"
    ),
    optimizer: Annotated[str, typer.Option(help="sgd (full batch), adamw or gated (minibatches of 20).")] = "sgd",
    loss: Annotated[str, typer.Option(help="squared, mse or cross_entropy.")] = "squared",
    label_noise: Annotated[float, typer.Option(help="Share of training labels that are planted wrong.")] = 0.2,
    examples: Annotated[int, typer.Option(help="Training examples, all of them in the probe.")] = 100,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; 1000 for sgd, 400 for adamw and gated.")] = None,
    seed: Annotated[int, typer.Option(help="Decides data, initialization and batches.")] = 0,
) -> None:
    """Train an MLP on digits with wrong labels planted, record it, and show what it learned and what it stored.

    Takes under two minutes on two cores. Afterwards `ntkscope analyze DIR/checkpoint.pt` gives the same result again.
    """
    with failures_reported():
        import ntkscope
        from ntkscope.experiments.demo import save_checkpoint, train_demo

        from .progress import progress_bar
        from .terminal import show

        with progress_bar("training", quiet=False) as progress:
            run = train_demo(
                optimizer=optimizer,
                loss=loss,
                label_noise=label_noise,
                num_examples=examples,
                num_steps=steps,
                seed=seed,
                progress=progress,
            )
        checkpoint = out / "checkpoint.pt"
        save_checkpoint(run, checkpoint)
        with progress_bar("analyzing", quiet=False) as progress:
            analysis = ntkscope.analyze(checkpoint, model=run.model if run.recorder.has_audit else None, progress=progress)
        analysis.save(out)
        num_wrong = int(run.data.is_noise.sum())
        memorized = f", and reproduces {run.memorized:.0%} of the {num_wrong} wrong labels" if num_wrong else ""
        print(
            f"Trained an MLP on {examples} digits for {run.recorder.trace.steps[-1]} steps: it fits {run.train_accuracy:.0%} "
            f"of the given labels{memorized}; {run.query_accuracy:.0%} of {len(run.data.query_labels)} held-out digits are right.\n"
        )
        show(analysis, out, has_report=True)
        again = " --model ntkscope.experiments.demo:make_model" if run.recorder.has_audit else ""
        print(f"The same again: ntkscope analyze {checkpoint}{again}")
