"""Which tokenizer feeds which generator: tries every pair on tiny models, and makes the README's table.

``python tests/support/grid.py`` writes the table into the README.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.tiny_models import labels, names, pixels, tiny

from vistok.checkpoints import registry
from vistok.draws import Keys
from vistok.generators.base import Generator
from vistok.generators.engine.queries import QueryGenerator
from vistok.tokenizers.base import Tokenizer

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- grid: python tests/support/grid.py -->", "<!-- end of the grid -->"

TOKENIZERS: dict[str, tuple[str, Mapping[str, Any]]] = {name: (name, {}) for name in names("tokenizer")} | {
    "vit_vqgan, residual": ("vit_vqgan", {"residual_depth": 2}),
    "titok, vae": ("titok", {"bottleneck": "vae", "output": "pixels"}),
    "llamagen_vq, bits of scales": ("llamagen_vq", {"quantizer": {"name": "multi_scale_bsq", "scales": (1, 2, 4)}}),
}
"""Every tokenizer, and variants whose options give tokens of another kind."""

TINY_CODES = 32  # of generators that split ids into parts of given bits
# Why a generator may refuse tokens: a part of its message, and what must then be true of the tokens.
REFUSALS = {
    "kind": (r"discrete|continuous", lambda spec, continuous: spec.discrete == continuous),
    "depth": (r"one id per position", lambda spec, continuous: spec.depth > 1),
    "scales": (r"scales", lambda spec, continuous: not spec.scales),
    "loop": (r"no expander", lambda spec, continuous: spec.discrete != continuous),
    "bits": (r"bits", lambda spec, continuous: spec.codebook_size != TINY_CODES),
    "grid": (r"grid|raster", lambda spec, continuous: spec.grid is None or len(spec.grid) != 2),
}


@dataclass(frozen=True)
class Pair:
    """A tokenizer and a generator.

    Attributes:
        refusal: the generator's message if it refuses the tokens, else None.
        arguments: those that the generator needs for these tokens, besides its tiny ones.
        losses: of two training steps.
    """

    refusal: str | None
    arguments: Mapping[str, Any]
    losses: tuple[float, ...] = ()


def tokenizer(label: str) -> Tokenizer:
    name, options = TOKENIZERS[label]
    return tiny(name, **options)


def try_pair(tokens: torch.Tensor, made_by: Tokenizer, generator: str) -> Pair:
    """Train a generator two steps on tokens (3, L[, D])."""
    kind, refusal = registry.entry(generator).load(), None
    for arguments in ({}, kind.plain_sequence):
        try:
            model = kind(**{**kind.tiny, "spec": made_by.spec, **arguments})
            loop = {"tokenizer": made_by} if kind.needs_tokenizer else {}
            if loop:
                made_by.expander()
        except ValueError as error:
            refusal = refusal or str(error)
        else:
            return Pair(None, arguments, tuple(train_two_steps(model, tokens, loop)))
    return Pair(refusal, {})


def train_two_steps(model: Generator, tokens: torch.Tensor, loop: Mapping[str, Tokenizer]) -> Iterator[float]:
    """The losses."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(2):
        draws = model.training_draws(Keys.range(0, len(tokens)))
        loss = model(tokens, labels(*range(len(tokens))), draws=draws, **loop).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def all_pairs() -> dict[str, dict[str, Pair]]:
    """By tokenizer and generator."""
    pairs = {}
    for label in TOKENIZERS:
        model = tokenizer(label)
        with torch.no_grad():
            tokens = model.encode(pixels(model))
        pairs[label] = {name: try_pair(tokens, model, name) for name in names("generator")}
    return pairs


def decoding_refusal(model: Generator, decoding: str) -> str | None:
    """The message of a decoding that does not support a generator of ids; None if it does."""
    if decoding == "plain":
        return None
    if not hasattr(model.options_type(), "decoding"):
        return "unexpected keyword argument 'decoding'"
    if model.num_parts > 1:
        return r"draws them in \d parts" if decoding == "jacobi" else "draws whole ids that follow each other"
    plan = model.plan(model.sampling_draws(Keys.range(0, 1)))
    if plan.is_single and plan.is_raster and not isinstance(model, QueryGenerator):
        return None
    return f"decoding '{decoding}' (guesses|draws whole ids).*that follow each other.*'plain'"


def reason(pair: Pair) -> str:
    """Why a pair does not fit, as a key of ``REFUSALS``."""
    return next(name for name, (pattern, _) in REFUSALS.items() if re.search(pattern, pair.refusal))


def table(pairs: Mapping[str, Mapping[str, Pair]]) -> str:
    """The table of pairs, as Markdown."""
    generators = names("generator")
    rows = [f"| tokenizer | {' | '.join(generators)} |", f"|---{'|---' * len(generators)}|"]
    for label, of in pairs.items():
        rows.append(f"| {label} | {' | '.join(_cell(of[name]) for name in generators)} |")
    return "\n".join(rows)


def _cell(pair: Pair) -> str:
    if pair.refusal is not None:
        return f"no: {reason(pair)}"
    return "yes" if not pair.arguments else f"yes, `{next(iter(pair.arguments))}`"


def in_readme() -> str:
    """The table that the README has."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table(all_pairs())}\n{END}{rest.partition(END)[2]}")
