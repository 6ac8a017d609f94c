"""Ming-UniVision's image editing against a plain implementation of its fact sheet: language model, three rows of
guidance and sampler, in float64 and without a cache, compute the answers of cases with an image in the prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from golden.harness import Case, run_step
from golden.runners import ming_univision as _runners  # noqa: F401 (registers them)
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import vistok
from vistok.draws import Keys
from vistok.tokenizers.mingtok import MingTok

PUBLIC = Path(__file__).parents[1] / "golden" / "cases" / "mingtok_univision_t2i"
PATCH, START, END = 9, 10, 11


class Plain:
    """The language model and the flow head from the reference's state dict, by the sheet's words."""

    def __init__(self, case: Case):
        self.state = {key: value.double() for key, value in case.state.items()}
        self.config = case.config["llm_config"]

    def linear(self, key: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{key}.weight"], self.state.get(f"{key}.bias"))

    def norm(self, key: str, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return x * scale * self.state[f"{key}.weight"]

    def hidden(self, x: Tensor, positions: Tensor, mask: Tensor, is_input: Tensor) -> Tensor:
        """Normed states (n, D) of entries (n, D) at positions (n,), of which ``is_input`` are images in the prompt."""
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.model.layers.{layer}"
            x = x + self.attention(f"{name}.attention", self.norm(f"{name}.input_layernorm", x), positions, mask)
            h = self.norm(f"{name}.post_attention_layernorm", x)
            x = x + torch.stack([self.experts(f"{name}.mlp", row, bool(own)) for row, own in zip(h, is_input)])
        return self.norm("model.model.norm", x)

    def attention(self, name: str, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        heads, groups, dim = (self.config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        frequencies = self.config["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = (positions[:, None] * frequencies).repeat(1, 2)[:, None]

        def turn(h: Tensor) -> Tensor:
            first, second = h.chunk(2, -1)
            return h * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

        joint = self.linear(f"{name}.query_key_value", x).unflatten(-1, (-1, dim))
        q, k, v = joint.split([heads, groups, groups], 1)
        q, k = turn(q), turn(k)
        k, v = (part.repeat_interleave(heads // groups, 1) for part in (k, v))
        weights = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim)
        weights = weights.masked_fill(~mask, -math.inf).softmax(-1)
        return self.linear(f"{name}.dense", torch.einsum("hqk,khd->qhd", weights, v).flatten(1))

    def experts(self, name: str, x: Tensor, is_input: bool) -> Tensor:
        gate = "image_gate" if is_input and self.config["multi_gate"] else "gate"
        shares, chosen = self.linear(f"{name}.{gate}", x).softmax(-1).topk(self.config["num_experts_per_tok"])
        shares = shares / shares.sum()
        parts = [share * self.gated(f"{name}.experts.{expert}", x) for share, expert in zip(shares, chosen.tolist())]
        return sum(parts) + self.gated(f"{name}.shared_experts", x)

    def gated(self, name: str, x: Tensor) -> Tensor:
        return self.linear(
            f"{name}.down_proj", F.silu(self.linear(f"{name}.gate_proj", x)) * self.linear(f"{name}.up_proj", x)
        )

    def project(self, features: Tensor) -> Tensor:
        return self.linear("linear_proj.2", F.gelu(self.linear("linear_proj.0", features.double())))

    def condition(self, hidden: Tensor) -> Tensor:
        z = self.linear("model.vis_head.0", hidden)
        return F.layer_norm(
            z, z.shape[-1:], self.state["model.vis_head.1.weight"], self.state["model.vis_head.1.bias"], 1e-6
        )

    def velocity(self, x: Tensor, t: float, z: Tensor) -> Tensor:
        net = "model.diffloss.net"
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        wave = torch.cat([(1000 * t * frequencies).cos(), (1000 * t * frequencies).sin()])
        time = self.linear(f"{net}.time_embed.mlp.2", F.silu(self.linear(f"{net}.time_embed.mlp.0", wave)))
        y, h = F.silu(time + self.linear(f"{net}.cond_embed", z)), self.linear(f"{net}.input_proj", x)
        for block in range(2):
            name = f"{net}.res_blocks.{block}"
            shift, scale, gate = self.linear(f"{name}.adaLN_modulation.1", y).chunk(3, -1)
            weight, bias = self.state[f"{name}.in_ln.weight"], self.state[f"{name}.in_ln.bias"]
            inner = F.layer_norm(h, h.shape[-1:], weight, bias, 1e-6) * (1 + scale) + shift
            a, b = self.linear(f"{name}.mlp.w12", inner).chunk(2, -1)
            h = h + gate * self.linear(f"{name}.mlp.w3", F.silu(a) * b)
        shift, scale = self.linear(f"{net}.final_layer.adaLN_modulation.1", y).chunk(2, -1)
        return self.linear(f"{net}.final_layer.linear", F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)

    def sample(self, z: Mapping[str, Tensor], noise: Tensor, args: Mapping) -> Tensor:
        x, steps, s = noise * args["temperature"], args["num_steps"], args["time_shifting_factor"] or 1.0
        grid = [u / (u + s - s * u) for u in (k / steps for k in range(steps + 1))]
        for u, following in pairwise(grid):
            v = {name: self.velocity(x, 1 - u, row) for name, row in z.items()}
            c, none = v["conditional"], v["unconditional"]
            image = v.get("text_unconditional", none)
            along = none + args["image_cfg"] * (image - none) + args["text_cfg"] * (c - image)
            if args["cfg_renorm_type"] == "channel":
                along = along * (c.norm() / along.norm() + 1e-8).clamp(0, 1)
            x = x + (following - u) * along
        return x


WORDS = {"branches": ["conditional", "unconditional", "text_unconditional"], "text_cfg": 3.0, "image_cfg": 1.1}
SETTINGS = {
    "temperature": 1.0,
    "solver": "euler",
    "num_steps": 8,
    "cfg_renorm_type": None,
    "time_shifting_factor": None,
}
CASES = {
    "three rows": {},
    "other scales": {
        "text_cfg": 2.0,
        "image_cfg": 1.7,
        "temperature": 0.9,
        "num_steps": 5,
        "time_shifting_factor": 3.0,
    },
    "scaled down": {"cfg_renorm_type": "channel", "image_cfg": 2.0},
    "two rows": {"branches": ["conditional", "unconditional"]},
}


def edit(folder: Path, changes: Mapping, **llm) -> Case:
    """A case that edits: the public one's sizes and rule of weights, an image in the prompt, answers of ``Plain``."""
    description = json.loads((PUBLIC / "case.json").read_text())
    description["config"]["llm_config"] |= llm
    if not description["config"]["llm_config"]["multi_gate"]:
        description["state"] = {
            k: v for k, v in description["state"].items() if "image_gate" not in k and "audio_gate" not in k
        }
    settings = WORDS | SETTINGS | {"image_tokens": 9, "guidance_schedule": "constant", "noise_shared": True} | changes
    masked = ["uncond_mask"] + (["text_uncond_mask"] if len(settings["branches"]) == 3 else [])
    prompt = ["input_ids", "image"]
    answers = {
        "embed_image": (["image"], {}, ["embedded"]),
        "logits": (prompt, {"positions": "prompt"}, ["prompt_logits"]),
        "generate_image": ([*prompt, *masked, "noise"], settings, ["z", "latents"]),
        "continue_text": ([*prompt, *masked, "noise", "next_id"], settings | {"branch": 0}, ["after", "next"]),
    }
    description["steps"] = [
        {"op": op, "inputs": inputs, "args": args, "outputs": outputs, "tol": 1e-3}
        for op, (inputs, args, outputs) in answers.items()
    ]
    folder.mkdir()
    (folder / "case.json").write_text(json.dumps(description))
    stored = Case(PUBLIC).tensors
    ids = torch.tensor([[1, 20, 2, START, *[PATCH] * 9, END, 21, 22, 23, 3, 24, 4]])
    role = (ids == 1) | (ids == 20) | (ids == 2) | (ids == 3) | (ids == 24) | (ids == 4)
    image = Keys.range(3, 1).uniform("image", 3, 48, 48) * 2 - 1
    tensors = {
        **{key: value for key, value in stored.items() if key.startswith("state/") and "inv_freq" in key},
        "in/input_ids": ids,
        "in/image": image,
        "in/uncond_mask": role.long(),
        "in/text_uncond_mask": (role | (ids == START) | (ids == PATCH) | (ids == END)).long(),
        "in/noise": Keys.range(4, 1).normal("noise", 10, 8)[0],
        "in/next_id": torch.tensor([[17]]),
    }
    save_file(tensors, folder / "tensors.safetensors")
    case = Case(folder)
    save_file(tensors | solve(case, settings), folder / "tensors.safetensors")
    return Case(folder)


