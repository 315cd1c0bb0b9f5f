"""Every path of GatedAdamW (single, foreach, fused, capturable) against the scalar reference, and torch's AdamW."""

import copy
import subprocess
import sys

import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gate_step import reference
from torch import nn
from torch._dynamo.utils import counters

import ntkscope
from ntkscope import GatedAdamW
from ntkscope.gate import fused_update
from ntkscope.gate.fused import compiled_kernel, flatten
from ntkscope.gate.fused_update import SMALL

PATHS = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"foreach": False, "capturable": True},
    "foreach-capturable": {"foreach": True, "capturable": True},
    "fused-capturable": {"fused": True, "capturable": True},
}
SHAPES = [(3, 2), (4,), (), (0, 2), (1,)]
every_path = pytest.mark.parametrize("path", PATHS)


def draw(shapes, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def parameters_of(shapes=SHAPES, dtype=torch.float64):
    return [nn.Parameter(value) for value in draw(shapes, 0, dtype)]


def give_gradients(parameters, seed, mean=0.4):
    for parameter, gradient in zip(parameters, draw([p.shape for p in parameters], seed), strict=True):
        parameter.grad = (gradient + mean).to(parameter.dtype)


def check_same_steps(*sides, steps=4):
    """Step pairs of parameters and optimizer on the same gradients, and compare the parameters."""
    for step in range(steps):
        for parameters, optimizer in sides:
            give_gradients(parameters, step)
            optimizer.step()
    for a, b in zip(*(parameters for parameters, _ in sides), strict=True):
        assert_close(a, b, 1e-12)


def check_against_reference(path, groups, *, steps, external):
    """Two groups of the same shapes; `external` are the steps at which the first parameter's variance comes from outside."""
    shapes = [*SHAPES, *SHAPES]
    parameters = parameters_of(shapes)
    held = [parameters[: len(SHAPES)], parameters[len(SHAPES) :]]
    optimizer = GatedAdamW([{"params": part, **group} for part, group in zip(held, groups, strict=True)], **PATHS[path])
    given = torch.linspace(0.1, 0.6, 6, dtype=torch.float64).reshape(3, 2)
    for t in range(1, steps + 1):
        give_gradients(parameters, t)
        optimizer.step(variance={parameters[0]: given} if t in external else None)
    start = draw(shapes, 0)
    gradients = [draw(shapes, t) for t in range(1, steps + 1)]
    for k, parameter in enumerate(parameters):
        group = groups[k // len(SHAPES)]
        sign = -1.0 if group["maximize"] else 1.0
        for j in range(parameter.numel()):
            expected, gates = reference(
                float(start[k].flatten()[j]),
                [sign * (float(drawn[k].flatten()[j]) + 0.4) for drawn in gradients],
                kind=group["gate"],
                alpha=1 / 19 if group["alpha"] == "unbiased" else group["alpha"],
                warmup=group["gate_warmup"],
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                decay=group["weight_decay"],
                is_decay_gated=group["decay"] == "gated",
                variances={t: float(given.flatten()[j]) for t in external} if k == 0 else None,
                **{name: group[name] for name in ("lambda_pop", "center", "lr", "rho")},
            )
            assert float(parameter.detach().flatten()[j]) == pytest.approx(expected, rel=1e-11, abs=1e-13)
            assert float(optimizer.gate_of(parameter).flatten()[j]) == pytest.approx(gates[-1], rel=1e-8, abs=1e-12)


def group_with(**options):
    usual = {"gate": "soft", "alpha": 0.3, "lambda_pop": 0.7, "gate_warmup": 2, "center": "paper", "lr": 0.01, "rho": 0.9}
    return usual | {"weight_decay": 0.1, "maximize": False, "decay": "plain"} | options


@every_path
@pytest.mark.parametrize("decay", ["plain", "gated"])
@pytest.mark.parametrize("gate", ["soft", "hard", "snr", "open"])
def test_matches_the_reference(path, gate, decay):
    other = {"alpha": "unbiased", "gate_warmup": 0, "center": "corrected", "maximize": True, "lr": 0.03, "rho": 0.99}
    groups = [group_with(gate=gate, decay=decay), group_with(gate=gate, decay=decay, **other)]
    check_against_reference(path, groups, steps=7, external=(3, 4))


GROUPS = st.fixed_dictionaries({
    "gate": st.sampled_from(["soft", "hard", "snr", "open"]),
    "decay": st.sampled_from(["plain", "gated"]),
    "alpha": st.sampled_from([0.0, 0.3, 1.0, "unbiased"]),
    "lambda_pop": st.sampled_from([0.0, 1.0]),
    "gate_warmup": st.integers(1, 4),
    "center": st.sampled_from(["paper", "corrected"]),
    "lr": st.sampled_from([0.0, 1e-3, 0.1]),
    "rho": st.sampled_from([0.0, 0.9]),
    "weight_decay": st.sampled_from([0.0, 0.2]),
    "maximize": st.booleans(),
})


@settings(max_examples=40, deadline=None)
@given(path=st.sampled_from(sorted(PATHS)), groups=st.tuples(GROUPS, GROUPS), steps=st.integers(1, 6), external=st.sets(st.integers(1, 6)))
def test_matches_the_reference_for_any_groups(path, groups, steps, external):
    check_against_reference(path, list(groups), steps=steps, external=external)


@every_path
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_an_open_gate_is_adamw(path, dtype, rtol):
    ours = parameters_of(dtype=dtype)
    theirs = copy.deepcopy(ours)
    mine = GatedAdamW(ours, lr=1e-2, gate="open", **PATHS[path])
    plain = torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200) for optimizer in (mine, plain)]
    for step in range(200):
        for parameters, optimizer, schedule in ((ours, mine, schedules[0]), (theirs, plain, schedules[1])):
            give_gradients(parameters, step)
            optimizer.step()
            schedule.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol)


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_float32_state(path, dtype):
    ours, oracle = parameters_of([(40,), (2, 3)], dtype), parameters_of([(40,), (2, 3)], dtype)
    exact = [nn.Parameter(value.detach().double()) for value in oracle]
    optimizer, slow = GatedAdamW(ours, lr=0.05, **PATHS[path]), GatedAdamW(exact, lr=0.05)
    for step in range(6):
        give_gradients(ours, step)
        for parameter, precise in zip(ours, exact, strict=True):
            precise.data.copy_(parameter.detach())  # one step at a time: rounding of the weights adds up otherwise
            precise.grad = parameter.grad.double()
        optimizer.step()
        slow.step()
        for parameter, precise in zip(ours, exact, strict=True):
            assert parameter.dtype == dtype
            assert {optimizer.state[parameter][name].dtype for name in ("exp_avg", "exp_avg_sq", "grad_var")} == {torch.float32}
            assert_close(optimizer.state[parameter]["grad_var"], slow.state[precise]["grad_var"], 1e-5)
            assert_close(parameter.detach().double(), precise.detach().to(dtype).double(), torch.finfo(dtype).eps)


