"""Runners of Ming-UniVision: the whole model, and its flow head alone."""

from __future__ import annotations

import torch
from torch import Tensor

import vistok
from vistok.checkpoints import load_strictly
from vistok.generators.ming_univision import FlowHeadConfig, MingOptions, MingUniVision
from vistok.generators.ming_univision.networks import TIME_SCALE, FlowHead
from vistok.generators.ming_univision.official import our_flow_names, own_keys
from vistok.generators.ming_univision.sampling import MingSession, Prompt
from vistok.guidance import Guidance
from vistok.nn.timesteps import timestep_features
from vistok.tokenizers.mingtok import MingTok

from ..harness import Case, GoldenFailure, Step, runner
from .mingtok import check, named

# ---------------------------------------------------------------------------------------------------------------------
# The flow head


def _head(case: Case) -> FlowHead:
    def build() -> FlowHead:
        config = case.config
        sizes = FlowHeadConfig(config["width"], config["depth"], config.get("mlp_mult", 4))
        head = FlowHead(config["target_channels"], config["z_channels"], sizes)
        load_strictly(head, our_flow_names(case.state))
        return head.eval()

    return case.once("head", build)


@runner("ming_univision/flow_head", "velocity")
@torch.no_grad()
def velocity(case: Case, step: Step) -> dict[str, Tensor]:
    check(step, "time_scale", TIME_SCALE)
    x, t, z = (step.tensor(name, position) for position, name in enumerate(("x", "t", "z")))
    return step.answers(_head(case).velocity(x, t, z))


@runner("ming_univision/flow_head", "time_embedding")
@torch.no_grad()
def time_embedding(case: Case, step: Step) -> dict[str, Tensor]:
    embedding = _head(case).network.time_embedding
    check(step, "dim", embedding.frequency_dim)
    base = step.args.get("max_period", 10000)
    if base != embedding.base:
        raise GoldenFailure(f"{step.id}: max_period {base} is not the model's {embedding.base}")
    t = step.args.get("time_scale", TIME_SCALE) * step.tensor("t", 0)
    return step.answers(timestep_features(t, embedding.frequency_dim, base=embedding.base), embedding(t))


def _options(step: Step, num_steps: int) -> MingOptions:
    """The sampling options of a step. The scales are those in effect."""
    args = step.args
    check(step, "solver", "euler")
    check(step, "guidance_schedule", "constant")
    check(step, "cfg_renorm_type", None, "channel")
    return MingOptions(
        guidance_scale=args.get("text_cfg", 1.0),
        image_guidance_scale=args.get("image_cfg", 1.0),
        combination="channel_norm" if args.get("cfg_renorm_type") == "channel" else "sum",
        num_steps=args.get("num_steps", num_steps),
        temperature=args.get("temperature", 1.0),
        time_shift=args.get("time_shifting_factor") or 1.0,
    )


def _guidance(options: MingOptions, rows: int) -> Guidance:
    """That of the options, with rows also where the scales make them needless: the reference has them."""
    wanted = options.guidance(has_image=rows == 3)
    if len(wanted.rows) == rows:
        return wanted
    base = MingOptions(guidance_scale=2.0, combination=options.combination).guidance(has_image=rows == 3)
    scales = (options.guidance_scale, options.image_guidance_scale)[: rows - 1]
    return Guidance(base.rows, tuple(_constant(scale) for scale in scales), base.combination)


def _constant(scale: float):
    return lambda step, steps: scale


@runner("ming_univision/flow_head", "sample")
@torch.no_grad()
def sample(case: Case, step: Step) -> dict[str, Tensor]:
    head, z, noise = _head(case), step.tensor("z", 0), step.tensor("noise", 1)
    options = _options(step, int(case.config["num_sampling_steps"]))
    kind = step.args.get("guidance", "none")
    guidance = Guidance()
    if kind == "text":
        guidance = _guidance(options, 2)
    elif kind == "text_image":
        guidance, z = _guidance(options, 3), z[[0, 2, 1]]  # the reference has the row without anything in the middle
    elif kind != "none":
        raise GoldenFailure(f"{step.id}: guidance {kind!r} is not computed, only none, text, text_image")
    noise = noise * options.temperature
    start = noise[:1] if kind != "none" else noise.expand(len(z), -1)
    settings = {"num_steps": options.num_steps, "time_shift": options.time_shift}
    end = head.sample(z, start, guidance, **settings)
    if kind != "none":  # all rows move along the one guided path, each from its own noise
        end = noise.expand(len(z), -1) + (end - start)
    return step.answers(end)


