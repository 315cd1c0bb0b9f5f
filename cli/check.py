"""`ntkscope check`."""

from pathlib import Path
from typing import Annotated

import typer

from .failures import failures_reported
from .loading import AllowGlobals, Forward, ModelArgs, Output, Task, UnsafeLoad, in_precision_of, need_model, open_forward, open_model
from .notes import notes_shown
from .options import KINDS, completed, parse_kind, parse_size

EXAMPLES = r"""
ntkscope check --model net.py:make --data data.py:train
ntkscope check step900.pt --model net.py:make \
    --data digits.npz --outputs trace --max-memory 8G
"""


def check(
    data: Annotated[
        str, typer.Option(metavar="SPEC", help="Inputs and targets: FILE.py:FUNCTION, .npz, .safetensors, .pt, .csv or images.")
    ],
    path: Annotated[Path | None, typer.Argument(metavar="PATH", hidden=True)] = None,
    model: Annotated[str | None, typer.Option(metavar="SPEC", help="Makes the model: FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION.")] = None,
    model_arg: ModelArgs = None,
    forward: Forward = None,
    output: Output = None,
    task: Task = None,
    outputs: Annotated[
        str, typer.Option(metavar="KIND", autocompletion=completed(KINDS), help="Kernel to price: full, trace, sum or class=K.")
    ] = "full",
    weighted: Annotated[
        bool, typer.Option("--weighted", help="Price it with an elementwise preconditioner, as Adam and gates have.")
    ] = False,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", show_default="2G", help="Memory for the kernel, for example 4G.")
    ] = None,
    allow_global: AllowGlobals = None,
    unsafe_load: UnsafeLoad = False,
) -> None:
    """Test and price the kernel of a model.

    Says how it would be computed and what that costs. Tests the route of every parameter on a few examples against autograd;
    computes no spectrum. PATH is a checkpoint with the weights to check the model with; without it the model is taken as it is made.
    """
    limit, kind = parse_size(max_memory), parse_kind(outputs)
    with failures_reported():
        from .progress import stages_shown

        with stages_shown() as stages, notes_shown():
            stages.begin("loading PyTorch")
            import ntkscope
            from ntkscope.record.checkpoint import load_checkpoint
            from ntkscope.record.spec import load_data
            from ntkscope.record.weights import load_weights, unwrap

            stages.begin("loading model and data")
            trust = {"allow_globals": allow_global or (), "unsafe": unsafe_load}
            network = need_model(open_model(model, model_arg, task, [] if path is None else [path]))
            call = open_forward(forward, output, task)
            inputs = in_precision_of(network, load_data(data, **trust)[0])
            if path is not None:
                found = unwrap(load_checkpoint(path, **trust), path, model=network)
                for sentence in found.sentences():
                    typer.echo(f"note: {sentence}", err=True)
                load_weights(network, found)
            stages.begin("checking every parameter")
            price, coverage = ntkscope.price_gram(network, inputs, outputs=kind, weighted=weighted, forward_fn=call, max_memory=limit)

        from .terminal import print_rows, result_console

        console = result_console(unfolded=True)
        rows = []
        for name, parameter in network.named_parameters():
            shape = " x ".join(map(str, parameter.shape)) or "1"
            route = coverage.routes.get(name)
            if route is None:
                route = f"excluded: {coverage.excluded[name]}" if name in coverage.excluded else "tied"
            elif name in coverage.reasons:
                route += f": {coverage.reasons[name]}"
            rows.append((name, shape, route))
        print_rows(console, ("parameter", "shape", "route"), rows)
        left = sum(route in ("torch.func", "loop") for route in coverage.routes.values())
        console.print(
            f"\nCoverage: {len(coverage.routes) - left} parameters by rules, {left} by autograd, {len(coverage.excluded)} excluded."
        )
        console.print("Probe: the Jacobian of four examples agrees with autograd in every parameter.")
        console.print(describe_price(price))


def describe_price(price: object) -> str:
    """Put a price into sentences.

    Args:
        price: From `ntkscope.price_gram`.

    Returns:
        A few lines.
    """
    from ntkscope._checks import format_bytes
    from ntkscope.kernel.price import Price

    assert isinstance(price, Price)
    lines = [
        f"Price of the {price.outputs} kernel: {price.num_outputs:,} x {price.num_outputs:,} ({format_bytes(price.result_bytes)}) from "
        f"{price.num_examples:,} examples and {price.num_params:,} parameters; about {seconds(price.seconds)}, "
        f"peak memory about {format_bytes(price.peak_bytes)}, {price.num_blocks} block{'s' if price.num_blocks > 1 else ''}, "
        f"{price.multiply_adds:.1e} multiply-adds, {price.num_passes:,} backward passes of one example."
    ]
    if price.is_bound_by_products:
        lines.append(
            f"{price.product_share:.0%} of the multiply-adds are products of weight gradients, outputs² x parameters: "
            "the exact kernel costs that much."
        )
    if price.alternatives:
        lines.append(
            "Cheaper: " + "; ".join(f"{a.name} about {seconds(a.seconds)}, {format_bytes(a.bytes)}" for a in price.alternatives) + "."
        )
    return "\n".join(lines)


def seconds(value: float) -> str:
    """Write a duration.

    Args:
        value: Seconds.

    Returns:
        Text.
    """
    return f"{value:.2g} s" if value < 120 else f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"