@every_path
@pytest.mark.parametrize("is_tensor", [False, True])
def test_the_learning_rate_of_each_step_is_used(path, is_tensor):
    ours, oracle = parameters_of(), parameters_of()
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer, slow = GatedAdamW(ours, lr=lr if is_tensor else 0.1, **PATHS[path]), GatedAdamW(oracle, lr=0.1)
    for step in range(5):
        if is_tensor:
            lr.fill_(0.1 / (1 + step))
        else:
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        slow.param_groups[0]["lr"] = 0.1 / (1 + step)
        for parameters, stepped in ((ours, optimizer), (oracle, slow)):
            give_gradients(parameters, step)
            stepped.step()
    for a, b in zip(ours, oracle, strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("path", ["fused", "fused-capturable"])
def test_fused_compiles_once(path):
    """Neither a step, nor a learning rate, nor a new shape compiles again."""
    parameters = parameters_of([(5,), (300, 4), (2,), (1,), ()])
    optimizer = GatedAdamW(parameters, gate="soft", **PATHS[path])
    compiled_kernel.cache_clear()
    counters.clear()
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        give_gradients(parameters, step)
        optimizer.step()
    more = parameters_of([(7, 11, 13)])
    give_gradients(more, 0)
    GatedAdamW(more, gate="soft", **PATHS[path]).step()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("num_large", [3, 6])
def test_many_large_tensors_share_a_kernel(num_large):
    """More than `SMALL` elements each, so that a call takes several; and views of one buffer, which may share a call."""
    sizes = [SMALL + 1 + k for k in range(num_large)]
    buffer = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = [nn.Parameter(part) for part in buffer.clone().split(sizes)] + parameters_of()
    oracle = [nn.Parameter(part.clone()) for part in buffer.split(sizes)] + parameters_of()
    optimizer, slow = GatedAdamW(ours, fused=True), GatedAdamW(oracle)
    counters.clear()
    check_same_steps((ours, optimizer), (oracle, slow))
    assert counters["stats"]["unique_graphs"] == 1


def test_lengths_are_told_apart_after_torch_forgot_its_kernels():
    """Traced again on equal lengths, torch would take them for one; the shorter first tensor keeps a failure inside its memory."""
    equal, unequal = [SMALL + 1] * 3, [SMALL + 1, SMALL + 50, SMALL + 7]
    for lengths, is_forgotten in ((equal, False), (equal, True), (unequal, False)):
        if is_forgotten:
            torch._dynamo.reset()
        ours, oracle = parameters_of([(n,) for n in lengths]), parameters_of([(n,) for n in lengths])
        check_same_steps((ours, GatedAdamW(ours, fused=True)), (oracle, GatedAdamW(oracle)))


def test_small_tensors_fill_several_buffers(monkeypatch):
    monkeypatch.setattr(fused_update, "JOINED", 7)
    ours, oracle = parameters_of(), parameters_of()
    optimizer, slow = GatedAdamW(ours, fused=True), GatedAdamW(oracle)
    check_same_steps((ours, optimizer), (oracle, slow))


LAYOUTS = {
    "transposed": lambda: torch.randn(6, 4, dtype=torch.float64).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last),
    "gaps": lambda: torch.randn(6, 8, dtype=torch.float64)[:, ::2],
}


