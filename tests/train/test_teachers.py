"""Losses with frozen networks, the two stages of TiTok, and the perturbation of latents in a run."""

from __future__ import annotations

import copy

import huggingface_hub
import pytest
import torch
from support.tiny_models import ARGUMENTS, tiny
from support.tiny_runs import tokenizer_config

import vistok
from vistok.checkpoints import CheckpointError
from vistok.losses import ClassifierDistance, SemanticGuide
from vistok.quantizers.perturbation import Perturbation
from vistok.signatures import ConfigError
from vistok.train import train
from vistok.train.monitor import read_metrics
from vistok.train.tasks import teachers
from vistok.train.tasks.objective import TokenizerObjective
from vistok.train.tasks.perturbation import LatentPerturbation, PerturbationConfig

CODEC = ARGUMENTS["titok"]["codec"]
TITOK = {key: value for key, value in ARGUMENTS["titok"].items() if key != "image_size"} | {"name": "titok"}


def config(folder, **changes) -> dict:
    config = tokenizer_config(folder, training={"max_steps": 3, "image_every": 0, "save_every": 0})
    return config | {"data": config["data"] | {"image_size": 16}} | changes


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """A folder with a codec of 16 codes on a 4x4 raster."""
    folder = tmp_path_factory.mktemp("codec") / "codec"
    tiny("maskgit_vqgan", in_channels=1, codebook_size=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def first_stage(codec, tmp_path_factory):
    """The run of a first stage."""
    losses = {"code_prediction": {"weight": 1.0, "tokenizer": str(codec)}, "codebook": 1.0, "commitment": 0.25}
    folder = tmp_path_factory.mktemp("stages") / "first"
    return train(config(folder, model=TITOK | {"output": "codes"}, losses=losses))


def test_first_stage_learns_codes(first_stage):
    rows = read_metrics(first_stage / "metrics.jsonl")
    assert rows[0]["code_prediction"] == pytest.approx(torch.tensor(16.0).log().item(), rel=0.2)
    assert "psnr" not in rows[0]


def test_second_stage_starts_from_the_first_and_the_codec_and_trains_the_decoder_alone(first_stage, codec, tmp_path):
    sources = [
        {"path": str(first_stage), "strict": False},
        {
            "path": str(codec),
            "rename": {r"decoder\.": "renderer.decoder.", r"quantizer\.": "renderer.", r"encoder\.": None},
            "strict": False,
        },
    ]
    freeze = ["encoder.*", "quantizer.*", "latent_tokens"]
    run = train(config(tmp_path / "second", model=TITOK, losses={"l2": 1.0}, init_from=sources, freeze=freeze))
    before = vistok.load(first_stage / "tokenizer").state_dict()
    parts = vistok.load(codec).state_dict()
    after = vistok.load(run / "tokenizer").state_dict()
    for key, value in after.items():
        if key.startswith(("encoder.", "quantizer.", "latent_tokens")):
            assert torch.equal(value, before[key]), key
    changed = [key for key in before if key in after and not torch.equal(after[key], before[key])]
    assert any(key.startswith("decoder.") for key in changed)
    # It stays near its start, the codec's weights; it does not start from random ones.
    torch.testing.assert_close(
        after["renderer.decoder.conv_in.weight"], parts["decoder.conv_in.weight"], atol=0.02, rtol=0
    )


def test_a_second_stage_needs_the_first(first_stage, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    freeze = {"freeze": ["encoder.*", "quantizer.*", "latent_tokens"], "model": TITOK, "losses": {"l2": 1.0}}
    half = {"path": str(first_stage), "rename": {r"encoder\.": None}, "strict": False}
    with pytest.raises(ConfigError, match=r"freeze keeps .* none of init_from has.*class_token"):
        train(config(tmp_path / "a", **freeze, init_from=[half]))
    with pytest.raises(CheckpointError, match="no local folder 'runs/first'"):
        train(config(tmp_path / "a", **freeze, init_from=[half | {"path": "runs/first"}]))
    train(config(tmp_path / "b", **freeze))
    assert "parameters are frozen, and there is no init_from" in caplog.text
    with pytest.raises(ConfigError, match="decoder_only leaves all that tokens depend on as it is: name the run"):
        train(config(tmp_path / "c", model=TITOK, losses={"l2": 1.0}, decoder_only=True))


@pytest.mark.parametrize("arguments", [{"codebook_size": 8}, {"codebook_size": 16, "channel_mult": (1, 2)}])
def test_a_codec_of_other_codes_is_refused(arguments, tmp_path):
    tiny("maskgit_vqgan", in_channels=1, **arguments).save_pretrained(tmp_path / "codec")
    losses = {"code_prediction": {"weight": 1.0, "tokenizer": str(tmp_path / "codec")}}
    with pytest.raises(ConfigError, match=r"but the model predicts 16 of 16"):
        train(config(tmp_path / "run", model=TITOK | {"output": "codes"}, losses=losses))


def test_a_codec_is_needed_and_codes_to_predict_it_with(codec, tmp_path):
    with pytest.raises(ConfigError, match="tokenizer is missing"):
        train(config(tmp_path / "a", model=TITOK | {"output": "codes"}, losses={"code_prediction": 1.0}))
    losses = {"code_prediction": {"weight": 1.0, "tokenizer": str(codec)}}
    with pytest.raises(ConfigError, match="provides no such term"):
        train(config(tmp_path / "b", losses=losses))


def test_teachers_keep_their_weights_and_compute_in_the_precision_of_the_run(codec, tmp_path, monkeypatch):
    seen, original = [], teachers.CodePredictionTerm.forward

    def forward(self, output, target, clock, draws, tokenizer):
        teacher = self.codec.network
        latents = teacher.latents(target)
        nearest = torch.cdist(latents.float(), teacher.quantizer.codes()).argmin(-1)
        exact = torch.equal(teacher.encode(target), nearest)
        seen.append((latents.dtype, next(teacher.parameters()).dtype, exact))
        return original(self, output, target, clock, draws, tokenizer)

    monkeypatch.setattr(teachers.CodePredictionTerm, "forward", forward)
    losses = {"code_prediction": {"weight": 1.0, "tokenizer": str(codec)}}
    settings = {"max_steps": 1, "save_every": 1, "image_every": 0, "mixed_precision": "bf16"}
    held_out = {"data": {"split": "test", "limit": 8}}
    data = config(tmp_path)["data"] | {"split": "train"}
    run = config(tmp_path / "run", model=TITOK | {"output": "codes"}, losses=losses, validation=held_out, data=data)
    train(run | {"training": settings})
    assert len(seen) == 2  # in training and in validation
    assert set(seen) == {(torch.bfloat16, torch.float32, True)}


def test_the_classifier_term_is_a_pixel_term(monkeypatch, tmp_path):
    small = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 5))
    monkeypatch.setattr(ClassifierDistance, "from_pretrained", lambda path=None: ClassifierDistance(small))
    run = train(config(tmp_path / "run", losses={"classifier": 0.1, "codebook": 1.0}))
    assert read_metrics(run / "metrics.jsonl")[0]["classifier"] > 0


