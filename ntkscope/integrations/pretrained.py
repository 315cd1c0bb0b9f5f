"""Models of Hugging Face's transformers, made from the configuration beside their weights; no code of the folder is run."""

from pathlib import Path

from torch import nn

from ntkscope._checks import InputError, UnsupportedError, closest
from ntkscope.record.forwards import TASKS

try:
    from transformers import (
        AutoConfig,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )
except ImportError as error:
    raise UnsupportedError(
        "Making a model for a task needs Transformers: pip install 'ntkscope[transformers]'; or make it yourself with --model SPEC."
    ) from error

MAKERS = {
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "regression": AutoModelForSequenceClassification,
}


def model_for_task(folder: str | Path, task: str) -> nn.Module:
    """Make a model of the kind that a folder's config.json names, with random weights.

    The configuration chooses among the classes of transformers, and cannot bring its own.

    Args:
        folder: With a config.json, as `save_pretrained` writes it.
        task: As for `make_forward`.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: If the task is unknown, or transformers has no such model for it.
    """
    if task not in MAKERS:
        raise InputError(f"Unknown task {task!r}; there are {', '.join(TASKS)}.{closest(task, MAKERS)}")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        if task == "regression":
            config.num_labels = 1
        model = MAKERS[task].from_config(config, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"{folder}: transformers makes no model for {task} from its config.json ({type(error).__name__}: {str(error)[:200]}). Make it "
            "yourself with --model SPEC; its batch is then passed as the forward function says (--forward)."
        ) from error
    return model.eval()
