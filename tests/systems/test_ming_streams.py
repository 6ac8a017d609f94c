"""Ming-UniVision: training on streams matches sampling; a language model of Hugging Face can be its backbone."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from support.tiny_models import tiny

import vistok
from vistok.data import TokenCache, TokenWriter
from vistok.data.ragged import Piece
from vistok.data.streams import StreamBatches, StreamConfig, Streams
from vistok.draws import Keys
from vistok.generators.ming_univision import MingOptions, MingUniVision
from vistok.generators.ming_univision.context import Context
from vistok.signatures import ConfigError
from vistok.train.config import RunConfig
from vistok.train.tasks.generator import GeneratorTask
from vistok.types import Clock, Condition, ConditionSpec, FeatureSpec, IdSpec

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TALK = StreamConfig(
    template="begin ids:0 answer begin_image* given* end_image* begin ids:1 answer begin_image* tokens* end_image*"
)
CHANGE = StreamConfig(template="begin begin_image given end_image ids:1 answer begin_image* tokens* end_image*")
TEXTS = ([[7, 8, 9], [4, 11]], [[5, 6], [12, 13, 4, 5]], [[4], [6, 6, 6]])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny("mingtok")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tokenizer):
    return write(tmp_path_factory.mktemp("streams") / "tokens", tokenizer, seed=0)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory, tokenizer):
    return write(tmp_path_factory.mktemp("streams") / "held out", tokenizer, seed=2)


def write(folder, tokenizer, seed: int) -> TokenCache:
    latents, given = (Keys.range(seed + part, 3).normal("image", 1, 16, 4) for part in (0, 1))
    condition = ConditionSpec(ids=IdSpec(20, 5), given=FeatureSpec(4, 16))
    spec = asdict(tokenizer.spec)
    with TokenWriter(folder, spec, tokenizer.fingerprint(), condition=condition, feature_dtype="float32") as writer:
        ids = [[Piece(np.array(text), len(text)) for text in texts] for texts in TEXTS]
        before = [[Piece(view.numpy(), 16) for view in image] for image in given]
        writer.write(latents, torch.full((3,), -1), {"ids": ids, "given": before})
        tokenizer.save_pretrained(writer.folder / "tokenizer")
    return TokenCache(folder)


def streams(cache, **configs) -> Streams:
    return StreamBatches(cache, configs).load(np.arange(3), 0)[0].tokens


@pytest.fixture
def model():
    return tiny("ming_univision", num_classes=0)


def text(row: int, number: int) -> Condition:
    ids = TEXTS[row][number]
    mask = torch.tensor([[False] * (5 - len(ids)) + [True] * len(ids)])
    return Condition.from_ids(torch.tensor([[0] * (5 - len(ids)) + ids]), mask)


@torch.no_grad()
@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("drop", [None, 0.07, 0.01])
def test_sampling_reads_what_streams_teach(model, tokenizer, cache, row, turns, drop):
    """A stream of one pass has the states that a conversation has turn by turn, in each row of guidance."""
    batch = streams(cache, mine=TALK if turns == 2 else CHANGE)
    draws = None if drop is None else torch.full((3,), drop)
    reading, _, hidden = model.read_streams(batch, tokenizer, draws)
    taught = hidden[row][reading.valid[row]]
    tokens, _ = cache.batch([row], [0])
    given = cache.condition(np.array([row]), np.array([0]), np.array([0.0])).only(["given"])
    session = model.converse(1, MingOptions(), tokenizer=tokenizer)
    if turns == 2:
        session.ask(text(row, 0))
        session.append_image(given.given)
        session.ask(text(row, 1))
    else:
        session.ask(Condition.together(text(row, 1), given))
    torch.testing.assert_close(session.hidden[0], taught[len(session.context) - 1], **CLOSE)
    session.begin_image(MingOptions().guidance(has_image=True), torch.zeros(1, 16, 4))
    guided = {None: 0, 0.07: 1, 0.01: 2}[drop]  # everything, without the text, without text and image
    torch.testing.assert_close(session.hidden[guided], taught[len(session.context) - 1], **CLOSE)
    session.append(tokens)
    session.advance()
    torch.testing.assert_close(session.hidden[guided], taught[len(session.context) - 1], **CLOSE)
    assert len(session.context) == len(taught) - 1  # the end mark


def test_roles_of_any_length_stand_where_turns_begin(model, cache):
    reading = model.reader(streams(cache, mine=TALK))
    start, patch, end = model.image_start, model.image_patch, model.image_end
    image = [start, *[patch] * 16, end]
    assert reading.ids[0][reading.valid[0]].tolist() == [1, 7, 8, 9, 2, 3, *image, 1, 4, 11, 2, 3, *image]
    plain = tiny("ming_univision", num_classes=0, human=(), assistant=(3,))
    reading = plain.reader(streams(cache, image_to_text=StreamConfig()))
    words = TEXTS[1][0]
    row = reading.ids[1][reading.valid[1]].tolist()
    assert row[:19] == [*image, 3]
    assert row[-1] == plain.end
    assert row[19:-1] in TEXTS[1]
    assert words in TEXTS[1]
    assert reading.learned.sum(1).tolist() == [len(r[r != 0]) - 19 for r in reading.ids.where(reading.valid, 0)]


def test_the_joint_loss_has_a_part_of_images_and_one_of_texts(tokenizer, cache):
    model = tiny("ming_univision", num_classes=0, text_weight=0.5).train()
    both = {"image_to_text": 1.0, "talk": TALK}
    batch = streams(cache, **both)
    draws = model.training_draws(Keys.range(0, 3))
    output = model(batch, Condition.none(3), draws=draws, tokenizer=tokenizer)
    parts = output.metrics
    assert set(parts) == {"flow", "text"}
    torch.testing.assert_close(output.loss.detach(), parts["flow"] + 0.5 * parts["text"])
    output.loss.backward()
    for part in (model.flow_head, model.output, model.projection, model.backbone):
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in part.parameters())
    read = model(streams(cache, image_to_text=1.0), Condition.none(3), draws=draws, tokenizer=tokenizer).metrics
    assert read["flow"] == 0
    assert read["text"] > 0
    alone = streams(cache, talk=TALK)
    weights = torch.tensor([0.0, 1.0, 0.0])
    weighted = model(alone, Condition.none(3), draws=draws, weights=weights, tokenizer=tokenizer).loss
    own = {name: value[1:2] for name, value in draws.items()}
    torch.testing.assert_close(weighted, model(alone[1:2], Condition.none(1), draws=own, tokenizer=tokenizer).loss)


def config(cache, **changes) -> RunConfig:
    values = {
        "task": "generator",
        "output_dir": "run",
        "tokens": str(cache.folder),
        "model": {"name": "ming_univision"} | {k: v for k, v in tiny("ming_univision").config.items() if k in KEPT},
        "training": {"max_steps": 1, "batch_size": 3},
        "streams": {"image_to_text": 1.0, "talk": {"template": TALK.template, "share": 2.0}},
    }
    return RunConfig.parse(values | changes)


KEPT = ("feature_dim", "human", "assistant", "backbone", "head")


def test_a_run_of_streams_learns_them(cache):
    task = GeneratorTask(config(cache), 0, 1)
    batch = next(iter(task.loader))
    assert isinstance(batch.tokens, Streams)
    assert task.show(batch).shape == (3, 3, 16, 16)
    assert len(task.pictures(task.model.eval())) == 1
    assert task.loader.reader.prompts(np.arange(3)).ids[2].tolist() == [0, 0, 6, 6, 6]  # of the last turn


def test_a_run_is_measured_on_held_out_streams(cache, held_out, tokenizer):
    """Every held-out sample once, with the same templates and draws every time, and no condition dropped."""
    run = config(cache, validation={"tokens": str(held_out.folder)})
    task = GeneratorTask(run, 0, 1)
    assert task.validates
    model, clock = task.model.eval(), Clock(1, 1)
    measured = [task.validate(task.learner, clock, lambda: False) for _ in range(2)]
    assert measured[0] == measured[1]
    batch = StreamBatches(held_out, run.streams, seed=run.seed).load(np.arange(3), 0)[0]
    draws = model.training_draws(Keys.of(run.seed, batch.indices, 0).on(torch.device("cpu")))
    assert draws.pop("drop").min() < model.condition_dropout
    with torch.no_grad():
        output = model(batch.tokens, Condition.none(3), draws=draws, tokenizer=tokenizer)
    expected = {"loss": output.loss, **output.metrics}
    assert measured[0] == pytest.approx({f"val_{name}": value.item() for name, value in expected.items()}, rel=1e-4)


def test_held_out_streams_are_of_other_samples_and_have_what_templates_need(cache, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="holds the images that the run trains on"):
        GeneratorTask(config(cache, validation={"tokens": str(cache.folder)}), 0, 1)
    with TokenWriter(tmp_path / "bare", asdict(tokenizer.spec), tokenizer.fingerprint()) as writer:
        writer.write(Keys.range(9, 3).normal("image", 1, 16, 4), torch.full((3,), -1), {})
    with pytest.raises(ConfigError, match="is not conditioned as"):
        GeneratorTask(config(cache, validation={"tokens": str(tmp_path / "bare")}), 0, 1)


def test_runs_that_cannot_learn_streams_are_refused(cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(MingUniVision, "takes_streams", False)
        with pytest.raises(ConfigError, match="ming_univision reads no streams"):
            GeneratorTask(config(cache), 0, 1)
    with pytest.raises(ConfigError, match="have no ids"):
        GeneratorTask(config(cache, condition=["given"]), 0, 1)
    with pytest.raises(ConfigError, match=r"streams\.talk"):
        config(cache, streams={"talk": {"tempalte": "begin"}})


# ---------------------------------------------------------------------------------------------------------------------
# Language models of Hugging Face


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 22, "max_position_embeddings": 128}
OTHERS = {
    "gemma": {"head_dim": 8},  # scales its embeddings
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},  # learned positions; as many heads of keys as of queries
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 16},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}


def written(folder, kind: str, **changes):
    """A causal language model with weights large enough that every part matters."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    configuration = transformers.AutoConfig.for_model(kind, **SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(configuration)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def carried(folder) -> MingUniVision:
    """A tiny model with the weights of a language model; ``tiny`` would draw others."""
    arguments = {"text_vocabulary_size": 20, "num_classes": 0, "human": (), "assistant": ()}
    return MingUniVision(**MingUniVision.tiny | arguments | {"language_model": str(folder)}).eval()


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def language_model(request, tmp_path_factory):
    return written(tmp_path_factory.mktemp(request.param), request.param, tie_word_embeddings=request.param == "qwen2")


