"""Quickstarts of several systems over several seeds, as one table of their scores.

    python benchmarks/quickstarts.py --systems vit_vqgan dar --seeds 0 1 2 --out runs/quickstarts

Folders that have a result.json are read and not made again, so a stopped command can be repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import finish, say

from vistok.quickstart.systems import systems

ABOUT = {"protocol", "seconds"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(systems()), choices=list(systems()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstarts"))
    given = parser.parse_args()
    results = {
        (system, seed): quickstart(system, seed, given.out / f"{system}-{seed}")
        for system in given.systems
        for seed in given.seeds
    }
    for line in table(results):
        print(line)
    finish("quickstarts", {}, {f"{system}_{seed}": row["recognised"] for (system, seed), row in results.items()})


def quickstart(system: str, seed: int, out: Path) -> dict[str, Any]:
    """The content of a quickstart's result.json; runs the quickstart if there is none."""
    if not (out / "result.json").exists():
        say(f"{system}, seed {seed}")
        command = [sys.executable, "-m", "vistok", "quickstart", "--system", system, "--seed", str(seed)]
        subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "result.json").read_text())


def table(results: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table; scores that a system lacks are left empty."""
    names = list(dict.fromkeys(name for row in results.values() for name in row if name not in ABOUT))
    lines = [f"| system | seed | {' | '.join(names)} | seconds |", f"|---|---{'|---' * len(names)}|---|"]
    for (system, seed), row in results.items():
        cells = ["" if row.get(name) is None else f"{row[name]:.4g}" for name in names]
        lines.append(f"| {system} | {seed} | {' | '.join(cells)} | {row['seconds']:.0f} |")
    return lines


if __name__ == "__main__":
    main()