@every_path
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_same", [True, False])
def test_any_memory_layout(path, layout, is_same):
    torch.manual_seed(0)
    start = LAYOUTS[layout]()
    parameter, oracle = nn.Parameter(start), nn.Parameter(start.clone(memory_format=torch.contiguous_format))
    optimizer, slow = GatedAdamW([parameter], **PATHS[path]), GatedAdamW([oracle])
    for _ in range(3):
        gradient = torch.randn(start.shape, dtype=torch.float64)
        parameter.grad = torch.empty_like(parameter).copy_(gradient) if is_same else gradient
        oracle.grad = gradient.clone()
        optimizer.step()
        slow.step()
    assert_close(parameter, oracle, 1e-12)


def test_flat_views_share_memory_in_one_order():
    tensors = [torch.arange(6.0).reshape(2, 3).t() for _ in range(5)]
    flat = flatten(tensors)
    assert [view.data_ptr() for view in flat] == [tensor.data_ptr() for tensor in tensors]
    tensors[1] = tensors[1].contiguous()
    assert flatten(tensors)[1].tolist() == flat[0].tolist()
    assert flatten([torch.zeros(4)[::2]] * 5) is None


@every_path
def test_missing_gradients_and_unequal_steps(path):
    ours, oracle = parameters_of(), parameters_of()
    optimizer, slow = GatedAdamW(ours, lr=0.1, **PATHS[path]), GatedAdamW(oracle, lr=0.1)
    for step in range(6):
        for parameters, stepped in ((ours, optimizer), (oracle, slow)):
            give_gradients(parameters, step)
            parameters[step % 3].grad = None
            stepped.step()
    for a, b in zip(ours, oracle, strict=True):
        assert_close(a, b, 1e-12)
    assert int(optimizer.state[ours[0]]["step"]) == 4


@every_path
def test_closures_run_with_gradients(path):
    (weight,) = parameters_of([(4,)])
    optimizer = GatedAdamW([weight], lr=0.1, **PATHS[path])

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert optimizer.step() is None