@torch.no_grad()
@pytest.mark.parametrize("kind", OTHERS)
def test_language_models_of_many_kinds_compute_what_they_did(kind, tmp_path):
    """In one pass, and in steps behind entries that are hidden."""
    transformers = pytest.importorskip("transformers")
    folder = written(tmp_path / kind, kind, **OTHERS[kind])
    original = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = carried(folder)
    ids = Keys.range(0, 2).permutation("ids", 20)[:, :12]
    expected = original(ids[:, 3:]).logits
    torch.testing.assert_close(model.logits(model.embed_ids(ids[:, 3:]))[..., :22], expected, **CLOSE)
    context = Context(model, 2, 12)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[:, :3] = False
    parts = [
        context.read(model.embedding(part), valid=seen)
        for part, seen in zip(ids.split([4, 1, 7], 1), valid.split([4, 1, 7], 1))
    ]
    torch.testing.assert_close(model.output(torch.cat(parts, 1))[:, 3:, :22], expected, **CLOSE)
    assert model.backbone.max_length == (16 if kind == "mistral" else 128)  # the reach of its attention


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("cohere", {}),  # scales its logits
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        ("bloom", {"n_layer": 2, "n_head": 4}),  # positions follow from the mask alone
        ("mamba", {"state_size": 4}),  # no attention
    ],
)
def test_language_models_that_would_compute_something_else_are_refused(kind, sizes, tmp_path):
    folder = written(tmp_path / kind, kind, **sizes)
    with pytest.raises(ValueError, match=r"cannot carry texts and images: .* such as Qwen or Mistral \("):
        carried(folder)


