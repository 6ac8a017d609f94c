"""The ``generate`` operation of discrete autoregressive models: reference arguments to vistok's sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.draws import Keys
from vistok.generators.engine.autoregressive import AutoregressiveGenerator
from vistok.generators.engine.sampling import DecodingOptions
from vistok.types import Condition

from .harness import GoldenFailure, Step


def generate(model: AutoregressiveGenerator, condition: Condition, step: Step) -> Tensor:
    """The ids (B, num_tokens) that the step's arguments ask for; sampling must be deterministic."""
    args = step.args
    length = model.spec.length
    num_tokens = args.get("num_tokens", length)
    if not args["greedy"] and args.get("top_k") != 1:
        raise GoldenFailure(f"{step.id}: the answer of random sampling depends on the reference's random numbers")
    options = DecodingOptions(
        temperature=0.0 if args["greedy"] else args.get("temperature", 1.0),
        top_k=args.get("top_k") or 0,
        top_p=1.0 if args.get("top_p") is None else args["top_p"],
        guidance_scale=_guidance_scale(args, num_tokens, length),
        guidance_interval=_guidance_interval(args.get("guidance_interval", -1)),
    )
    shared = args.get("share_prefix", 0)
    prefix = _sampled(model, condition[:1], options, shared) if shared else None
    return _sampled(model, condition, options, num_tokens, prefix)


def _sampled(
    model: AutoregressiveGenerator,
    condition: Condition,
    options: DecodingOptions,
    num_tokens: int,
    prefix: Tensor | None = None,
) -> Tensor:
    """Ids (B, num_tokens), of which the first are those of ``prefix`` (1, n) where it is given."""
    draws = model.sampling_draws(Keys.range(0, len(condition))) if options.temperature else None
    session = model.start(condition, options, draws=draws)
    if prefix is not None:
        session.append(prefix.expand(len(condition), -1))
    for _ in session.generate(num_tokens - session.tokens.shape[1]):
        pass
    return session.tokens


def _guidance_scale(args: Mapping[str, Any], num_tokens: int, length: int) -> float | tuple[float, float]:
    scale = args.get("guidance_scale", 1.0)
    if not isinstance(scale, list):
        return max(scale, 1.0)  # the references turn guidance off at scales of 1 and below
    first, last = scale
    first = args.get("guidance_start_used", first)  # D-AR's reference does not begin at 1 exactly
    # In the references the schedule spans the requested tokens, in vistok the whole sequence.
    return first, first + (last - first) * (length - 1) / max(num_tokens - 1, 1)


def _guidance_interval(last_step: int | None) -> tuple[int, int] | None:
    """The references count decoding steps after the first token, and include the last guided one."""
    return None if last_step is None or last_step < 0 else (0, last_step + 2)


def refuse(step: Step, **allowed: Any) -> None:
    """Raise GoldenFailure if an argument of the step has another value than the one that the runner computes."""
    for name, value in allowed.items():
        if step.args.get(name, value) != value:
            raise GoldenFailure(f"{step.id}: {name} {step.args[name]!r} is not computed, only {value!r}")
