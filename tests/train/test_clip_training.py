"""Training on clips: LARP's tokenizer with its prior and its adversary, generators of clips, frame prediction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from support.tiny_models import ARGUMENTS, names, pixels, tiny

import vistok
from vistok.data import DataConfig
from vistok.draws import Keys
from vistok.signatures import ConfigError
from vistok.train import train
from vistok.train.preview import preview
from vistok.train.tasks.objective import TokenizerObjective
from vistok.train.tasks.terms import ARPriorTerm
from vistok.train.tasks.tokenizer import TokenizerLearner
from vistok.train.tokenize import tokenize
from vistok.types import Clock

PRIOR = {"weight": 0.06, "num_layers": 1, "num_heads": 2, "dim": 8}
DATA = {"source": "moving_digits", "image_size": 16, "num_frames": 4, "channels": 1, "batch_size": 4, "limit": 16}


def tokenizer_run(folder, **changes: Any) -> dict[str, Any]:
    """The config of a run of two steps."""
    derived = ("num_frames", "image_size", "in_channels")
    model = {key: value for key, value in ARGUMENTS["larp"].items() if key not in derived}
    return {
        "task": "tokenizer",
        "output_dir": str(folder),
        "model": {"name": "larp", **model},
        "losses": {"l1": 1.0, "codebook": 0.1, "ar_prior": PRIOR},
        "data": DATA,
        "training": {"max_steps": 2, "log_every": 1, "image_every": 2, "save_every": 2, "trackers": []},
        **changes,
    }


GAN = {
    "weight": 0.3,
    "loss": "non_saturating",
    "discriminator": {"name": "vit", "dim": 8, "num_layers": 1, "num_heads": 2, "temporal_patch_size": 2},
    "every_n_steps": 2,
    "order": "adversary_first",
    "smoothing": {},
    "lecam_weight": 1e-6,
    "lecam_compare": "batch_means",
}


def test_larp_trains_with_prior_and_adversary_and_exports_itself_alone(tmp_path):
    config = tokenizer_run(tmp_path / "run")
    folder = train(config | {"losses": config["losses"] | {"gan": GAN}})
    model = vistok.load(folder / "tokenizer")
    assert model.input_shape == (1, 4, 16, 16)
    assert not [key for key in model.state_dict() if "prior" in key]
    rows = [row for row in (folder / "metrics.jsonl").read_text().splitlines() if '"ar_prior"' in row]
    assert len(rows) == 2


def test_the_prior_is_trained_and_resumed_with_the_run(tmp_path):
    def weights(checkpoint) -> torch.Tensor:
        (found,) = find(torch.load(checkpoint / "state.pt", weights_only=True), "prior.output.weight")
        return found

    def find(state: Any, name: str) -> list[torch.Tensor]:
        """Tensors of the players' weights whose key ends with ``name``; optimizer states have no names."""
        inner = state.items() if isinstance(state, dict) else ()
        own = [value for key, value in inner if str(key).endswith(name) and isinstance(value, torch.Tensor)]
        return own or [tensor for _, value in inner for tensor in find(value, name)]

    training = {
        "max_steps": 2,
        "log_every": 1,
        "image_every": 0,
        "save_every": 1,
        "keep_checkpoints": 2,
        "trackers": [],
    }
    folder = train(tokenizer_run(tmp_path / "run", training=training))
    first, second = map(weights, sorted((folder / "checkpoints").glob("step-*")))
    assert not torch.equal(first, second)


WITH_PRIOR = [name for name in names("tokenizer") if ARPriorTerm.fits(tiny(name))]


@pytest.mark.parametrize("name", WITH_PRIOR)
def test_every_tokenizer_of_one_code_per_position_can_have_the_prior(name):
    model = tiny(name).train()
    options = {"normalize": name not in ("flextok",)}
    learner = TokenizerLearner(model, TokenizerObjective(model, {"ar_prior": PRIOR | options}))
    keys = Keys.range(0, 3)
    _, terms = learner(pixels(model), None, Clock(0, 10), learner.training_draws(keys))
    terms["ar_prior"].backward()
    trained = dict(learner.objective.named_parameters())
    assert trained
    assert all(p.grad is not None for p in trained.values())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    "quantizer",
    [
        {"name": "vq", "codebook_size": 12},
        {"name": "lfq"},
        {"name": "bsq"},
        {"name": "fsq", "levels": (3, 3, 2, 2)},
        {"name": "index", "codebook_size": 12},
    ],
)
def test_the_prior_orders_codes_of_other_quantizers(quantizer):
    model = tiny("larp", quantizer=quantizer).train()
    learner = TokenizerLearner(model, TokenizerObjective(model, {"ar_prior": PRIOR}))
    _, terms = learner(pixels(model), None, Clock(5, 10), learner.training_draws(Keys.range(0, 3)))
    terms["ar_prior"].backward()
    assert all(p.grad.isfinite().all() for p in learner.parameters() if p.grad is not None)
    assert model.pre_quant.weight.grad.abs().sum() > 0


