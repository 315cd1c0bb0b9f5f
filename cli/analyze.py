"""`ntkscope analyze`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .failures import failures_reported
from .loading import AllowGlobals, Forward, ModelArgs, Output, Task, UnsafeLoad, in_precision_of, only_one, open_forward, open_model
from .notes import notes_shown
from .options import (
    ALPHAS,
    CUTOFFS,
    DEVICES,
    GATES,
    LOSSES,
    check_folder,
    completed,
    one_of,
    parse_alpha,
    parse_size,
    parse_times,
    parse_window,
)

EXAMPLES = r"""
ntkscope analyze checkpoint.pt
ntkscope analyze trace/ --window 0:500 --out result
ntkscope analyze checkpoint.pt --json | jq .signal_rank
ntkscope analyze checkpoint.pt --model train.py:make \
    --gate hard --alpha unbiased
ntkscope analyze step*.pt --model net.py:make \
    --data data.py:train --loss cross_entropy
ntkscope analyze weights.pt --model net.py:make \
    --data train.csv --loss squared --continue 100
ntkscope analyze checkpoint-*/ --loss cross_entropy \
    --task sequence-classification --data tokens.npz
"""


def analyze(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", hidden=True)],
    model: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Makes the model, FILE.py:FUNCTION: for bare checkpoints, and to audit the gate."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="For bare checkpoints: inputs and targets, FILE.py:FUNCTION, .npz, .safetensors, .pt, .csv or images."
        ),
    ] = None,
    query: Annotated[str | None, typer.Option(metavar="SPEC", help="For bare checkpoints: held-out inputs and targets, as --data.")] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            parser=one_of(LOSSES),
            autocompletion=completed(LOSSES),
            help="For bare checkpoints: squared, mse or cross_entropy; a record knows its own.",
        ),
    ] = None,
    times: Annotated[
        str | None,
        typer.Option(metavar="T1,T2,...", help="For bare checkpoints: the optimizer time of each, where the files do not say it."),
    ] = None,
    steps_on: Annotated[
        int | None,
        typer.Option(
            "--continue",
            metavar="STEPS",
            min=1,
            help="For one bare checkpoint: train on from it in memory, by plain gradient descent on --data, and analyze that.",
        ),
    ] = None,
    model_arg: ModelArgs = None,
    forward: Forward = None,
    output: Output = None,
    task: Task = None,
    cutoff: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            autocompletion=completed(CUTOFFS),
            help="What counts as learned: half (of its loss is gone), fixed:X, rank:R, energy:X, gap, rank, mp, gd or risk.",
        ),
    ] = "half",
    window: Annotated[
        str | None, typer.Option(metavar="A:B", help="Optimizer steps to analyze, from A to B; chosen for you if not given.")
    ] = None,
    jackknife: Annotated[
        int | None, typer.Option(metavar="GROUPS", help="Standard errors over examples, by leaving out groups in turn (10 is usual); slow.")
    ] = None,
    rescale_time: Annotated[
        bool, typer.Option("--rescale-time", help="Stretch time by the measured size of the received gradients (clipping, loss scale).")
    ] = False,
    gate: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            parser=one_of(GATES),
            autocompletion=completed(GATES),
            help="Audit this gate instead of the run's own: soft, hard or snr; needs --model.",
        ),
    ] = None,
    alpha: Annotated[
        str | None, typer.Option(metavar="A", autocompletion=completed(ALPHAS), help="Its noise multiple: a number, or unbiased.")
    ] = None,
    no_audit: Annotated[bool, typer.Option("--no-audit", help="Do not audit the gate.")] = False,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            autocompletion=completed(DEVICES),
            help="Where to run the model (cpu, cuda) and decompose matrices: auto, cpu, cuda, mps.",
        ),
    ] = "auto",
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", callback=check_folder, help="Folder for summary.json, results.safetensors and report.html."),
    ] = Path("ntkscope-out"),
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json to stdout, and nothing else.")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Do not write report.html.")] = False,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Refuse a job that needs more, for example 4G.")] = None,
    allow_global: AllowGlobals = None,
    unsafe_load: UnsafeLoad = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors, and with --json the summary.")] = False,
) -> None:
    """Split what a run learned from what it stored.

    PATH is a checkpoint that holds a recorder's state, or a trace folder, or two or more bare checkpoints of one run with
    --model, --data and --loss, or one of these and --continue.
    """
    asked_window, asked_times, limit = parse_window(window), parse_times(times), parse_size(max_memory)
    multiple = parse_alpha(alpha)
    with failures_reported(out):
        from .progress import stages_shown

        with stages_shown(quiet=quiet) as stages, notes_shown(quiet=quiet):
            stages.begin("loading PyTorch")
            import torch

            import ntkscope
            from ntkscope._checks import check_device
            from ntkscope.record.data_files import check_same_classes
            from ntkscope.record.source import find_trace
            from ntkscope.record.spec import load_data
            from ntkscope.spectrum.cutoffs import parse_rule

            parse_rule(cutoff)  # before the user's data are loaded, which may take long
            audit = False if no_audit else ntkscope.AuditOptions(gate=gate, alpha=multiple)  # pyright: ignore[reportArgumentType]
            stages.begin("loading model and data" if model or data or query else "reading the record")
            trust = {"allow_globals": allow_global or (), "unsafe": unsafe_load}
            place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
            network, call = open_model(model, model_arg, task, paths), open_forward(forward, output, task)
            check_device(place)
            if network is not None and place.startswith("cuda"):
                network.to(place)
            given = (None if spec is None else load_data(spec, **trust) for spec in (data, query))
            probe, held_out = (None if pair is None else (in_precision_of(network, pair[0]), pair[1]) for pair in given)
            if data is not None and query is not None:
                check_same_classes(data, query)
            is_bare = network is not None or probe is not None
            if steps_on is not None:
                stages.begin("training on")
                source = ntkscope.continue_training(
                    only_one(paths),
                    network,
                    probe,
                    loss=loss,
                    num_steps=steps_on,
                    query=held_out,
                    forward_fn=call,
                    max_memory=limit,
                    progress=stages.update,
                    **trust,
                )
            else:
                source = (find_trace(paths, **trust) or paths) if is_bare else paths[0] if len(paths) == 1 else paths
            if isinstance(audit, ntkscope.AuditOptions) and isinstance(source, ntkscope.Trace) and not quiet:
                price = ntkscope.price_audit(source, model=network, data=probe, forward_fn=call, audit=audit)
                if price is not None:
                    typer.echo(price.describe(), err=True)
            analysis = ntkscope.analyze(
                source,
                model=network,
                data=probe,
                query=held_out,
                loss=loss,
                times=asked_times,
                forward_fn=call,
                **trust,
                cutoff=cutoff,
                window=asked_window,
                jackknife=jackknife,
                rescale_time=rescale_time,
                audit=audit,
                device=place,
                max_memory=limit,
                progress=stages.update,
                stage=stages.begin,
            )
            stages.begin("writing the results")
            analysis.save(out, report=not no_report)
        if not quiet:
            if times is not None and steps_on is not None:
                typer.echo("note: --times not used; the time of the steps on from here is known.", err=True)
            is_recorded = steps_on is None and (not is_bare or isinstance(source, ntkscope.Trace))
            unused = [name for name, value in (("--times", times), ("--query", query)) if value is not None and is_recorded]
            if unused:
                typer.echo(f"note: {' and '.join(unused)} not used; the record has its own.", err=True)
            is_audited = analysis.gate is not None and analysis.gate.audit is not None
            if not (is_audited or no_audit) and ((is_recorded and model) or gate or alpha):
                reason = analysis.gate_reason if analysis.gate is None else analysis.gate.audit_reason
                typer.echo(f"note: the gate was not audited: {reason}.", err=True)
        if as_json:
            print(json.dumps(analysis.summary(), indent=1), flush=True)
        elif not quiet:
            from .terminal import show

            show(analysis, out, has_report=not no_report)
