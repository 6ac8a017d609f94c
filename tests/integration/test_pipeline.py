"""Pipelines: folders, classes, options, seeds, previews."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import tiny

import vistok
from vistok.checkpoints import CheckpointError
from vistok.generators.vit_vqgan_gpt import ViTVQGANGPT
from vistok.pipelines import Pipeline
from vistok.pipelines.classes import ClassNames
from vistok.pipelines.folders import load_tokenizer
from vistok.signatures import ConfigError
from vistok.tokenizers.llamagen_vq import LlamaGenVQ
from vistok.tokenizers.vit_vqgan import ViTVQGAN
from vistok.types import Condition, TokenSpec

TINY_VIT = {"dim": 32, "num_layers": 1, "num_heads": 1, "mlp_dim": 32}
NAMES = ("cat", "Dog", "tench, Tinca tinca", "crane", "crane")


def tiny_tokenizer(**arguments) -> ViTVQGAN:
    torch.manual_seed(0)
    settings = {"image_size": 16, "patch_size": 4, "codebook_size": 24, "codebook_embed_dim": 4}
    return ViTVQGAN(**{**settings, "encoder": TINY_VIT, "decoder": TINY_VIT, **arguments})


def tiny_generator(spec: TokenSpec, **arguments) -> ViTVQGANGPT:
    torch.manual_seed(1)
    model = ViTVQGANGPT(
        spec, **{"num_classes": 5, "dim": 32, "num_layers": 1, "num_heads": 2, "condition_dropout": 0.1, **arguments}
    )
    # Untrained logits are nearly flat; with these weights they depend on class and neighbours.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def pipe() -> Pipeline:
    tokenizer = tiny_tokenizer()
    return Pipeline(tokenizer, tiny_generator(tokenizer.spec), class_names=NAMES, sampling={"top_k": 20})


@pytest.fixture
def unconditional() -> Pipeline:
    tokenizer = tiny_tokenizer(in_channels=1)
    return Pipeline(tokenizer, tiny_generator(tokenizer.spec, num_classes=0))


def arrays(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_a_saved_pipeline_generates_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = vistok.pipeline(tmp_path / "pipe", device="cpu")
    assert (loaded.class_names, loaded.sampling) == (NAMES, {"top_k": 20})
    before, after = pipe(["cat", 1], seed=3), loaded(["cat", 1], seed=3)
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.pixels, after.pixels)
    assert [image.size for image in after.images] == [(16, 16)] * 2
    assert after.images[0].mode == "RGB"
    assert after.labels == [0, 1]


def test_saving_replaces_a_pipeline_but_nothing_else(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.sampling["temperature"] = 0.5
    pipe.save_pretrained(tmp_path / "pipe")
    assert vistok.pipeline(tmp_path / "pipe", device="cpu").sampling == {"top_k": 20, "temperature": 0.5}
    (tmp_path / "pipe" / "metrics.jsonl").touch()
    with pytest.raises(FileExistsError, match=r"metrics\.jsonl"):
        pipe.save_pretrained(tmp_path / "pipe")
    assert (tmp_path / "pipe" / "metrics.jsonl").exists()


def test_a_failed_save_leaves_nothing(pipe, tmp_path, monkeypatch):
    def disk_full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vistok.pipelines.folders.write_json", disk_full)
    with pytest.raises(OSError, match="No space"):
        pipe.save_pretrained(tmp_path / "pipe")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_sample_does_not_depend_on_its_batch(pipe, batch_size):
    whole = pipe([0, 1], 4, seed=7, guidance_scale=2.0)
    parts = pipe([0, 1], 4, seed=7, guidance_scale=2.0, batch_size=batch_size)
    assert torch.equal(whole.tokens, parts.tokens)
    assert np.abs(arrays(whole.images) - arrays(parts.images)).max() <= 1  # decoding rounds differently by batch
    tail = pipe([1], 4, seed=7, guidance_scale=2.0, index_start=4)
    assert torch.equal(whole.tokens[4:], tail.tokens)
    assert len({tuple(row.tolist()) for row in whole.tokens}) == 8, "every sample has its own randomness"


def test_seed_and_torch_generator(pipe):
    def draw(seed: int) -> torch.Tensor:
        return pipe([0, 1], generator=torch.Generator().manual_seed(seed)).tokens

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    assert torch.equal(pipe([0]).tokens, pipe([0], seed=0).tokens)
    with pytest.raises(ValueError, match="either seed or generator"):
        pipe([0], seed=1, generator=torch.Generator())


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        ("CAT", [0]),
        (["dog", 1, np.int64(2), torch.tensor(3)], [1, 1, 2, 3]),
        (torch.tensor([4, 0]), [4, 0]),
        (np.array([2]), [2]),
        (["Tinca tinca", "tench", "tench, tinca tinca", " 3 "], [2, 2, 2, 3]),
        (torch.tensor(2), [2]),
    ],
)
def test_classes_by_id_and_name(pipe, labels, ids):
    assert pipe(labels).labels == ids


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("catt", r"unknown class 'catt'; did you mean 'cat'\? There are 5 classes .* ids 0\.\.4; .*class_names"),
        ("zzz", r"unknown class 'zzz'\. There are 5"),
        (5, r"class id 5 is out of range\. There are 5 classes"),
        ("-1", "class id -1 is out of range"),
        ("--1", "unknown class '--1'"),
        ("\u00b2", "unknown class"),
        ("9" * 5000, "unknown class"),
        (-1, "class id -1 is out of range"),
        ("crane", r"'crane' is ambiguous.*3: crane; 4: crane"),
        (1.5, "an id or a name, got 1.5"),
        (True, "an id or a name, got True"),
        ([], "list of classes is empty"),
    ],
)
def test_bad_classes(pipe, labels, message):
    with pytest.raises(ValueError, match=message):
        pipe(labels)


def test_names_are_found_in_any_form():
    names = ClassNames(4, ["Cafe\u0301", "Cat", "cat", "dog"])
    assert names.resolve(["caf\u00e9", "CAFE\u0301 ", "Cat", "cat", "Dog"]) == [0, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="'CAT' is ambiguous"):
        names.resolve("CAT")


def test_what_to_generate_must_be_said_once(pipe, unconditional):
    with pytest.raises(ValueError, match=r"0 were given.*class_labels=\[…\] is the usual"):
        pipe()
    with pytest.raises(ValueError, match="2 were given"):
        pipe([0], num_images=2)
    with pytest.raises(ValueError, match="no classes; generate with num_images"):
        unconditional(["cat"])
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        unconditional(num_images=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        pipe([0], batch_size=0)


@pytest.mark.parametrize("name", ["num_images_per_label", "index_start", "seed", "batch_size"])
@pytest.mark.parametrize("value", [1.0, 1.5, "2", [1]])
def test_counts_are_whole_numbers(pipe, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, got "):
        pipe([0], **{name: value})


def test_counts_of_numpy_and_negative_starts(pipe, unconditional):
    assert len(unconditional(num_images=np.int64(2)).images) == 2
    with pytest.raises(ValueError, match="index_start must be at least 0, got -1"):
        pipe([0], index_start=-1)
    with pytest.raises(ValueError, match=r"preview_every must be a whole number, got 0\.5 \(float\)"):
        pipe.stream([0], preview_every=0.5)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"window": 3}, "window has no effect with decoding 'plain'; leave it out, or give decoding 'jacobi'"),
        ({"coupled": True, "decoding": "cautious"}, "coupled has no effect with decoding 'cautious'"),
        ({"trials": 2, "decoding": "jacobi"}, "trials has no effect with decoding 'jacobi'"),
    ],
)
def test_options_of_another_decoding_are_refused(pipe, sampling, message):
    with pytest.raises(ValueError, match=message):
        pipe([0], **sampling)


def test_unconditional_grey_images(unconditional):
    out = unconditional(num_images=3)
    assert out.labels is None
    assert [(image.mode, image.size) for image in out.images] == [("L", (16, 16))] * 3


def test_a_given_condition_equals_its_labels(pipe):
    by_condition = pipe(condition=Condition.from_labels([2, 0]), num_images_per_label=2, seed=4)
    assert by_condition.labels == [2, 2, 0, 0]
    assert torch.equal(by_condition.tokens, pipe([2, 0], 2, seed=4).tokens)


def test_options_default_to_the_pipelines(pipe):
    pipe.sampling = {"temperature": 0.0}
    greedy = pipe([0, 0], seed=0).tokens
    assert torch.equal(greedy[0], greedy[1])
    drawn = pipe([0, 0], seed=0, temperature=1.0).tokens
    assert not torch.equal(drawn[0], drawn[1])


def test_bad_options(pipe):
    with pytest.raises(ConfigError, match=r"'guidence_scale' here; did you mean guidance_scale\?"):
        pipe([0], guidence_scale=2.0)
    with pytest.raises(ConfigError, match=r"top_k: got '5' \(str\)"):
        pipe([0], top_k="5")
    with pytest.raises(ValueError, match=r"top_p must lie in \(0, 1\]"):
        pipe.stream([0], top_p=2.0)
    with pytest.raises(ConfigError, match=r"sampling\.temprature: unknown key; did you mean sampling\.temperature"):
        Pipeline(pipe.tokenizer, pipe.generator, sampling={"temprature": 1.0})


@pytest.mark.parametrize("every", [None, 1, 5])
def test_previews_end_with_the_images(pipe, every):
    out = pipe([0, 3], seed=2)
    previews = list(pipe.stream([0, 3], seed=2, preview_every=every))
    assert [p.step for p in previews[:-1]] == list(range(every or 4, 16, every or 4))
    last = previews[-1]
    assert last.step == last.total == 16
    assert torch.equal(last.tokens, out.tokens)
    assert np.array_equal(arrays(last.images), arrays(out.images))


def test_raster_previews_grey_out_what_is_missing(pipe):
    first = next(pipe.stream([0, 3], seed=2))
    assert first.known.tolist() == [[True] * 4 + [False] * 12] * 2
    shown = arrays(first.images)
    assert (shown[:, 4:] == 128).all()
    assert not (shown[:, :4] == 128).all()


class PrefixTokenizer(ViTVQGAN):
    """A tokenizer whose prefixes of 6, 12 and 16 tokens decode."""

    @property
    def spec(self) -> TokenSpec:
        spec = super().spec
        return TokenSpec(spec.length, spec.codebook_size, spec.dim, prefix_step=6)

    def decode(self, tokens, *, condition=None):
        padded = torch.zeros(len(tokens), 16, dtype=tokens.dtype)
        padded[:, : tokens.shape[1]] = tokens
        return super().decode(padded)


def test_prefix_previews_decode_prefixes(pipe):
    tokenizer = PrefixTokenizer(**pipe.tokenizer._arguments)
    tokenizer.load_state_dict(pipe.tokenizer.state_dict())
    prefix_pipe = Pipeline(tokenizer, tiny_generator(tokenizer.spec))
    previews = list(prefix_pipe.stream([0], seed=2, preview_every=4))
    assert [p.step for p in previews] == [4, 8, 12, 16]
    assert previews[0].images is None
    six = tokenizer.decode(previews[1].tokens[:, :6])
    assert np.array_equal(arrays(previews[1].images), arrays(vistok.data.pictures.to_pil(six)))
    assert [p.step for p in prefix_pipe.stream([0], seed=2)] == [6, 12, 16]
    with pytest.raises(ValueError, match="preview_every must be at least 1, got 0"):
        prefix_pipe.stream([0], preview_every=0)


def test_a_convolutional_tokenizer_decodes_the_generators_grid():
    tokenizer = LlamaGenVQ(
        16, channels=8, encoder_channel_mult=(1, 1), decoder_channel_mult=(1, 1), res_blocks=1, z_channels=8,
        codebook_size=24, codebook_embed_dim=4, norm_groups=4,
    )  # fmt: skip
    spec = tokenizer.spec_for((3, 8, 8))
    pipe = Pipeline(tokenizer, tiny_generator(spec))
    assert pipe([0]).images[0].size == (8, 8)
    *_, last = pipe.stream([0])
    assert last.images[0].size == (8, 8)


def test_tokenizer_and_generator_must_agree(pipe):
    other = tiny_generator(TokenSpec(16, 30, 4))
    with pytest.raises(ValueError, match="codebook_size 30 instead of 24"):
        Pipeline(pipe.tokenizer, other)
    with pytest.raises(ValueError, match="length 4 instead of 16"):
        Pipeline(pipe.tokenizer, tiny_generator(TokenSpec(4, 24, 4, grid=(2, 2))))
    with pytest.raises(ValueError, match="2 class names, but the generator has 5 classes"):
        Pipeline(pipe.tokenizer, pipe.generator, class_names=("a", "b"))


def test_reconstruct_takes_photos_and_exact_pixels(pipe):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    assert [image.size for image in pipe.reconstruct(photo)] == [(16, 16)]
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = pipe.tokenizer.decode(pipe.tokenizer.encode(pixels))
    assert np.array_equal(arrays(pipe.reconstruct(pixels)), arrays(vistok.data.pictures.to_pil(expected)))
    with pytest.raises(ValueError, match="16x16 only, got 8x8"):
        pipe.reconstruct(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="reads 3 channels, got 1"):
        pipe.reconstruct(torch.zeros(1, 1, 16, 16))


def test_half_precision_weights(pipe):
    out = pipe.to(dtype=torch.bfloat16)([0])
    assert out.pixels.dtype == torch.float32
    assert bool(out.pixels.isfinite().all())


def break_settings(folder: Path) -> None:
    (folder / "pipeline.json").write_text('{"class_names": 3}')


def swap_models(folder: Path) -> None:
    (folder / "generator").rename(folder / "other")
    (folder / "tokenizer").rename(folder / "generator")
    (folder / "other").rename(folder / "tokenizer")


def truncate_weights(folder: Path) -> None:
    weights = folder / "generator" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_settings, r"pipeline\.json is damaged"),
        (swap_models, "holds a ViTVQGANGPT, which is no tokenizer"),
        (truncate_weights, "damaged or incomplete"),
        (lambda folder: (folder / "pipeline.json").unlink(), r"is no pipeline: it has no pipeline\.json"),
        (
            lambda folder: (folder / "generator").rename(folder / "gen"),
            r"no generator \(it has a tokenizer only",
        ),
    ],
)
def test_damaged_pipelines(pipe, tmp_path, damage, message):
    pipe.save_pretrained(tmp_path / "pipe")
    damage(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=message):
        vistok.pipeline(tmp_path / "pipe")


def test_paths_that_are_no_pipeline(pipe, tmp_path):
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer-only")
    with pytest.raises(CheckpointError, match=r"single model, which vistok\.load reads"):
        vistok.pipeline(tmp_path / "tokenizer-only")
    with pytest.raises(CheckpointError, match="there is no folder 'no such folder', and it is not a hub id"):
        vistok.pipeline("no such folder")


def test_an_unreachable_hub_is_reported(monkeypatch):
    def unreachable(*args, **options):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"owner/name.*could not be fetched.*give their local path"):
        vistok.pipeline("owner/name")


ADAPTER_FILES = ("config.json", "model.safetensors")
"""What follows "adapter_" in the names of the files that a part may have beside its own."""


def test_a_hub_id_fetches_exactly_the_pipeline(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "pipe")
    asked = {}

    def fetch(repo, allow_patterns):
        asked.update(repo=repo, files=sorted(allow_patterns))
        return str(tmp_path / "pipe")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert vistok.pipeline("owner/name", device="cpu").class_names == NAMES
    saved = sorted(p.relative_to(tmp_path / "pipe").as_posix() for p in (tmp_path / "pipe").rglob("*") if p.is_file())
    adapters = [f"{part}/adapter_{file}" for part in ("tokenizer", "generator") for file in ADAPTER_FILES]
    assert asked == {"repo": "owner/name", "files": sorted([*saved, *adapters, "text_encoder/*"])}


def test_load_tokenizer_finds_it_in_runs_and_model_folders(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    expected = pipe.tokenizer.fingerprint()
    assert load_tokenizer(tmp_path / "pipe").fingerprint() == expected
    assert load_tokenizer(tmp_path / "pipe" / "tokenizer").fingerprint() == expected
    with pytest.raises(CheckpointError, match="holds a generator"):
        load_tokenizer(tmp_path / "pipe" / "generator")


def test_settings_are_plain_json(pipe, tmp_path):
    pipe.sampling["guidance_scale"] = (1.0, 4.0)
    pipe.save_pretrained(tmp_path / "pipe")
    saved = json.loads((tmp_path / "pipe" / "pipeline.json").read_text())
    assert saved == {"class_names": list(NAMES), "sampling": {"top_k": 20, "guidance_scale": [1.0, 4.0]}}
    assert vistok.pipeline(tmp_path / "pipe", device="cpu")([0]).labels == [0]


KINDS = [
    ("llamagen_vq", "llama"),  # raster of ids
    ("flextok", "vit_vqgan_gpt"),  # prefixes, and a decoder with noise
    ("dar", "vit_vqgan_gpt"),  # prefixes of whole groups
    ("kl_vae", "mar"),  # latents in random order
    ("kl_vae", "xar"),  # latents in cells
]


@pytest.mark.parametrize(("tokenizer_name", "generator_name"), KINDS)
def test_every_kind_of_model_generates_and_streams(tokenizer_name, generator_name):
    tokenizer = tiny(tokenizer_name)
    generator = tiny(generator_name, spec=tokenizer.spec)
    pipe = Pipeline(tokenizer, generator)
    out = pipe([0, 1, 2], seed=1)
    again = pipe([0, 1, 2], seed=1, batch_size=2)
    assert torch.allclose(out.pixels, again.pixels, atol=1e-3), "random decoders, too, have one noise per sample"
    *earlier, last = pipe.stream([0, 1, 2], seed=1, preview_every=1)
    assert earlier
    assert np.array_equal(arrays(last.images), arrays(out.images))
    assert torch.equal(last.tokens, out.tokens)