@every_path
def test_a_scaler_leaves_the_step_out(path):
    scaled, plain = parameters_of(dtype=torch.float32), parameters_of(dtype=torch.float32)
    ours, theirs = GatedAdamW(scaled, lr=1e-2, **PATHS[path]), GatedAdamW(plain, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        give_gradients(plain, step)
        scaler.scale(torch.ones(()))  # starts it
        for a, b in zip(scaled, plain, strict=True):
            a.grad = b.grad * scaler.get_scale()
        if step == 3:
            scaled[0].grad[0, 0] = torch.inf
        else:
            theirs.step()
        scaler.step(ours)
        scaler.update()
    for a, b in zip(scaled, plain, strict=True):
        assert_close(a, b, 1e-5)
    assert int(ours.state[scaled[0]]["step"]) == 5


@every_path
def test_sparse_gradients_change_nothing(path):
    weight, embedding = nn.Parameter(torch.ones(2)), nn.Embedding(4, 2, sparse=True)
    optimizer = GatedAdamW([weight, *embedding.parameters()], **PATHS[path])
    weight.grad = torch.ones(2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ntkscope.UnsupportedError, match="sparse gradients"):
        optimizer.step()
    assert weight.tolist() == [1.0, 1.0]
    assert not optimizer.state[weight]


def test_capturable_counts_on_the_device():
    (weight,) = parameters_of([(3,)])
    optimizer = GatedAdamW([weight], capturable=True)
    give_gradients([weight], 0)
    optimizer.step()
    assert optimizer.state[weight]["step"].device == weight.device


@pytest.mark.parametrize("path", ["capturable", "foreach-capturable", "fused-capturable"])
def test_capturable_reads_nothing_back(path, monkeypatch):
    parameters = parameters_of()
    optimizer = GatedAdamW(parameters, gate_stats=True, **PATHS[path])
    variance = {parameters[0]: torch.ones(3, 2, dtype=torch.float64)}
    give_gradients(parameters, 0)
    optimizer.step(variance=variance)

    def refuse(*_):
        raise AssertionError("read back")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    optimizer.step(variance=variance)
    monkeypatch.undo()
    assert int(optimizer.state[parameters[0]]["step"]) == 2


NO_COMPILER = """
import torch, ntkscope
weight = torch.nn.Parameter(torch.ones(3))
optimizer = ntkscope.GatedAdamW([weight], fused=True)
weight.grad = torch.ones(3)
try:
    optimizer.step()
except ntkscope.UnsupportedError as error:
    print(error)
print(weight.tolist(), int(optimizer.state[weight]["step"]))
"""


def test_without_a_compiler_fused_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, "-c", NO_COMPILER], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "could not compile its kernel for device cpu" in done.stdout
    assert "use foreach=True" in done.stdout
    assert done.stdout.endswith("[1.0, 1.0, 1.0] 0\n")


def test_bad_paths():
    with pytest.raises(ntkscope.InputError, match="`fused` and `foreach` cannot both be True"):
        GatedAdamW([nn.Parameter(torch.ones(1))], fused=True, foreach=True)


WEIGHT = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("variance", "error", "message"),
    [
        ({torch.ones(3): torch.ones(3)}, ntkscope.InputError, r"a tensor of shape \(3,\) that the optimizer does not hold"),
        ({"weight": torch.ones(2)}, ntkscope.InputError, "names 'weight' that the optimizer does not hold"),
        ({WEIGHT: 1.0}, ntkscope.InputTypeError, "must hold tensors, got float"),
        ({WEIGHT: torch.ones(3)}, ntkscope.InputError, r"shape and the layout of its parameter, got \(3,\) for \(2,\)"),
        ({WEIGHT: torch.tensor([1.0, -1.0])}, ntkscope.InputError, "got 1 negative, NaN or infinite"),
        ({WEIGHT: torch.tensor([torch.nan, torch.inf])}, ntkscope.InputError, "got 2 negative, NaN or infinite"),
    ],
)
def test_bad_variances(variance, error, message):
    optimizer = GatedAdamW([WEIGHT])
    WEIGHT.grad = torch.ones(2)
    with pytest.raises(error, match=message):
        optimizer.step(variance=variance)
    assert not optimizer.state[WEIGHT]
    assert WEIGHT.tolist() == [1.0, 1.0]
