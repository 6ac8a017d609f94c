"""Add the curve of a run: thinned metrics as vistok/train/curves/NAME.jsonl, which ships, and a plot here as NAME.png.

python docs/curves/add.py RUN NAME
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
SHIPPED = HERE.parent.parent / "vistok" / "train" / "curves"
ROWS = 120


def main(run: str, name: str) -> None:
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    thinned = thin(rows)
    (SHIPPED / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in thinned))
    plot(thinned, name)


def thin(rows: list[dict]) -> list[dict]:
    """At most ROWS rows, evenly spread, the last one among them; four significant digits."""
    stride = -(-len(rows) // ROWS)
    kept = rows[len(rows) - 1 :: -stride][::-1]
    return [
        {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
        for row in kept
    ]


def plot(rows: list[dict], name: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [key for key in ("loss", "psnr", "perplexity", "accuracy", "grad_norm") if key in rows[-1]]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.2 * len(shown), 2.6), constrained_layout=True, squeeze=False)
    for axis, key in zip(axes[0], shown, strict=True):
        axis.plot([row["step"] for row in rows], [row[key] for row in rows], linewidth=1.2, color="#26547c")
        axis.set_title(f"{key}: {rows[-1][key]:.4g} at the end", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(name, fontsize=10)
    figure.savefig(HERE / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:3])
