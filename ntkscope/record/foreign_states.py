"""States of Adams that torch does not have, put as torch's Adam saves them; M is then read by `diagonals`."""

from collections.abc import Mapping, Sequence
from typing import Any

from ntkscope.record.diagonals import Diagonal, adabelief_diagonal, fused_diagonal, transformers_diagonal
from ntkscope.record.optimizer_kinds import stored_number

DIAGONALS: dict[str, Diagonal] = {
    "fused adam": fused_diagonal,
    "transformers adamw": transformers_diagonal,
    "adabelief": adabelief_diagonal,
}
NOT_SAID = (
    "Whether weight decay passes through M is not stored; it is taken {how}. "
    'If that is wrong, set group["decoupled_weight_decay"] = {other} in the groups of the saved state.'
)


def as_adam(kind: str, groups: Sequence[Mapping[str, Any]], entries: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Put groups and entries as torch's Adam has them: a step in every entry, and how weight decay acts.

    Args:
        kind: From `recognize`.
        groups: As saved.
        entries: States of their parameters, group after group.

    Returns:
        Groups and entries; those of torch's own optimizers as they are.
    """
    found_groups, found_entries, rest = [], [], list(entries)
    for saved in groups:
        group, own, rest = dict(saved), rest[: len(saved["params"])], rest[len(saved["params"]) :]
        if kind == "fused adam":
            group.setdefault("decoupled_weight_decay", True)
            if "step" in group:
                # One count for the group: Apex keeps it there alone, DeepSpeed advances it in the last entry only.
                step = max(stored_number(value) or 0 for value in (group["step"], *(entry.get("step") for entry in own)))
                own = [entry | {"step": step} if entry else entry for entry in own]
        elif kind == "transformers adamw":
            group["decoupled_weight_decay"] = True
        elif kind == "adabelief":
            group["decoupled_weight_decay"] = bool(group["decoupled_decay"])
            lr = float(group["lr"])
            if group["decoupled_decay"] and group["fixed_decay"] and lr:
                group["weight_decay"] = float(group["weight_decay"]) / lr  # it decays by itself, whatever the learning rate
        found_groups.append(group)
        found_entries += own
    return found_groups, found_entries


def notes_on(kind: str, groups: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Say what a state leaves open and how it was taken.

    Args:
        kind: From `recognize`.
        groups: As saved.

    Returns:
        Sentences; M does not depend on any of them.
    """
    is_open = any(float(group["weight_decay"]) and "decoupled_weight_decay" not in group for group in groups)
    if kind == "fused adam" and is_open:
        return (NOT_SAID.format(how="as decoupled (adam_w_mode, the default)", other=False),)
    if kind == "adam" and is_open:
        return (NOT_SAID.format(how="as coupled (Adam; torch before 2.7 saves AdamW alike)", other=True),)
    return ()
