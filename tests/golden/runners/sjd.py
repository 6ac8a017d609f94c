"""Runner of speculative Jacobi decoding: the test of one window's drafts."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.generators.engine.decodings.jacobi import agree, settled, verify

from ..decoding import refuse
from ..harness import Case, GoldenFailure, Step, runner


@runner("sjd/verify", "verify")
def verify_drafts(case: Case, step: Step) -> dict[str, Tensor]:
    refuse(step, accept="uniform < min(1, p/q)")
    drafts, drawn = case.tensor("draft_tokens"), case.tensor("next_tokens")
    draft_probs, target = case.tensor("draft_probs"), case.tensor("target_probs")
    criterion = step.args.get("criterion", "speculative")
    if criterion in ("speculative", "speculative_jacobi"):
        verdict = verify(drafts, draft_probs, target, case.tensor("uniforms"))
        matched, residual = verdict.matched, verdict.residual
        last = torch.where(verdict.rejected, step.args.get("redrawn_token", -1), drawn[:, -1])
    elif criterion in ("jacobi", "exact"):
        matched, residual = agree(drafts, drawn), torch.zeros_like(target[:, 0])
        last = drawn.gather(1, matched[:, None] - 1).squeeze(1)
    else:
        raise GoldenFailure(f"{step.id}: criterion {criterion!r} is not computed")
    tokens = settled(drafts, drawn, matched, last)
    accepted = (torch.arange(drafts.shape[1]) < matched[:, None] - 1)[..., None]
    scores = torch.where(accepted, draft_probs.roll(-1, 1), target)
    answers = {"matched": matched, "residual": residual, "tokens": tokens, "scores": scores}
    return {name: answers[name] for name in step.outputs}