# ---------------------------------------------------------------------------------------------------------------------
# The whole model


def _model(case: Case) -> MingUniVision:
    return case.once("model", lambda: vistok.from_official(case.model, case.config, own_keys(case.state))).eval()


def _tokenizer(case: Case) -> MingTok:
    def build() -> MingTok:
        return vistok.from_official("mingtok/tokenizer", case.config["mingtok"], MingTok.clean_official(case.state))

    return case.once("tokenizer", build)


def _features(case: Case, image: Tensor) -> Tensor:
    tokenizer = _tokenizer(case)
    return tokenizer.semantic_features(tokenizer.encode(image))


def _prompt(case: Case, step: Step) -> Prompt:
    features = None
    if step.has("image"):
        image = _features(case, case.tensor("image"))  # (images, N, E)
        features = image.flatten(0, 1)[None]
    return _model(case).embed_ids(case.tensor("input_ids"), features)


@runner("ming_univision/generator", "embed_image")
@torch.no_grad()
def embed_image(case: Case, step: Step) -> dict[str, Tensor]:
    return step.answers(_model(case).embed_features(_features(case, step.tensor("image", 0))))


@runner("ming_univision/generator", "logits")
@torch.no_grad()
def logits(case: Case, step: Step) -> dict[str, Tensor]:
    check(step, "positions", "prompt")
    return step.answers(_model(case).logits(_prompt(case, step)))


MASKS = {"unconditional": "uncond_mask", "text_unconditional": "text_uncond_mask"}


def _drawn(case: Case, step: Step) -> tuple[MingSession, list[Tensor]]:
    """A session whose image is drawn and read, and the conditions (R, W) of the head at each step."""
    model, prompt = _model(case), _prompt(case, step)
    names = [_branch(name) for name in step.args["branches"]]
    # Our rows: everything, without the text, without text and image.
    order = [name for name in ("conditional", "text_unconditional", "unconditional") if name in names]
    if order[:1] != ["conditional"] or len(order) != len(names) or order == ["conditional", "text_unconditional"]:
        raise GoldenFailure(f"{step.id}: branches {step.args['branches']} are not computed")
    hidden = [~case.tensor(MASKS[name]).bool() if name in MASKS else torch.zeros_like(prompt.valid) for name in order]
    section = case.config.get("vishead_diffloss_config", {})
    options = _options(step, int(section.get("num_sampling_steps", 16)))
    if not step.args.get("noise_shared", True):
        raise GoldenFailure(f"{step.id}: branches with noise of their own are not computed")
    count = step.args.get("image_tokens", model.spec.length)
    if count != model.spec.length:
        raise GoldenFailure(f"{step.id}: the model draws {model.spec.length} tokens, not {count}")
    noise = case.tensor("noise")[None]
    guidance = Guidance() if len(names) == 1 else _guidance(options, len(names))
    length = prompt.valid.shape[1] + count + 2
    session = MingSession(model, len(prompt.valid), options, _tokenizer(case), length=length)
    session.read(prompt)
    session.begin_image(guidance, noise, hidden)
    conditions = []
    for _ in range(count):
        session.advance()
        conditions.append(model.to_condition(session.hidden))
        next(session.generate(1))
    session.advance()
    conditions.append(model.to_condition(session.hidden))
    return session, [rows[[order.index(name) for name in names]] for rows in conditions]


def _branch(name: str) -> str:
    """The row that a branch's name means, however the case writes it."""
    plain = name.lower().replace("-", "_").replace(" ", "_")
    if plain.startswith("text"):
        return "text_unconditional"
    return "unconditional" if plain.startswith("uncond") else "conditional"


@runner("ming_univision/generator", "generate_image")
@torch.no_grad()
def generate_image(case: Case, step: Step) -> dict[str, Tensor]:
    session, conditions = _drawn(case, step)
    latents = session.tokens
    semantic = _tokenizer(case).semantic_features(latents)
    image = _tokenizer(case).paint(semantic).clamp(-1, 1)
    return named(step, {"z": torch.stack(conditions), "latents": latents, "semantic": semantic, "image": image})


@runner("ming_univision/generator", "continue_text")
@torch.no_grad()
def continue_text(case: Case, step: Step) -> dict[str, Tensor]:
    check(step, "branch", 0)
    session, _ = _drawn(case, step)
    after = session.finish()[:, None]
    return step.answers(after, session.append_text(case.tensor("next_id"))[:, None])
