"""Options that say what is loaded and how, shared by commands: odd models, data in many forms, and what a checkpoint may run."""

import ast
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import TASKS, completed, one_of

if TYPE_CHECKING:
    from torch import nn

    from ntkscope._types import ForwardFn

ModelArgs = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="K=V", help="An argument of --model's function, for example hidden=64; may be repeated."),
]
Forward = Annotated[
    str | None, typer.Option("--forward", metavar="SPEC", help="The model's call where it is an odd one: a function of (model, batch).")
]
Output = Annotated[
    str | None,
    typer.Option("--output", metavar="KEY", help="Which part of what the model returns: a position, key or attribute, as 0 or logits."),
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="NAME",
        parser=one_of(TASKS),
        autocompletion=completed(TASKS),
        help=f"For models of Transformers: {', '.join(TASKS)}. Makes the model too, where PATH is its folder.",
    ),
]
AllowGlobals = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-global", metavar="NAME", help="A class or function that a checkpoint may use, by its full name; may be repeated."
    ),
]
UnsafeLoad = Annotated[bool, typer.Option("--unsafe-load", help="Let the checkpoint run any code. Only for files that you trust.")]


def parse_arguments(texts: Sequence[str] | None) -> dict[str, Any]:
    """Read `K=V` pairs; values are numbers, true, false, null, lists and tuples where they read so, else text.

    Args:
        texts: What the user typed.

    Returns:
        Values by name.

    Raises:
        typer.BadParameter: If one is no pair, or a name comes twice.
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"{text!r} is no argument. Give NAME=VALUE, for example hidden=64.", param_hint="'--model-arg'")
        if name in found:
            raise typer.BadParameter(f"{name!r} is given twice. Give it once.", param_hint="'--model-arg'")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    """Read a value as JSON or Python write it."""
    for read, failures in ((json.loads, ValueError), (ast.literal_eval, (ValueError, SyntaxError))):
        try:
            return read(text)
        except failures:
            continue
    return text


def only_one(paths: Sequence[Path]) -> Path:
    """Check that --continue has one checkpoint to go on from.

    Args:
        paths: What the user typed.

    Returns:
        The only one.

    Raises:
        typer.BadParameter: If there are several.
    """
    if len(paths) > 1:
        raise typer.BadParameter(
            f"it goes on from one checkpoint, got {len(paths)}. Give one, or leave --continue out.", param_hint="'--continue'"
        )
    return paths[0]


def open_model(model: str | None, arguments: Sequence[str] | None, task: str | None, paths: Sequence[Path]) -> "nn.Module | None":
    """Make the model, from its SPEC or, for a task of Transformers, from the configuration beside its weights.

    Args:
        model: SPEC of --model.
        arguments: Of --model-arg.
        task: Of --task.
        paths: The checkpoints.

    Returns:
        The model; None where nothing says how to make it.

    Raises:
        typer.BadParameter: If there are arguments, and no function to give them to.
    """
    from ntkscope.record.spec import load_model

    given = parse_arguments(arguments)
    if model is not None:
        return load_model(model, given)
    if given:
        raise typer.BadParameter("there is no --model to give it to. Give --model SPEC too.", param_hint="'--model-arg'")
    folder = next((place for path in paths for place in (path, path.parent) if (place / "config.json").is_file()), None)
    if task is None:
        return None  # a record needs none
    if folder is None:
        logging.getLogger("ntkscope").info("No model was made for --task: there is no config.json beside the weights. Give --model SPEC.")
        return None
    from ntkscope.integrations.pretrained import model_for_task

    return model_for_task(folder, task)


def need_model(model: "nn.Module | None") -> "nn.Module":
    """Check that there is a model.

    Args:
        model: From `open_model`.

    Returns:
        The same.

    Raises:
        typer.BadParameter: If there is none.
    """
    if model is None:
        raise typer.BadParameter("nothing says how to make the model. Give --model SPEC, or --task NAME and a folder with config.json.")
    return model


def in_precision_of(model: "nn.Module | None", inputs: Any) -> Any:
    """Put inputs into the precision of a model: NumPy's default is another than torch's.

    Args:
        model: From `open_model`.
        inputs: A batch.

    Returns:
        The batch; the same, where there is nothing to do.
    """
    from ntkscope._checks import InputTypeError
    from ntkscope.kernel.batch import batch_tensors, map_batch

    own = None if model is None else next((each.dtype for each in model.parameters() if each.is_floating_point()), None)
    if own is None:
        return inputs
    try:
        others = {tensor.dtype for tensor in batch_tensors(inputs) if tensor.is_floating_point()} - {own}
    except InputTypeError:
        return inputs  # what is no batch is said where it is used
    if not others:
        return inputs
    kinds = ", ".join(str(kind).removeprefix("torch.") for kind in others)
    logging.getLogger("ntkscope").info("Inputs are converted from %s to %s, as the model is.", kinds, str(own).removeprefix("torch."))
    return map_batch(lambda tensor: tensor.to(own) if tensor.is_floating_point() else tensor, inputs)


def open_forward(forward: str | None, output: str | None, task: str | None) -> "ForwardFn | None":
    """Compose the model's call.

    Args:
        forward: SPEC of --forward.
        output: Of --output.
        task: Of --task.

    Returns:
        The call; None for the usual one.
    """
    from ntkscope.record.forwards import make_forward
    from ntkscope.record.spec import load_forward

    return make_forward(forward=None if forward is None else load_forward(forward), output=output, task=task)
