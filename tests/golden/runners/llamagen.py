"""Runners of LlamaGen's tokenizer and transformer."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

import vistok
from vistok.generators.engine.sampling import filter_logits
from vistok.losses import L1, L2, EntropyLoss
from vistok.tokenizers.llamagen_vq import LlamaGenVQ
from vistok.types import Condition

from ..decoding import generate
from ..harness import Case, Step, runner

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer. Golden pixels are in [-1, 1].


def _tokenizer(case: Case) -> LlamaGenVQ:
    width = {"ch": case.build["ch"]} if "ch" in case.build else {}
    build = lambda: vistok.from_official(case.model, {**case.config, **width}, case.state)  # noqa: E731
    return case.once("model", build).eval()


def _as_map(tokens: Tensor, image: Tensor, stride: int) -> Tensor:
    return rearrange(tokens, "b (h w) d -> b d h w", h=image.shape[2] // stride)


@runner("llamagen/tokenizer", "encoder")
@torch.no_grad()
def encoder(case: Case, step: Step) -> dict[str, Tensor]:
    model, image = _tokenizer(case), step.tensor("image", 0)
    return step.answers(model.encoder(image), _as_map(model.latents(image), image, model.stride))


@runner("llamagen/tokenizer", "encode")
@torch.no_grad()
def encode(case: Case, step: Step) -> dict[str, Tensor]:
    model, image = _tokenizer(case), step.tensor("image", 0)
    quantized = model(image).features["quantized"]
    return step.answers(_as_map(quantized, image, model.stride), model.encode(image))


@runner("llamagen/tokenizer", "decode")
@torch.no_grad()
def decode(case: Case, step: Step) -> dict[str, Tensor]:
    ids, grid = step.tensor("ids", 0), tuple(step.args["grid"])
    pixels = _tokenizer(case).decode(ids.reshape(-1, grid[0] * grid[1]), grid=grid)
    return step.answers(pixels.clamp(-1, 1) if step.args["clamp"] else pixels)


@runner("llamagen/tokenizer", "codebook_loss")
@torch.no_grad()
def codebook_loss(case: Case, step: Step) -> dict[str, Tensor]:
    model, image = _tokenizer(case).train(step.args["train"]), step.tensor("image", 0)
    output = model(image)
    entropy = EntropyLoss(step.args["entropy_temperature"])(model.quantizer.distances(output.features["latents"]))
    return step.answers(
        output.losses["codebook"].mean(),
        step.args["commit_loss_beta"] * output.losses["commitment"].mean(),
        step.args["entropy_loss_ratio"] * entropy,
    )


@runner("llamagen/tokenizer", "pixel_loss")
@torch.no_grad()
def pixel_loss(case: Case, step: Step) -> dict[str, Tensor]:
    image = step.tensor("image", 0)
    reconstruction = _tokenizer(case)(image).reconstruction
    return step.answers(L2()(reconstruction, image), L1()(reconstruction, image))


# ---------------------------------------------------------------------------------------------------------------------
# Transformer


def _condition(step: Step, position: int) -> Condition:
    """Labels at ``position``, or captions there with their mask after them."""
    if step.has("caption"):
        return Condition.from_features(step.tensor("caption", position), step.tensor("emb_mask", position + 1))
    return Condition.from_labels(step.tensor("label", position))


@runner("llamagen/gpt", "logits")
@torch.no_grad()
def logits(case: Case, step: Step) -> dict[str, Tensor]:
    model = case.build_model().train(step.args.get("train", False))
    return step.answers(model.logits(step.tensor("ids", 0), _condition(step, 1)))


@runner("llamagen/gpt", "loss")
@torch.no_grad()
def loss(case: Case, step: Step) -> dict[str, Tensor]:
    model = case.build_model().train(step.args.get("train", False))
    condition, first = _condition(step, 1), 3 if step.has("caption") else 2
    draws = [name for name in step.inputs[first:] if name != "valid"]
    if draws:
        condition = condition.drop(step.tensor(*draws, first) < step.args["class_dropout_prob"])
    weights = step.tensor("valid", 0) if step.has("valid") else None
    return step.answers(model(step.tensor("ids", 0).long(), condition, weights=weights).loss)


@runner("llamagen/gpt", "caption_embed")
@torch.no_grad()
def caption_embed(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(case.build_model().embed_condition(_condition(step, 0), torch.zeros(1, 1, dtype=torch.int64)))


@runner("llamagen/gpt", "generate")
def generate_ids(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(generate(case.build_model(), _condition(step, 0), step))


@runner("llamagen/gpt", "filter_probs")
def filter_probs(case: Case, step: Step) -> dict[str, Tensor]:
    filtered = filter_logits(
        step.tensor("raw_logits", 0)[:, -1],
        temperature=step.args["temperature"],
        top_k=step.args["top_k"],
        top_p=step.args["top_p"],
    )
    return step.answers(filtered.softmax(-1))
