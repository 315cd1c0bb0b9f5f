"""The order and the optimizer time of checkpoints of one run."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from ntkscope._checks import InputError
from ntkscope._display import Displayed
from ntkscope.record.saved_moment import SavedMoment

HOW = "--times takes one time per file, in the order in which the files are given: the learning rate summed over the steps before it."
Same = Callable[[Path, Path], bool]


@dataclass(frozen=True)
class Timeline(Displayed):
    """Checkpoints in order.

    Attributes:
        moments: By time; each with a step.
        times: Optimizer time τ of each, strictly increasing.
        notes: What a reader must know of them.
    """

    moments: tuple[SavedMoment, ...]
    times: tuple[float, ...]
    notes: tuple[str, ...]


def make_timeline(moments: Sequence[SavedMoment], times: Sequence[float] | None, *, same_weights: Same) -> Timeline:
    """Order checkpoints, and say when each was saved.

    Args:
        moments: In any order.
        times: Optimizer time of each; else from their steps and learning rates.
        same_weights: Tells whether two files hold the same weights.

    Returns:
        The checkpoints in order; copies of one another count once.

    Raises:
        InputError: If something does not say when it was saved, or two checkpoints contradict each other.
    """
    line = _from_steps(moments, same_weights) if times is None else _from_times(moments, times, same_weights)
    for (before, start), (after, stop) in pairwise(zip(line.moments, line.times, strict=True)):
        if stop <= start:
            raise InputError(
                f"There is no time between {before.path} and {after.path} (both at {start:g}): was the learning rate zero between them? "
                f"Leave one of them out. {HOW}"
            )
    if len(line.moments) < 2:
        raise InputError(
            f"All files hold the same moment as {moments[0].path}; a trajectory needs two or more. Give checkpoints of other steps."
        )
    return line


def _from_times(moments: Sequence[SavedMoment], times: Sequence[float], same_weights: Same) -> Timeline:
    """Order by given times; steps are for display where all files have them."""
    if len(times) != len(moments):
        raise InputError(f"--times needs one time per checkpoint: {len(moments)} files, {len(times)} times.")
    if not all(math.isfinite(time) for time in times):
        raise InputError(f"--times must be finite numbers, got {', '.join(f'{time:g}' for time in times)}.")
    order = sorted(range(len(moments)), key=lambda k: times[k])
    line, notes = _without_copies([(times[k], moments[k]) for k in order], same_weights)
    for (_, before), (_, after) in pairwise(line):
        if before.path.resolve() == after.path.resolve():
            raise InputError(f"{before.path} is given twice, with two times. Give every file once.")
        if before.step is not None and after.step is not None and after.step < before.step:
            raise InputError(
                f"--times puts {before.path} before {after.path}, but they were saved at steps {before.step} and {after.step}. {HOW}"
            )
    steps = [moment.step for _, moment in line]
    ordered = [moment for _, moment in line]
    if None in steps or len(set(steps)) < len(steps):
        ordered = [replace(moment, step=position) for position, moment in enumerate(ordered)]
        notes.append("Not every checkpoint says its step, so steps are the numbers of the checkpoints, from 0.")
    return Timeline(tuple(ordered), tuple(time for time, _ in line), tuple(notes))


def _from_steps(moments: Sequence[SavedMoment], same_weights: Same) -> Timeline:
    """Integrate learning rates over steps; between two checkpoints whose rates differ by the trapezoid rule."""
    silent = [moment for moment in moments if moment.step is None or moment.pace is None]
    if silent:
        raise InputError(_silence(moments, silent))
    ordered = sorted(((float(moment.step or 0), moment) for moment in moments), key=lambda each: (each[0], str(each[1].path)))
    line, notes = _without_copies(ordered, same_weights)
    first = line[0][1]
    assert first.pace is not None
    times = [first.pace.time(0, first.step or 0)]
    for (_, before), (_, after) in pairwise(line):
        start, stop = before.step, after.step
        assert start is not None
        assert stop is not None
        assert before.pace is not None
        assert after.pace is not None
        if start == stop:
            raise InputError(
                f"{before.path} and {after.path} were both saved at step {start}, with other weights: they are of different runs, or the "
                f"step is not that of the optimizer. Leave one of them out, or give --times. {HOW}"
            )
        times.append(times[-1] + 0.5 * (before.pace.time(start, stop) + after.pace.time(start, stop)))
    rates = [moment.pace.rate for _, moment in line if moment.pace is not None]
    if min(rates) < max(rates):
        notes.append(
            f"The learning rate changed from {rates[0]:g} to {rates[-1]:g}; time by trapezoid over the steps between checkpoints. "
            "Give --times if it jumped, or went up and down between two of them."
        )
    return Timeline(tuple(moment for _, moment in line), tuple(times), tuple(notes))


def _without_copies(line: list[tuple[float, SavedMoment]], same_weights: Same) -> tuple[list[tuple[float, SavedMoment]], list[str]]:
    """Leave out checkpoints that repeat the one before."""
    kept, notes = line[:1], []
    for place, moment in line[1:]:
        last_place, last = kept[-1]
        if place == last_place and same_weights(last.path, moment.path):
            notes.append(f"{moment.path} repeats {last.path}, and counts once.")
        else:
            kept.append((place, moment))
    return kept, notes


def _silence(moments: Sequence[SavedMoment], silent: Sequence[SavedMoment]) -> str:
    """Say what is not known of when checkpoints were saved, and what to do."""
    parts = [
        (moment.path, " and ".join(name for name, value in (("step", moment.step), ("learning rate", moment.pace)) if value is None))
        for moment in silent
    ]
    more = f" (nor do {len(parts) - 1} more of {len(moments)} files)" if len(parts) > 1 else ""
    way_out = f"Leave {'them' if len(parts) > 1 else 'it'} out, or give" if len(moments) - len(silent) > 1 else "Give"
    message = f"{parts[0][0]} does not say its {parts[0][1]}{more}, so its optimizer time is unknown. {way_out} --times T1,T2,... . {HOW}"
    numbers = [_number_in(moment.path) for moment in moments]
    if None in numbers or len(set(numbers)) < len(numbers):
        return message
    rates = {moment.pace.rate for moment in moments if moment.pace is not None}
    paces = [moment.pace for moment in moments if moment.pace is not None]
    if all(_counts_epochs(moment.path) for moment in moments):
        if len(rates) > 1 or not paces:
            return f"{message} If the numbers in the names are epochs, that sum is over all of their steps."
        times = ",".join(f"{paces[0].settled * (number or 0):g}" for number in numbers)
        known = f"If the numbers in the names are epochs, and the learning rate was {paces[0].rate:g},"
        return f"{message} {known} that is {times}, each times the steps of an epoch."
    if len(rates) == 1:
        times = ",".join(f"{paces[0].time(0, number or 0):g}" for number in numbers)
        return f"{message} If the numbers in the names are steps, and the learning rate was {paces[0].rate:g}, that is --times {times}."
    return f"{message} If the numbers in the names are steps, that is the learning rate times {','.join(map(str, numbers))}."


def _counts_epochs(path: Path) -> bool:
    """Say whether the last number in a file's name is that of an epoch: epoch_3.pt, but not epoch=3-step=300.ckpt."""
    return re.search(r"ep(och)?[-_=]?\d+\D*$", path.name if path.is_dir() else path.stem, re.IGNORECASE) is not None


def _number_in(path: Path) -> int | None:
    """Find the last number in a file's name: step100.pt, checkpoint-200, epoch=3-step=300.ckpt."""
    found = re.findall(r"\d+", path.name if path.is_dir() else path.stem)
    return int(found[-1]) if found else None
