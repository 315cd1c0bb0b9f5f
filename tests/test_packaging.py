"""What an installed wheel holds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "ntkscope", "cli")


def test_a_wheel_holds_both_packages_and_no_module_called_cli(tmp_path):
    for name in SOURCES:
        source, copy = ROOT / name, tmp_path / "source" / name
        copy.parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(tmp_path / "source"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"ntkscope", "ntkscope_cli"}
    packaged = {name for name in names if name.startswith(("ntkscope/", "ntkscope_cli/"))}
    expected = {
        str(path.relative_to(ROOT)).replace("cli/", "ntkscope_cli/", 1) if folder == "cli" else str(path.relative_to(ROOT))
        for folder in ("ntkscope", "cli")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packaged == expected
