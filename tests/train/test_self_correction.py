"""Bitwise self-correction: a tokenizer of bits in scales, a cache of its latents, and a VAR that reads the cache."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import labels, tiny
from support.tiny_runs import generator_config, losses_of, tokenizer_config
from torch.nn import functional as F

import vistok
from vistok.data import Affine, DataConfig
from vistok.data.tokens import TokenCache
from vistok.draws import Keys
from vistok.generators.var import VAR
from vistok.signatures import ConfigError
from vistok.train import train
from vistok.train.tokenize import tokenize

QUANTIZER = {"name": "multi_scale_bsq", "scales": [1, 2], "self_correction": 0.3, "entropy_temperature": 0.1}
DATA = DataConfig(16, source="digits", channels=1, limit=64, affine=Affine(translate=0.1))
MODEL = {name: value for name, value in VAR.tiny.items() if name not in ("spec", "num_classes")} | {"name": "var"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tokenizer's run, and caches of its ids and of its latents."""
    folder = tmp_path_factory.mktemp("correction")
    config = tokenizer_config(folder / "tokenizer", model={"quantizer": QUANTIZER})
    config["losses"] = {"l2": 1.0, "entropy": 0.01}
    train(config)
    tokenizer = vistok.load(folder / "tokenizer" / "tokenizer")
    for name in ("ids", "latents"):
        tokenize(tokenizer, DATA, folder / name, augmentation="random:2", latents=name == "latents")
    return folder


def corrected_run(folder, runs, tokens: str, **changes) -> dict:
    config = generator_config(folder, runs / tokens, sampling={})
    return config | {"model": MODEL | {"self_correction": 0.3}} | changes


def test_a_cache_of_latents_holds_what_ids_are_made_of(runs):
    tokenizer, caches = vistok.load(runs / "ids" / "tokenizer"), [TokenCache(runs / n) for n in ("ids", "latents")]
    (ids, _), (latents, _) = (cache.batch(range(10), [1] * 10) for cache in caches)
    assert (ids.shape, latents.shape) == ((10, 5), (10, 4, 4))
    assert torch.equal(tokenizer.quantizer.encode(latents), ids)
    with pytest.raises(ValueError, match="no bits of scales"):
        tokenize(tiny("vit_vqgan"), DATA, runs / "none", latents=True)


def test_a_generator_learns_to_repair_turned_bits(runs):
    tokenizer, cache = vistok.load(runs / "ids" / "tokenizer"), TokenCache(runs / "latents")
    latents, condition = cache.batch(range(3), [0] * 3)[0], labels(0, 1, 2)
    model = tiny("var", spec=tokenizer.spec, self_correction=0.5).train()
    draws = model.training_draws(Keys.range(4, 3)) | {"strengths": torch.full((3, 2), 0.999)}
    loss = model(latents, condition, draws=draws, tokenizer=tokenizer).loss
    found = tokenizer.quantizer.of_maps.bits.self_correct(
        latents.view(3, 2, 2, 4).permute(0, 3, 1, 2), draws["flips"], torch.tensor([0.5, 0.5])
    )
    wanted = tokenizer.quantizer.of_maps.pack(found.targets)
    assert not torch.equal(wanted, tokenizer.quantizer.encode(latents))
    dropped = condition.drop(draws["drop"] < 0.1)
    logits = model.logits_of(found.inputs, dropped)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), wanted.flatten()))
    clean = model.eval()(latents, condition, draws=draws | {"drop": torch.ones(3)}, tokenizer=tokenizer).loss
    ids = tokenizer.quantizer.encode(latents)
    torch.testing.assert_close(clean, model(ids, condition, tokenizer=tokenizer).loss)


def test_a_run_learns_from_latents_and_is_a_pipeline(runs, tmp_path):
    train(corrected_run(tmp_path / "run", runs, "latents"))
    assert all(torch.tensor(losses_of(tmp_path / "run")).isfinite())
    assert len(vistok.pipeline(tmp_path / "run", device="cpu")([3], seed=1).images) == 1


def test_caches_that_do_not_fit_are_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="holds ids: make a cache with `vistok tokenize … --latents`"):
        train(corrected_run(tmp_path / "ids", runs, "ids"))
    with pytest.raises(ConfigError, match="only self-correction reads"):
        train(corrected_run(tmp_path / "plain", runs, "latents", model=MODEL))
    with pytest.raises(ConfigError, match="make both in the same way"):
        train(corrected_run(tmp_path / "held_out", runs, "latents", validation={"tokens": str(runs / "ids")}))
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 2"):
        tiny("var", self_correction=2.0)
    model = tiny("var", self_correction=0.3)
    with pytest.raises(ValueError, match="no bits: self-correction needs"):
        model(torch.zeros(3, 16, 4), labels(0, 1, 2), tokenizer=tiny("var_vq"))
