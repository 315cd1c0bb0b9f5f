"""`ntkscope demo`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .failures import failures_reported
from .options import LOSSES, OPTIMIZERS, check_folder, completed, one_of

EXAMPLES = r"""
ntkscope demo
ntkscope demo --label-noise 0.4 --out noisy
ntkscope demo --optimizer adamw --loss cross_entropy
"""


def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", callback=check_folder, help="Folder for checkpoint.pt, summary.json and report.html.")
    ] = Path("ntkscope-demo"),
    optimizer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            parser=one_of(OPTIMIZERS),
            autocompletion=completed(OPTIMIZERS),
            help="sgd (full batch), adamw or gated (minibatches of 20).",
        ),
    ] = "sgd",
    loss: Annotated[
        str,
        typer.Option(metavar="NAME", parser=one_of(LOSSES), autocompletion=completed(LOSSES), help="squared, mse or cross_entropy."),
    ] = "squared",
    label_noise: Annotated[float, typer.Option(metavar="SHARE", help="Share of training labels that are planted wrong, 0 to 1.")] = 0.2,
    examples: Annotated[int, typer.Option(metavar="N", help="Training examples, all of them in the probe.")] = 100,
    steps: Annotated[
        int | None, typer.Option(metavar="N", show_default="1000 for sgd, 400 for adamw and gated", help="Optimizer steps.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides data, initialization and batches.")] = 0,
) -> None:
    """Train on digits with wrong labels; analyze it.

    Trains a small network on handwritten digits, some of them with wrong labels planted, and shows what it learned and what
    it stored, and which examples look mislabeled. Takes under two minutes on two cores. Afterwards `ntkscope analyze DIR/checkpoint.pt`
    gives the same result again.
    """
    with failures_reported(out):
        from .progress import stages_shown

        with stages_shown() as stages:
            stages.begin("loading PyTorch")
            import ntkscope
            from ntkscope.experiments.demo import save_checkpoint, train_demo

            stages.begin("training")
            run = train_demo(
                optimizer=optimizer,
                loss=loss,
                label_noise=label_noise,
                num_examples=examples,
                num_steps=steps,
                seed=seed,
                progress=stages.update,
            )
            checkpoint = out / "checkpoint.pt"
            save_checkpoint(run, checkpoint)
            model = run.model if run.recorder.has_audit else None
            analysis = ntkscope.analyze(checkpoint, model=model, progress=stages.update, stage=stages.begin)
            stages.begin("writing the results")
            analysis.save(out)
        from .terminal import result_console, show

        num_wrong = int(run.data.is_noise.sum())
        memorized = f", and reproduces {run.memorized:.0%} of the {num_wrong} wrong labels" if num_wrong else ""
        result_console().print(
            f"Trained a small network on {examples} digits for {run.recorder.trace.steps[-1]} steps: it fits {run.train_accuracy:.0%} "
            f"of the given labels{memorized}; {run.query_accuracy:.0%} of {len(run.data.query_labels)} held-out digits are right.\n"
        )
        again = f"ntkscope analyze {shlex.quote(str(checkpoint))}"
        if run.recorder.has_audit:
            again += " --model ntkscope.experiments.demo:make_model"
        show(analysis, out, has_report=True, again=again)
