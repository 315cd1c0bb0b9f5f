"""Where the peers live: folders under build/peers, made when first asked for.

The torch peers are laid on top of this environment, each in a folder of its own and without what it depends on in turn but for what is
listed: so all of them, and ntkscope, run with the same torch. torchvision, which two of them ask for, has no build beside the pinned torch
and is not needed by what is used here. neural-tangents gets a virtual environment: it needs old versions of jax, numpy and scipy.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BUILD = Path(__file__).parent.parent / "build" / "peers"

BACKPACK = ("backpack-for-pytorch==1.7.1", "einops==0.8.2", "unfoldNd==0.2.3")
PLOTTING = (
    *("matplotlib==3.11.2", "contourpy==1.3.3", "cycler==0.12.1", "fonttools==4.68.0"),
    *("kiwisolver==1.5.1", "pillow==13.0.0", "pyparsing==3.3.3"),
)


@dataclass(frozen=True)
class Peer:
    """One peer.

    Attributes:
        name: Folder and package to import.
        packages: Pinned; the first is the peer.
        base: For a virtual environment of its own: packages installed with what they depend on. Empty: on top of ours.
    """

    name: str
    packages: tuple[str, ...]
    base: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where it is."""
        return BUILD / self.name

    @property
    def python(self) -> str:
        """The interpreter that runs it."""
        return str(self.folder / "bin" / "python") if self.base else sys.executable

    @property
    def path(self) -> tuple[Path, ...]:
        """What to add to the search path of `python`."""
        return () if self.base else (self.folder,)


PEERS = {
    peer.name: peer
    for peer in (
        # jax 0.4.25 is the newest with which all four of its implementations run: later ones lack a name that STRUCTURED_DERIVATIVES uses.
        Peer(
            "neural_tangents",
            ("neural-tangents==0.6.5",),
            base=("jax==0.4.25", "jaxlib==0.4.25", "numpy<2", "scipy<1.13", "frozendict==2.5.1", "absl-py==2.5.1"),
        ),
        Peer("nngeometry", ("nngeometry==0.4",)),
        Peer(
            "curvlinops",
            (
                *("curvlinops-for-pytorch==3.0.1", *BACKPACK, "einconv==0.1.0"),
                *("linear_operator==0.6.1", "mpmath==1.3.0", "opt-einsum==3.4.0", "tqdm==4.70.1"),
            ),
        ),
        # setuptools: cockpit imports pkg_resources, which newer ones lack.
        Peer(
            "cockpit",
            ("cockpit-for-pytorch==1.0.2", *BACKPACK, *PLOTTING, "seaborn==0.13.2", "json-tricks==3.17.3", "setuptools==80.9.0"),
        ),
        Peer("weightwatcher", ("weightwatcher==0.7.7", *PLOTTING, "powerlaw==2.0.0", "mpmath==1.3.0", "tqdm==4.70.1")),
    )
}


class NotInstalledError(RuntimeError):
    """A peer that cannot be had; the text is the installer's last line."""


def install(peer: Peer) -> None:
    """Make the peer's folder unless it is there with these versions.

    Args:
        peer: The peer.

    Raises:
        NotInstalledError: If a package cannot be installed.
    """
    stamp = peer.folder / "ready"
    wanted = "\n".join((*peer.base, *peer.packages)) + "\n"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(peer.folder, ignore_errors=True)
    if peer.base:
        _run([sys.executable, "-m", "venv", str(peer.folder)])
        _run([peer.python, "-m", "pip", "install", "-q", *peer.base])
        _run([peer.python, "-m", "pip", "install", "-q", "--no-deps", *peer.packages])
    else:
        _run([peer.python, "-m", "pip", "install", "-q", "--no-deps", "--target", str(peer.folder), *peer.packages])
    stamp.write_text(wanted, encoding="utf-8")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        raise NotInstalledError(next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1]))