@torch.no_grad()
def solve(case: Case, settings: Mapping) -> dict[str, Tensor]:
    """The answers, one pass over everything after the other."""
    plain = Plain(case)
    tokenizer = vistok.from_official("mingtok/tokenizer", case.config["mingtok"], MingTok.clean_official(case.state))
    words = plain.state["model.model.word_embeddings.weight"]
    ids, noise = case.tensor("input_ids")[0], case.tensor("noise").double()
    embedded = plain.project(tokenizer.semantic_features(tokenizer.encode(case.tensor("image"))))
    prompt = words[ids].clone()
    prompt[ids == PATCH] = embedded[0]
    count = len(ids)

    def states(keep: Tensor, new: Tensor) -> Tensor:
        """States of the prompt, none of which is hidden from itself, and of new entries, which see its kept part."""
        x = torch.cat([prompt, new])
        mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        mask[count:, :count] &= keep
        positions = torch.cat([torch.arange(count), keep.sum() + torch.arange(len(new))])
        return plain.hidden(x, positions, mask, torch.cat([ids == PATCH, torch.zeros(len(new), dtype=torch.bool)]))

    everything = torch.ones(count, dtype=torch.bool)
    keeps = {
        "conditional": everything,
        "unconditional": case.tensor("uncond_mask")[0].bool(),
        "text_unconditional": case.tensor("text_uncond_mask")[0].bool(),
    }
    new, latents, z = words[START][None], torch.zeros(0, 8, dtype=torch.float64), []
    for token in range(10):
        rows = {name: plain.condition(states(keeps[name], new)[-1]) for name in settings["branches"]}
        z.append(torch.stack([rows[name] for name in settings["branches"]]))
        if token < 9:
            latents = torch.cat([latents, plain.sample(rows, noise[token], settings)[None]])
            features = tokenizer.semantic_features(latents[None].float())
            new = torch.cat([words[START][None], plain.project(features)[0]])
    after = states(everything, torch.cat([new, words[case.tensor("next_id")[0]]]))
    logits = plain.linear("model.lm_head", after)[-2:]
    answers = {
        "embedded": embedded,
        "prompt_logits": plain.linear("model.lm_head", after[:count])[None],
        "z": torch.stack(z),
        "latents": latents[None],
        "after": logits[None, :1],
        "next": logits[None, 1:],
    }
    return {f"out/{name}": value.float().contiguous() for name, value in answers.items()}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_edits_are_those_of_a_plain_implementation(changes, tmp_path):
    case = edit(tmp_path / "edit", changes)
    for step in case.steps:
        run_step(case, step)


def test_edits_of_a_model_with_one_router(tmp_path):
    case = edit(tmp_path / "edit", {}, multi_gate=False)
    for step in case.steps:
        run_step(case, step)
