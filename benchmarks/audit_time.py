"""How long a full audit takes, and what it was priced at: `python -m benchmarks.audit_time` (about a minute).

Digits, n = 100, MLP 64-67-10 (5,035 parameters), AdamW, 400 steps; 10 audited steps, 100 permutations. Asked: under 3 minutes.
"""

import time

import torch

import ntkscope
from benchmarks.gate_runs import NUM_EXAMPLES, Setting, make_optimizer, one_hot, train
from benchmarks.live_audit import wide_model
from ntkscope.experiments.demo import load_digits_data

NUM_STEPS, ASKED = 400, 180.0


def seconds(recorder: ntkscope.Recorder, audit: ntkscope.AuditOptions | bool) -> tuple[float, ntkscope.Analysis]:
    """Time one analysis."""
    start = time.perf_counter()
    analysis = ntkscope.analyze(recorder, audit=audit)
    return time.perf_counter() - start, analysis


def main() -> None:
    """Print price and time."""
    data = load_digits_data(NUM_EXAMPLES, 0.2, 0)
    model, setting = wide_model(), Setting()
    recorder = ntkscope.Recorder(model, probe=(data.inputs, one_hot(data.labels)), loss="squared", drift=None, audit=True)
    optimizer = make_optimizer(model, setting)
    recorder.attach(optimizer)
    train(model, optimizer, data, setting, NUM_STEPS)
    options = ntkscope.AuditOptions(num_steps=10, num_permutations=100)
    price = ntkscope.price_audit(recorder, audit=options)
    assert price is not None
    print(price.describe())
    plain, _ = seconds(recorder, audit=False)
    audited, analysis = seconds(recorder, options)
    assert analysis.gate is not None
    assert analysis.gate.audit is not None
    steps, facts = len(analysis.gate.audit.steps), recorder.trace.facts
    print(
        f"{facts.num_params:,} parameters, {steps} audited steps, {torch.get_num_threads()} threads: analysis {plain:.1f} s, with the "
        f"audit {audited:.1f} s (asked {ASKED:.0f} in all): {'ok' if audited < ASKED and steps == options.num_steps else 'NO'}; "
        f"audit {audited - plain:.1f} s, priced at {price.seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