@pytest.mark.parametrize("name", ["vit_vqgan", "robustok"])
def test_the_semantic_term_projects_as_the_tokenizer_does_or_by_itself(name, monkeypatch):
    from timm.models.vision_transformer import VisionTransformer

    guide = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    monkeypatch.setattr(SemanticGuide, "from_config", lambda *_, **__: SemanticGuide(guide))
    model = tiny(name)
    term = teachers.SemanticContrastTerm("semantic_contrast", teachers.SemanticContrastConfig(weight=0.1), model)
    assert bool(list(term.parameters())) == (name == "vit_vqgan")
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    loss = term(model(images), images, None, {}, model)
    loss.backward()
    assert loss.item() > 0
    averaged = copy.deepcopy(model)
    if name == "robustok":  # its own projection, not the trained tokenizer's
        averaged.project_semantic = lambda features: -model.project_semantic(features)
    other = term(model(images), images, None, {}, averaged).item()
    assert (other == loss.item()) == (name == "vit_vqgan")


def test_absent_weights_of_the_semantic_contrast_are_named_by_their_key(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"")
    section = {"weight": 1.0, "encoder": {"name": "vit_tiny_patch16_224", "weights": str(tmp_path / "cut.safetensors")}}
    with pytest.raises(CheckpointError, match=r"by losses\.semantic_contrast\.encoder\.weights"):
        TokenizerObjective(tiny("vit_vqgan"), {"semantic_contrast": section})


# ---------------------------------------------------------------------------------------------------------------------
# Perturbation


def test_a_run_perturbs_and_anneals(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(LatentPerturbation, "set", _recording(LatentPerturbation.set, seen))
    section = {"rate": 1.0, "share": 0.5, "strength": 8, "anneal_start": 1, "anneal_end": 2}
    train(config(tmp_path / "run", perturbation=section))
    assert seen == [Perturbation(1.0, 0.5, 8), Perturbation(1.0, 0.5, 8), Perturbation(0.5, 0.5, 4)]


def _recording(original, seen):
    def set_and_record(self, tokenizer, clock):
        original(self, tokenizer, clock)
        seen.append(tokenizer.quantizer.perturbation)

    return set_and_record


def test_annealing_goes_by_epochs():
    section = PerturbationConfig(anneal_start=400, anneal_end=1200, anneal_every=10)
    ratios = [section.at(step).rate for step in (0, 409, 805, 809, 1209, 1210)]
    assert ratios == [1, 1, 0.75, 0.75, 0.5, 0.5]


@pytest.mark.parametrize("name", ["kl_vae", "flextok"])
def test_tokenizers_without_a_codebook_are_refused(name):
    with pytest.raises(ConfigError, match="has no codebook of one code per token"):
        LatentPerturbation(PerturbationConfig(), tiny(name))