def test_the_prior_refuses_codes_that_it_cannot_score():
    scales = {"name": "multi_scale", "codebook_size": 12, "scales": ((1, 1), (1, 6))}
    with pytest.raises(ConfigError, match=r"losses\.ar_prior: LARP provides no such term: it scores ids of one code"):
        TokenizerObjective(tiny("larp", quantizer=scales), {"ar_prior": PRIOR})
    many = tiny("larp", codebook_dim=50, quantizer={"name": "lfq"})
    with pytest.raises(ConfigError, match=r"scores every code at every token, which would take .* this machine has"):
        TokenizerObjective(many, {"ar_prior": PRIOR})


def test_the_prior_needs_ids():
    with pytest.raises(ConfigError, match=r"losses\.ar_prior: KLVAE provides no such term"):
        TokenizerObjective(tiny("kl_vae"), {"ar_prior": PRIOR})
    with pytest.raises(ConfigError, match=r"losses\.ar_prior: mix_ratio must lie in \[0, 1\]"):
        TokenizerObjective(tiny("larp"), {"ar_prior": PRIOR | {"mix_ratio": 2.0}})
    with pytest.raises(ValueError, match="KLVAE has no codes"):
        tiny("kl_vae").codes()


@pytest.mark.parametrize(("given", "condition"), [(0, None), (2, ["given"])])
def test_generators_of_clips_train_and_sample(tmp_path, given, condition):
    model = tiny("larp", image_size=16, in_channels=1)
    tokenize(model, DataConfig(**DATA), tmp_path / "tokens", given_frames=given)
    config = {
        "task": "generator",
        "output_dir": str(tmp_path / "run"),
        "model": {
            "name": "llama",
            "dim": 16,
            "num_layers": 1,
            "num_heads": 2,
            "multiple_of": 16,
            "positions": "learned",
        },
        "tokens": str(tmp_path / "tokens"),
        "condition": condition,
        "training": {
            "max_steps": 2,
            "batch_size": 4,
            "log_every": 1,
            "image_every": 2,
            "save_every": 2,
            "trackers": [],
        },
    }
    pipe = vistok.pipeline(train(config))
    made = pipe(frames=torch.zeros(1, 1, 2, 16, 16)) if given else pipe(class_labels=[3])
    assert made.videos.shape == (1, 4, 16, 16, 1)


def test_pictures_of_a_run_show_a_clip_a_row(tmp_path):
    """Pictures: pairs of rows for tokenizers, a row per class for generators; ``--dry-run`` shows the first batch."""
    seen = preview(tokenizer_run(tmp_path / "run"))
    with Image.open(seen.picture) as picture:
        assert picture.size == (4 * 16 + 3 * 2, 4 * 16 + 3 * 2)  # 4 frames across, 4 clips down, gaps between
    run = train(tokenizer_run(tmp_path / "run"))
    with Image.open(next((run / "images").glob("*.png"))) as picture:
        assert picture.size[0] == 4 * 18 - 2
        assert picture.size[1] % 18 == 16
    tokenizer = vistok.load(run / "tokenizer")
    tokenize(tokenizer, DataConfig(**DATA), tmp_path / "tokens")
    generator = train(
        {
            "task": "generator",
            "output_dir": str(tmp_path / "generator"),
            "tokens": str(tmp_path / "tokens"),
            "model": {"name": "llama", "dim": 16, "num_layers": 1, "num_heads": 2, "positions": "learned"},
            "training": {"max_steps": 1, "batch_size": 4, "image_every": 1, "save_every": 0, "trackers": []},
        }
    )
    with Image.open(next((generator / "images").glob("*.png"))) as picture:
        assert picture.size == (4 * 18 - 2, 8 * 18 - 2)
