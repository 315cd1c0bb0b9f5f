"""`ntkscope analyze`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .failures import failures_reported
from .options import parse_alpha, parse_size, parse_times, parse_window


def analyze(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="A checkpoint with a recorder's state, a trace folder, or bare checkpoints."),
    ],
    model: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Makes the model, `file.py:function`: for bare checkpoints, and to audit the gate.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="For bare checkpoints: inputs and targets, `file.py:function` or .npz.")
    ] = None,
    query: Annotated[str | None, typer.Option(metavar="SPEC", help="For bare checkpoints: held-out inputs and targets.")] = None,
    loss: Annotated[str | None, typer.Option(metavar="NAME", help="squared, mse or cross_entropy; a record knows its own.")] = None,
    times: Annotated[str | None, typer.Option(metavar="LIST", help="For bare checkpoints: optimizer times, comma-separated.")] = None,
    cutoff: Annotated[str, typer.Option(metavar="RULE", help="half, fixed:X, rank:R, energy:X, gap, rank, mp, gd or risk.")] = "half",
    window: Annotated[str | None, typer.Option(metavar="A:B", help="Optimizer steps to analyze; chosen for you if not given.")] = None,
    jackknife: Annotated[
        int | None, typer.Option(metavar="GROUPS", help="Standard errors over examples, by leaving out groups in turn (10 is usual); slow.")
    ] = None,
    rescale_time: Annotated[
        bool, typer.Option("--rescale-time", help="Stretch time by the measured size of the received gradients (clipping, loss scale).")
    ] = False,
    gate: Annotated[
        str | None, typer.Option(metavar="KIND", help="Audit this gate instead of the run's own: soft, hard or snr; needs --model.")
    ] = None,
    alpha: Annotated[str | None, typer.Option(metavar="A", help="Its noise multiple: a number, or unbiased.")] = None,
    no_audit: Annotated[bool, typer.Option("--no-audit", help="Do not audit the gate.")] = False,
    device: Annotated[str, typer.Option(help="Where to decompose matrices: auto, cpu, cuda, mps.")] = "auto",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for summary.json, results.safetensors and report.html.")] = Path(
        "ntkscope-out"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json to stdout, and nothing else.")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Do not write report.html.")] = False,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Refuse a job that needs more, for example 4G.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors.")] = False,
) -> None:
    """Split what a recorded run learned from what it left alone.

    Examples:
      ntkscope analyze checkpoint.pt

      ntkscope analyze trace/ --window 0:500 --cutoff energy:0.9 --out result

      ntkscope analyze checkpoint.pt --model train.py:make_model --gate hard --alpha unbiased

      ntkscope analyze step*.pt --model net.py:make --data data.py:train --loss cross_entropy
    """
    asked_window, asked_times, limit = parse_window(window), parse_times(times), parse_size(max_memory)
    with failures_reported():
        import torch

        import ntkscope
        from ntkscope.record.source import find_trace
        from ntkscope.record.spec import load_data, load_model

        from .progress import progress_bar
        from .terminal import show

        audit = False if no_audit else ntkscope.AuditOptions(gate=gate, alpha=parse_alpha(alpha))  # pyright: ignore[reportArgumentType]
        network, probe = None if model is None else load_model(model), None if data is None else load_data(data)
        is_bare = network is not None or probe is not None
        source = (find_trace(paths) or paths) if is_bare else paths[0] if len(paths) == 1 else paths
        if isinstance(audit, ntkscope.AuditOptions) and isinstance(source, ntkscope.Trace) and not quiet:
            price = ntkscope.price_audit(source, model=network, data=probe, audit=audit)
            if price is not None:
                typer.echo(price.describe(), err=True)
        where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        with progress_bar("analyzing", quiet=quiet) as progress:
            analysis = ntkscope.analyze(
                source,
                model=network,
                data=probe,
                query=None if query is None else load_data(query),
                loss=loss,
                times=asked_times,
                cutoff=cutoff,
                window=asked_window,
                jackknife=jackknife,
                rescale_time=rescale_time,
                audit=audit,
                device=where,
                max_memory=limit,
                progress=progress,
            )
        analysis.save(out, report=not no_report)
        if as_json:
            print(json.dumps(analysis.summary(), indent=1))
        elif not quiet:
            show(analysis, out, has_report=not no_report)
