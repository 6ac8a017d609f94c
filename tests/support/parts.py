"""Run by several processes: prints, a line per model, whether losses and gradients are those of one process."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from support.tiny_models import in_loop, labels, names, pixels, tiny, token_ids
from torch import Tensor, distributed

from vistok.draws import Keys
from vistok.tokenizers.base import Tokenizer

SAMPLES = 6
WEIGHTS = torch.tensor([1.0, 0.0, 1.0, 1.0, 3.0, 0.5])

Numbers = dict[str, Tensor]


def measured(name: str, chosen: np.ndarray) -> Numbers:
    """The loss terms of some of the samples, and the gradients of their sum."""
    model = tiny(name).train()
    draws = model.training_draws(Keys.of(0, chosen))
    if isinstance(model, Tokenizer):
        output = model(pixels(model, SAMPLES)[chosen], draws=draws)
        terms = {key: value.mean() for key, value in output.losses.items()}
        if output.reconstruction is not None:
            terms["reconstruction"] = output.reconstruction.square().mean()
    else:
        spec = model.spec
        tokens = (
            token_ids(model, SAMPLES) if spec.discrete else Keys.range(0, SAMPLES).normal("x", spec.length, spec.dim)
        )
        classes = labels(*(number % 3 for number in chosen.tolist()))
        loss = model(tokens[chosen], classes, draws=draws, weights=WEIGHTS[chosen], **in_loop(model)).loss
        terms = {"loss": loss}
    sum(terms.values()).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {key: term.detach() for key, term in terms.items()} | gradients


def main() -> None:
    torch.set_num_threads(1)
    # Dropout masks depend on the process, not on the sample.
    attention = F.scaled_dot_product_attention
    F.dropout = lambda values, *_, **__: values
    F.scaled_dot_product_attention = lambda *values, dropout_p=0.0, **options: attention(*values, **options)
    models = [*names("tokenizer"), *names("generator")]
    whole = {name: measured(name, np.arange(SAMPLES)) for name in models}
    distributed.init_process_group("gloo")
    rank, count = distributed.get_rank(), distributed.get_world_size()
    for name in models:
        part = measured(name, np.array_split(np.arange(SAMPLES), count)[rank])
        differing = []
        for key, expected in whole[name].items():
            mean = part.get(key, torch.zeros_like(expected)).clone()
            distributed.all_reduce(mean)
            if not torch.allclose(mean / count, expected, rtol=1e-3, atol=1e-5):
                differing.append(key)
        if rank == 0:
            print(f"{name}: {', '.join(differing) or 'the same'}", flush=True)


if __name__ == "__main__":
    main()
