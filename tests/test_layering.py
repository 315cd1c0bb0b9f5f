"""Imports go one way (architecture.md), and importing ntkscope stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ntkscope"
# Left to right: a file may import from its own layer and from those before it. `_display` is the lazy door.
LAYERS = [
    ["_checks", "_types", "_losses", "_display", "_atomic", "_tensor_file"],
    ["_eigh"],
    ["kernel"],
    ["dynamics"],
    ["spectrum"],
    ["gate"],
    ["record"],
    ["course"],
    ["walk"],
    ["window"],
    ["findings"],
    ["uncertainty"],
    ["auditing"],
    ["audit_price"],
    ["summary"],
    ["saved"],
    ["results"],
    ["tables"],
    ["conclusions"],
    ["analysis"],
    ["integrations"],
    ["interop"],
    ["jumps"],
    ["view"],
    ["experiments"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Beyond the order: the optimizer must be usable without any spectrum.
FORBIDDEN = {
    ("view", "record"),
    ("view", "kernel"),
}
OPTIMIZER = {path.stem for path in (ROOT / "gate").glob("*.py")} - {
    *("audit_options", "audit_results", "audit_step", "channel", "compared", "figures"),
    *("population_risk", "variance", "variance_ratio", "verdict"),
}  # fmt: skip
HEAVY = {
    *("plotly", "jinja2", "rich", "typer", "sklearn", "xarray"),
    *("lightning", "transformers", "accelerate", "tensorboard", "wandb", "mlflow"),
}
FILES = sorted(ROOT.rglob("*.py"))


def part_of(module):
    return module.split(".")[1] if module.count(".") else None


def imports_of(path):
    """Every imported module of ntkscope or elsewhere, and whether it is imported inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "ntkscope":
                yield from ((f"ntkscope.{alias.name}", id(node) in inside) for alias in node.names)
            else:
                yield node.module, id(node) in inside
        elif isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)


def violations(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module, is_inside in imports_of(path):
        top = module.partition(".")[0]
        if own == "__init__":
            continue
        if is_inside and own not in ("_display", "experiments"):
            yield f"imports {module} inside a function"
        if top in HEAVY and own not in ("view", "experiments", "integrations", "interop"):
            yield f"imports {top}"
        if top == "ntkscope" and own != "_display":
            target = part_of(module)
            is_optimizer = own == "gate" and path.stem in OPTIMIZER
            if LEVEL[target] > LEVEL[own] or (own, target) in FORBIDDEN or (is_optimizer and target in ("kernel", "dynamics", "spectrum")):
                yield f"imports {module} upwards"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    assert not list(violations(path))


def test_the_test_sees_a_violation(tmp_path, monkeypatch):
    bad = tmp_path / "kernel" / "bad.py"
    bad.parent.mkdir()
    bad.write_text("import plotly\nfrom ntkscope.record.trace import Trace\ndef f():\n    import ntkscope._checks\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert len(list(violations(bad))) == 3


def test_every_part_has_a_layer():
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert parts == set(LEVEL)


def test_import_loads_nothing_heavy():
    code = f"import sys, ntkscope; print(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.alone
def test_import_is_not_much_slower_than_torch():
    code = "import time; t = time.perf_counter(); import {0}; print(time.perf_counter() - t)"

    def seconds(module):
        runs = [subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True) for _ in range(5)]
        return sorted(float(run.stdout) for run in runs)[2]

    seconds("torch")  # warm the disk cache
    assert seconds("ntkscope") <= 1.5 * seconds("torch")
