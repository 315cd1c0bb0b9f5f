"""The Lightning callback against a plain loop with a recorder: the same record, in checkpoints too, and clear words where it cannot be."""

import copy
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import pytorch_lightning as older
import torch
from compare import assert_close
from lightning.pytorch.loggers import CSVLogger
from record_case import problem
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ntkscope
from ntkscope.integrations.lightning import NTKScopeCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create"),
]
BATCH = 2


class Module(pl.LightningModule):
    """The problem of record_case, double precision unless the plugin says otherwise."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        model, self.inputs, self.targets = problem()
        self.net = model.to(dtype)
        self.inputs = self.inputs.to(dtype)

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def data(self):
        return DataLoader(TensorDataset(self.inputs, self.targets), batch_size=BATCH)


def trainer_of(folder, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "default_root_dir": folder}
    return pl.Trainer(callbacks=list(callbacks), **quiet | {"logger": False, "enable_checkpointing": False} | options)


def callback_of(module, **options):
    return NTKScopeCallback(probe=(module.inputs, module.targets), loss="cross_entropy", schedule=3, drift=None, **options)


def plain_record(steps, *, accumulate=1, clip=None, **options):
    """The same run without Lightning."""
    module = Module()
    recorder = ntkscope.Recorder(module, probe=(module.inputs, module.targets), loss="cross_entropy", schedule=3, drift=None, **options)
    optimizer = module.configure_optimizers()
    recorder.attach(optimizer)
    batches = [batch for _ in range(100) for batch in module.data()]
    for step in range(steps):
        optimizer.zero_grad()
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            (module.training_step(batch, 0) / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return recorder


def assert_same_record(found, expected):
    assert found.trace.steps == expected.trace.steps
    assert found.facts == expected.facts
    for mine, theirs in zip(found.trace, expected.trace, strict=True):
        assert mine.time == theirs.time
        for name in ("outputs", "kernel_upper", "gradient_audit", "audit_mean", "audit_variance"):
            first, second = getattr(mine, name), getattr(theirs, name)
            assert (first is None) == (second is None), name
            if first is not None:
                assert_close(torch.nan_to_num(first), torch.nan_to_num(second), 1e-9, name=f"{name} at step {mine.step}")


@pytest.mark.parametrize(
    ("lightning", "plain"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
    ],
    ids=["plain", "accumulated", "clipped"],
)
def test_the_record_is_that_of_a_plain_loop(tmp_path, lightning, plain):
    module = Module()
    callback = callback_of(module, audit=True)
    trainer_of(tmp_path, callback, max_steps=10, max_epochs=-1, **lightning).fit(module, module.data())
    assert_same_record(callback.recorder, plain_record(10, audit=True, **plain))
    assert not callback.recorder.is_attached
    assert callback.recorder.model is module


def test_checkpoints_hold_the_record_and_resume_it(tmp_path):
    module = Module()
    first = callback_of(module)
    trainer = trainer_of(tmp_path, first, max_epochs=2, enable_checkpointing=True, logger=CSVLogger(tmp_path, version=0))
    trainer.fit(module, module.data())
    path = tmp_path / "some.ckpt"
    trainer.save_checkpoint(path)
    assert first.recorder.trace.steps == [0, 3, 4, 6, 8]  # at steps 4 and 8, after epochs, ModelCheckpoint saved
    assert ntkscope.analyze(path).run.num_steps == 8
    (own,) = tmp_path.rglob("epoch=*.ckpt")
    assert ntkscope.analyze(own).run.num_steps in (4, 8)

    again = Module()
    second = callback_of(again)
    logger = CSVLogger(tmp_path, version=1)
    trainer_of(tmp_path, second, max_epochs=3, logger=logger).fit(again, again.data(), ckpt_path=path, weights_only=True)
    expected = plain_record(12)
    assert set(second.recorder.trace.steps) == {*expected.trace.steps, 4, 8}
    for step in expected.trace.steps:
        mine, theirs = (trace[trace.steps.index(step)] for trace in (second.recorder.trace, expected.trace))
        assert mine.time == theirs.time
        assert_close(mine.kernel_upper, theirs.kernel_upper, 1e-9, name=f"K at step {step}")
    rows = (tmp_path / "lightning_logs" / "version_1" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert "ntkscope/kernel_drift" in rows[0]
    assert [int(row.split(",")[rows[0].split(",").index("step")]) for row in rows[1:]] == [9, 12]


def test_the_same_callback_resumes_but_does_not_begin_anew(tmp_path):
    module = Module()
    callback = callback_of(module)
    trainer = trainer_of(tmp_path, callback, max_steps=4, max_epochs=-1)
    trainer.fit(module, module.data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ntkscope.InputError, match="This callback has recorded a run already"):
        trainer_of(tmp_path, callback, max_steps=4, max_epochs=-1).fit(module, module.data())
    trainer_of(tmp_path, callback, max_steps=6, max_epochs=-1).fit(module, module.data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert callback.recorder.trace.steps == [0, 3, 4, 6]


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_precision_plugins(tmp_path, precision, dtype):
    """The probe is converted as batches are; mixed precision is measured at the stored weights."""
    module = Module(torch.float32)
    callback = callback_of(module)
    trainer_of(tmp_path, callback, max_steps=3, max_epochs=-1, precision=precision).fit(module, module.data())
    snapshot = callback.recorder.trace[-1]
    assert snapshot.step == 3
    assert callback.recorder.probe.inputs.dtype == dtype
    assert snapshot.outputs.dtype == dtype
    with torch.no_grad():
        assert_close(snapshot.outputs.float(), module(module.inputs.to(dtype)).float(), 1e-6)


def test_a_run_that_breaks_leaves_no_hooks(tmp_path):
    class Broken(Module):
        def training_step(self, batch, index):
            if self.global_step == 4:
                raise RuntimeError("out of luck")
            return super().training_step(batch, index)

    module = Broken()
    callback = callback_of(module)
    trainer = trainer_of(tmp_path, callback, max_steps=9, max_epochs=-1)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(module, module.data())
    assert not callback.recorder.is_attached
    assert callback.recorder.trace.steps == [0, 3]


class TwoOptimizers(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.SGD(self.net[2].parameters(), lr=0.1)]


class OneByHand(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()


def test_manual_optimization(tmp_path):
    module = OneByHand()
    callback = callback_of(module, audit=True)
    trainer_of(tmp_path, callback, max_steps=10, max_epochs=-1).fit(module, module.data())
    assert_same_record(callback.recorder, plain_record(10, audit=True))


def test_several_optimizers_are_refused_with_the_next_step(tmp_path):
    module = TwoOptimizers()
    with pytest.raises(ntkscope.UnsupportedError, match=r"has 2 optimizers.*Recorder\(self.part, probe=...\).attach\(self.optimizers"):
        trainer_of(tmp_path, callback_of(module), max_steps=1, max_epochs=-1).fit(module, module.data())


def test_the_advice_for_several_optimizers_works(tmp_path):
    class Advised(TwoOptimizers):
        def on_train_start(self):
            self.recorder = ntkscope.Recorder(
                self.net[0], probe=(self.inputs, torch.zeros(len(self.inputs), 10, dtype=torch.float64)), loss="squared", schedule=1
            )
            self.recorder.attach(self.optimizers()[0])

        def training_step(self, batch, index):
            self.manual_backward(self.net[0](batch[0]).square().mean())
            self.optimizers()[0].step()

    module = Advised()
    trainer_of(tmp_path, max_steps=3, max_epochs=-1).fit(module, module.data())
    assert module.recorder.trace.steps == [0, 1, 2, 3]


def test_precision_plugins_that_replace_layers_are_refused(tmp_path):
    class Bitsandbytes(pl.plugins.precision.Precision):
        pass

    module = Module()
    with pytest.raises(ntkscope.UnsupportedError, match="precision plugin Bitsandbytes replaces layers or weights"):
        trainer_of(tmp_path, callback_of(module), max_steps=1, max_epochs=-1, plugins=[Bitsandbytes()]).fit(module, module.data())


def test_loggers_of_ones_own(tmp_path):
    class Kept:
        def __init__(self):
            self.rows = []

        def log(self, metrics, step):
            self.rows.append((step, copy.copy(metrics)))

    module, kept = Module(), Kept()
    trainer_of(tmp_path, callback_of(module, loggers=[kept]), max_steps=4, max_epochs=-1).fit(module, module.data())
    assert [step for step, _ in kept.rows] == [0, 3, 4]
    assert kept.rows[0][1]["ntkscope/kernel_drift"] == 0.0


BLOCKED = """
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
try:
    import ntkscope.integrations.lightning
except ImportError as error:
    print(error)
"""


def test_a_missing_library_is_named_with_its_extra():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ntkscope.integrations.lightning needs Lightning: pip install 'ntkscope[lightning]'."


class Older(older.LightningModule):
    """The same for the other package, which has classes of its own."""

    def __init__(self):
        super().__init__()
        self.net, self.inputs, self.targets = problem()

    forward, training_step = Module.forward, Module.training_step
    configure_optimizers, data = Module.configure_optimizers, Module.data


def test_pytorch_lightning_takes_the_callback_too(tmp_path):
    module = Older()
    callback = callback_of(module)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    trainer = older.Trainer(callbacks=[callback], max_steps=4, max_epochs=-1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, module.data())
    assert callback.recorder.trace.steps == [0, 3, 4]
