"""`make peers`: ntkscope beside neural-tangents, nngeometry, curvlinops, Cockpit and WeightWatcher, measured on this machine.

python -m benchmarks.peers                       # all of it, about a quarter of an hour on a quiet machine
python -m benchmarks.peers kernels products      # parts of it: kernels, products, cockpit, weightwatcher
python -m benchmarks.peers --threads 2 kernels

The peers are installed under build/peers when first asked for (peers_environments.py); one that cannot be had is named and left out.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.peers_environments import BUILD, PEERS, NotInstalledError, Peer, install
from benchmarks.peers_kernels import CASES, compare

ROOT = Path(__file__).parent.parent
SCRIPTS = {"products": "curvlinops", "cockpit": "cockpit", "weightwatcher": "weightwatcher"}
PARTS = {"kernels": ("neural_tangents", "nngeometry"), **{part: (peer,) for part, peer in SCRIPTS.items()}}


def install_all(names: list[str]) -> dict[str, Peer]:
    """Install peers, and say of each that cannot be had why."""
    found = {}
    for name in names:
        peer = PEERS[name]
        print(f"{name}: {', '.join((*peer.packages[:1], *peer.base[:1]))}", flush=True)
        try:
            install(peer)
        except NotInstalledError as err:
            print(f"{name} is left out, it cannot be installed here: {err}", flush=True)
            continue
        found[name] = peer
    return found


def run_script(part: str, peer: Peer, num_threads: int) -> None:
    """Run a comparison in a process that finds the peer."""
    print(f"\n{part}, {num_threads} thread{'s' * (num_threads > 1)}", flush=True)
    path = os.pathsep.join(map(str, peer.path))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(num_threads), "PYTHONWARNINGS": "ignore"}
    module = f"benchmarks.peers_{part}"
    done = subprocess.run([peer.python, "-m", module, str(num_threads)], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        print(f"{part} ended with status {done.returncode}; its messages are above.", flush=True)


def main() -> None:
    """Install what is asked for and print every comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=main.__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=1, help="cores for each side; with one, other work on the machine disturbs least")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"no part called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    parts = arguments.parts or list(PARTS)
    BUILD.mkdir(parents=True, exist_ok=True)
    peers = install_all([name for part in parts for name in PARTS[part]])
    if "kernels" in parts:
        for model, kind, num_examples in CASES:
            compare(model, kind, num_examples, peers, python=sys.executable, num_threads=arguments.threads)
    for part, name in SCRIPTS.items():
        if part in parts and name in peers:
            run_script(part, peers[name], arguments.threads)


if __name__ == "__main__":
    main()
