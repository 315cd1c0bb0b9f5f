"""The Transformers callback against a plain loop with a recorder: the same record, beside checkpoints too."""

import subprocess
import sys

import pytest
import torch
from compare import assert_close
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, EarlyStoppingCallback, Trainer, TrainingArguments, default_data_collator

import ntkscope
from ntkscope.integrations.transformers import NTKScopeCallback, logits_of, split_labels

NUM_EXAMPLES, LENGTH, VOCABULARY, NUM_CLASSES, BATCH = 12, 6, 20, 3, 4


class Texts(Dataset):
    """Random tokens with padding, and labels."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, VOCABULARY, (NUM_EXAMPLES, LENGTH), generator=generator)
        lengths = torch.randint(2, LENGTH + 1, (NUM_EXAMPLES, 1), generator=generator)
        self.mask = (torch.arange(LENGTH) < lengths).long()
        self.labels = torch.randint(NUM_CLASSES, (NUM_EXAMPLES,), generator=generator)

    def __len__(self):
        return NUM_EXAMPLES

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index], "labels": self.labels[index]}


def model_of(seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=NUM_CLASSES,
            max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def arguments(folder, **options):
    standard = {
        "max_steps": 8,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(output_dir=str(folder), **standard | options)


def callback_of(texts, **options):
    probe = default_data_collator([texts[index] for index in range(NUM_EXAMPLES)])
    return NTKScopeCallback(**{"probe": probe, "loss": "cross_entropy", "schedule": 3, "drift": None} | options)


def run(folder, callback, *, resume=None, model=None, others=(), **options):
    texts = Texts()
    trainer = Trainer(
        model=model_of() if model is None else model, args=arguments(folder, **options), train_dataset=texts, eval_dataset=texts
    )
    trainer.add_callback(callback)
    for other in others:
        trainer.add_callback(other)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def plain_record(steps, *, accumulate=1, divisor=1, clip=1.0, **options):
    """The same run without the Trainer."""
    texts, model = Texts(), model_of()
    model.train()
    inputs = {"input_ids": texts.ids, "attention_mask": texts.mask}
    recorder = ntkscope.Recorder(
        model, probe=(inputs, texts.labels), loss="cross_entropy", schedule=3, drift=None, forward_fn=logits_of, **options
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    recorder.attach(optimizer)
    batches = [slice(start, start + BATCH) for _ in range(100) for start in range(0, NUM_EXAMPLES, BATCH)]
    for step in range(steps):
        optimizer.zero_grad()
        for rows in batches[step * accumulate : (step + 1) * accumulate]:
            found = model(input_ids=texts.ids[rows], attention_mask=texts.mask[rows], labels=texts.labels[rows])
            (found.loss / divisor).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return recorder


def assert_same_record(found, expected, steps=None):
    assert steps is not None or found.trace.steps == expected.trace.steps
    for step in expected.trace.steps if steps is None else steps:
        mine, theirs = (recorder.trace[recorder.trace.steps.index(step)] for recorder in (found, expected))
        assert mine.time == pytest.approx(theirs.time)
        for name in ("outputs", "kernel_upper", "gradient_audit", "audit_mean"):
            first, second = getattr(mine, name), getattr(theirs, name)
            assert (first is None) == (second is None), name
            if first is not None and name != "gradient_audit":
                assert_close(first, second, 1e-3, name=f"{name} at step {step}")


@pytest.mark.parametrize(
    ("options", "plain"), [({}, {}), ({"gradient_accumulation_steps": 3}, {"accumulate": 3})], ids=["plain", "accumulated"]
)
def test_the_record_is_that_of_a_plain_loop(tmp_path, options, plain):
    callback = callback_of(Texts(), audit=True)
    run(tmp_path, callback, **options)
    recorder = callback.recorder
    assert recorder.trace.steps == [0, 3, 6, 8]
    assert recorder.facts.optimizer.startswith("AdamW(lr=0.01")
    assert not recorder.is_attached
    assert_same_record(recorder, plain_record(8, audit=True, **plain))
    assert ntkscope.analyze(recorder).closure.energy_error < 1.0


@pytest.mark.parametrize(("takes_count", "factor"), [(True, 3.0), (False, 1.0)])
def test_a_loss_that_accumulation_scales_wrongly_is_seen(tmp_path, takes_count, factor):
    """The Trainer divides the loss itself unless the model takes `num_items_in_batch`; BERT takes it and does not use it."""
    callback = callback_of(Texts())
    texts = Texts()
    trainer = Trainer(model=model_of(), args=arguments(tmp_path, gradient_accumulation_steps=3, max_grad_norm=0.0), train_dataset=texts)
    assert trainer.model_accepts_loss_kwargs
    trainer.model_accepts_loss_kwargs = takes_count
    trainer.add_callback(callback)
    trainer.train()
    analysis = ntkscope.analyze(callback.recorder)
    assert analysis.agreement.factor == pytest.approx(factor, rel=1e-4)  # three batches are the whole training set, and the probe


def test_the_record_lies_in_every_checkpoint_folder_and_is_resumed(tmp_path):
    run(tmp_path, callback_of(Texts()), save_strategy="steps", save_steps=4)
    folder = tmp_path / "checkpoint-4"
    assert ntkscope.analyze(folder / "ntkscope.pt").run.num_steps == 4
    assert ntkscope.analyze(tmp_path / "checkpoint-8" / "ntkscope.pt").run.num_steps == 8
    second = callback_of(Texts())
    run(tmp_path, second, resume=str(folder), model=model_of(1))
    assert second.recorder.trace.steps == [0, 3, 4, 6, 8]
    assert_same_record(second.recorder, plain_record(8), steps=[0, 3, 6, 8])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "ntkscope.pt").rename(elsewhere / "ntkscope.pt")
    third = callback_of(Texts(), resume_from=elsewhere)
    run(tmp_path, third, resume=str(folder), model=model_of(1))
    assert third.recorder.trace.steps == [0, 3, 4, 6, 8]
    fourth = callback_of(Texts())
    with pytest.warns(UserWarning, match="there is no record in .*checkpoint-4.ntkscope.pt: a new one begins here"):
        run(tmp_path, fourth, resume=str(folder), model=model_of(1))
    assert fourth.recorder.trace.steps == [0, 3, 4]
    with pytest.raises(ntkscope.InputError, match="No such file"):
        run(tmp_path, callback_of(Texts(), resume_from=tmp_path / "nowhere.pt"), resume=str(folder), model=model_of(1))


@pytest.mark.parametrize(
    ("stopped", "every", "last"),
    [("at the end", {"eval_strategy": "steps", "eval_steps": 3}, 8), ("in an epoch", {"eval_strategy": "steps", "eval_steps": 2}, 4),
     ("after an epoch", {"eval_strategy": "epoch"}, 6)],
)  # fmt: skip
def test_the_best_model_that_is_restored_is_not_recorded(tmp_path, stopped, every, last):
    """load_best_model_at_end writes other weights before on_train_end."""
    others = [] if stopped == "at the end" else [EarlyStoppingCallback(early_stopping_patience=1)]
    callback = callback_of(Texts(), schedule=5)
    options = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "greater_is_better": True}  # the first is best
    trainer = run(tmp_path, callback, others=others, load_best_model_at_end=True, **options, **every)
    assert trainer.state.global_step == callback.recorder.trace.steps[-1] == last
    assert [path.name for path in tmp_path.glob("checkpoint-*")] != [f"checkpoint-{last}"]
    inputs, _ = split_labels(default_data_collator([Texts()[index] for index in range(NUM_EXAMPLES)]))
    with torch.no_grad():
        restored = logits_of(trainer.model.eval(), inputs)
    assert not torch.allclose(restored, callback.recorder.trace[-1].outputs)


def test_autocast_is_looked_through(tmp_path):
    """With bf16 Accelerate wraps forward in autocast; the kernel is that of the stored weights."""
    callback = callback_of(Texts())
    trainer = run(tmp_path, callback, bf16=True, max_steps=3)
    outputs = callback.recorder.trace[-1].outputs
    trained = model_of()
    trained.load_state_dict(trainer.model.state_dict())
    inputs, _ = split_labels(default_data_collator([Texts()[index] for index in range(NUM_EXAMPLES)]))
    with torch.no_grad():
        assert_close(outputs, logits_of(trained.eval(), inputs), 1e-5)


def test_a_callback_is_of_one_run(tmp_path):
    callback = callback_of(Texts())
    run(tmp_path, callback, max_steps=2)
    with pytest.raises(ntkscope.InputError, match="This callback has recorded a run already"):
        run(tmp_path, callback, max_steps=2)


class Kept:
    """A logger."""

    def __init__(self):
        self.rows = []

    def log(self, metrics, step):
        self.rows.append((step, metrics))


def test_logging(tmp_path):
    kept = Kept()
    run(tmp_path, callback_of(Texts(), loggers=[kept]), max_steps=4)
    assert [step for step, _ in kept.rows] == [0, 3, 4]
    assert all(row["ntkscope/loss"] > 0 for _, row in kept.rows)


class Silent(nn.Module):
    """Returns no logits."""

    def forward(self, **batch):
        return {"hidden": batch["input_ids"]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_labels({"input_ids": torch.ones(3, 2)}), r"collated batch with `labels`, .* got dict of \['input_ids'\]"),
        (lambda: split_labels(Texts()), "collated batch with `labels`, or a pair"),
        (lambda: logits_of(Silent(), {"input_ids": torch.ones(3, 2)}), "Silent returns no logits, but dict"),
    ],
)
def test_bad_batches_and_models(call, message):
    with pytest.raises(ntkscope.InputTypeError, match=message):
        call()


BLOCKED = """
import sys
sys.modules["transformers"] = None
try:
    import ntkscope.integrations.transformers
except ImportError as error:
    print(error)
"""


def test_a_missing_library_is_named_with_its_extra():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ntkscope.integrations.transformers needs Transformers: pip install 'ntkscope[transformers]'."
