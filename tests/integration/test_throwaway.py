"""A throw-away system, all of whose code is in ``support/throwaway``: the whole chain of a user's commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.throwaway import Scattered
from support.tiny_models import labels, pixels, randomise
from support.tiny_runs import killed_at, losses_of

import vistok
from vistok.checkpoints import read_weights, registry
from vistok.checkpoints.catalogue import catalogue
from vistok.cli import main
from vistok.conditions import PARTS, Condition
from vistok.draws import Keys
from vistok.quickstart.systems import config_file, find_system, systems
from vistok.train.loop import Trainer

LINES = (
    registry.Entry("pyramid", "tokenizer", "support.throwaway:Pyramid", "throwaway/tokenizer", ""),
    registry.Entry("scattered", "generator", "support.throwaway:Scattered", "throwaway/gpt", "", tokenizer="pyramid"),
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "ENTRIES", (*registry.ENTRIES, *LINES))
    systems.cache_clear()
    yield
    systems.cache_clear()


def test_a_folder_and_a_registry_line_are_all_that_a_system_is(tmp_path):
    model = randomise(LINES[0].load()(**LINES[0].load().tiny)).eval()
    model.save_pretrained(tmp_path / "saved")
    images = pixels(model)
    assert torch.equal(vistok.load(tmp_path / "saved").reconstruct(images), model.reconstruct(images))
    assert find_system("pyramid").minutes == 1
    assert catalogue()[-2].sizes.keys() == {"usual"}


def test_it_trains_resumes_and_samples(tmp_path, monkeypatch):
    """With a class and a text, a loss that has parameters, three rows of guidance, and steps of 1, 4 and 9 tokens at
    places drawn for each sample."""
    tokenizer = trained(tmp_path, monkeypatch, "tokenizer")
    assert any(key.startswith("objective.terms.ar_prior.") for key in state(tokenizer)["players"]["model"]["weights"])
    tokens = tmp_path / "tokens"
    captions = ("--text-tokenizer", "bytes", "--text-length", "6")
    call("tokenize", tokenizer, "--out", tokens, *captions, "data.batch_size=64", "data.limit=320")
    generator = trained(tmp_path, monkeypatch, "generator", f"tokens={tokens}")
    call("sample", generator, "--out", tmp_path / "samples", "--num", "4", "--classes", "3,7", "--prompt", "a three")
    assert len(list((tmp_path / "samples").glob("*.png"))) >= 4

    pipe = vistok.pipeline(generator)
    asked = {"class_labels": [3, 7, 8], "prompt": ["a nine", "a seven", "a one"], "temperature": 0.0}
    output = pipe(**asked)
    *_, last = pipe.stream(**asked)
    assert torch.equal(last.tokens, output.tokens)
    assert torch.equal(output.tokens, guided_by_hand(pipe, **asked))
    assert not torch.equal(output.tokens, pipe(**asked, text_scale=1.0).tokens)


def trained(folder: Path, monkeypatch, stage: str, *overrides: str) -> Path:
    """A run of the room's recipe, which a resumed one equals bit for bit."""
    recipe = config_file("pyramid", stage)
    call("train", recipe, f"output_dir={folder / stage}", *overrides)
    part = folder / f"{stage}-in-parts"
    with monkeypatch.context() as context:
        context.setattr(Trainer, "optimise", killed_at(5))
        call("train", recipe, f"output_dir={part}", *overrides, ends_with=130)
    call("train", recipe, f"output_dir={part}", *overrides, "--resume")
    whole, resumed = state(folder / stage), state(part)
    assert losses_of(part) == losses_of(folder / stage)
    assert whole["step"] == resumed["step"] == 6
    for one, other in zip(tensors(whole["players"]), tensors(resumed["players"]), strict=True):
        assert torch.equal(one, other)
    for key in ("model", "average"):
        assert all(torch.equal(one, other) for one, other in zip(tensors(whole[key]), tensors(resumed[key])))
    return folder / stage


def guided_by_hand(
    pipe: vistok.Pipeline, class_labels: list[int], prompt: list[str], temperature: float
) -> torch.Tensor:
    """Step by step the likeliest ids of three passes without a cache: class and text, the class, nothing."""
    model: Scattered = pipe.generator
    condition = Condition.together(labels(*class_labels), pipe.text.condition(prompt))
    options = pipe.options(temperature=temperature)
    order = model.sampling_draws(Keys.range(0, len(condition)), options)["order"]
    ids = torch.zeros_like(order)
    with torch.no_grad():
        for begin, end in ((0, 1), (1, 5), (5, 14)):
            full, only_class, null = (
                model.whole(ids, order, condition.without(parts)) for parts in ((), ("ids",), PARTS)
            )
            guided = null + 1.5 * (only_class - null) + 2.0 * (full - only_class)
            ids[:, begin:end] = guided[:, begin:end].argmax(-1)
    return torch.zeros_like(ids).scatter(1, order, ids)


def call(*arguments: object, ends_with: int = 0) -> None:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert exit.value.code == ends_with


def state(run: Path) -> dict:
    return read_weights(run / "checkpoints" / "step-0000006" / "state.pt")


def tensors(value) -> list[torch.Tensor]:
    """All tensors of nested mappings and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]
