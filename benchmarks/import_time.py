"""The time of ``import vistok`` against ``import torch``; the target is at most 1.3 times as long.

``import vistok`` itself imports nothing heavy; the first use of a public name imports torch. Both are measured in fresh
interpreters, alternating, so that a busy machine slows all alike. Medians are reported.

    python benchmarks/import_time.py --runs 7
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
STATEMENTS = {
    "torch": "import torch",
    "vistok": "import vistok",
    "vistok_types": "import vistok; vistok.TokenSpec",
    "vistok_models": "import vistok; vistok.load; vistok.pipeline",
}


def seconds(statement: str) -> float:
    """Seconds that a statement takes in a fresh interpreter, without the interpreter's start."""
    program = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="fresh interpreters per statement")
    runs = parser.parse_args().runs
    for statement in STATEMENTS.values():
        seconds(statement)  # fills the disk cache and compiles bytecode
    measured = [{name: seconds(statement) for name, statement in STATEMENTS.items()} for _ in range(runs)]
    median = {name: statistics.median(row[name] for row in measured) for name in STATEMENTS}
    for name, statement in STATEMENTS.items():
        print(f"{statement:45} {median[name]:7.3f} s")
    ratios = {f"{name}_over_torch": round(median[name] / median["torch"], 3) for name in STATEMENTS if name != "torch"}
    figures = {f"{name}_seconds": round(value, 4) for name, value in median.items()} | {"runs": runs}
    print(json.dumps({"benchmark": "import_time", "ratios": ratios, "figures": figures}))


if __name__ == "__main__":
    main()