def test_a_language_model_by_name_is_the_backbone(language_model, tokenizer, cache, tmp_path):
    import transformers

    original = transformers.AutoModelForCausalLM.from_pretrained(language_model)
    torch.manual_seed(1)
    model = carried(language_model)
    ids = torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original.eval()(ids).logits
        torch.testing.assert_close(model.logits(model.embed_ids(ids))[..., :22], expected, **CLOSE)
    assert model.output.out_features == 24  # two marks that the original does not have
    batch = streams(cache, talk=TALK)
    with pytest.raises(ValueError, match="streams are of another vocabulary: this model's has texts of 21 ids"):
        tiny("ming_univision", text_vocabulary_size=21).reader(batch)
    condition, draws = text(0, 0), model.sampling_draws(Keys.range(0, 1))
    options = MingOptions(num_steps=2)
    drawn = model.sample(condition, options, draws=draws, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "model")
    again = vistok.load(tmp_path / "model")
    assert torch.equal(again.sample(condition, options, draws=draws, tokenizer=tokenizer), drawn)
    reading, _, hidden = model.read_streams(batch, tokenizer, None)
    session = model.converse(1, options, tokenizer=tokenizer)
    session.ask(text(1, 0))
    session.append_image(cache.condition(np.array([1]), np.array([0]), np.array([0.0])).given)
    session.ask(text(1, 1))
    taught = hidden[1][reading.valid[1]][len(session.context) - 1]
    torch.testing.assert_close(session.hidden[0], taught.detach(), **CLOSE)


def test_a_language_model_that_is_none_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="is no causal language model"):
        tiny("ming_univision", language_model=str(tmp_path))
