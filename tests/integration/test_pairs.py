"""Pairs for post-training: partly generated images beside the real ones, and a tokenizer that learns from them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import in_loop, labels, names, pixels, tiny, token_ids
from support.tiny_runs import generator_config, tokenizer_config

from vistok.data import DataConfig
from vistok.draws import Keys
from vistok.pipelines import Pipeline
from vistok.pipelines.folders import load_tokenizer
from vistok.pipelines.pairs import partly_generated, write_pairs
from vistok.train import train
from vistok.train.tokenize import tokenize
from vistok.utils.outputs import ResumeError, unfinished
from vistok.utils.processes import Processes

NAMES = ("cat", "dog")
CANNOT = {"xar", "ming_univision"}


@pytest.fixture
def photos(tmp_path):
    """Ten images of two classes, in folders and formats of their own."""
    rng = np.random.default_rng(0)
    for number in range(10):
        folder = tmp_path / "photos" / NAMES[number % 2] / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"photo{number}.{('jpg', 'png')[number % 3 == 0]}")
    return tmp_path / "photos"


def data(photos, **changes) -> DataConfig:
    return DataConfig(**{"image_size": 16, "root": str(photos), "batch_size": 4} | changes)


def pipe(**arguments) -> Pipeline:
    tokenizer = tiny("llamagen_vq")
    generator = tiny("llama", spec=tokenizer.spec, num_classes=2)
    return Pipeline(tokenizer, generator, **{"class_names": NAMES, "sampling": {"guidance_scale": 2.0}} | arguments)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("name", names("generator"))
def test_forced_tokens_are_taken(name):
    model = tiny(name)
    condition, spec = labels(0, 1, 2), model.spec
    if not model.condition_spec.num_classes:
        condition = condition.none(3)
    real = token_ids(model) if spec.discrete else Keys.range(0, 3).normal("x", spec.length, spec.dim)
    if spec.depth > 1:
        real = real[..., None].expand(-1, -1, spec.depth)
    kept = Keys.range(3, 3).uniform("kept", spec.length) < 0.5
    options = model.options_type()
    draws = model.sampling_draws(Keys.range(0, 3), options)
    if name in CANNOT:
        with pytest.raises(ValueError, match="cannot keep some tokens"):
            model.sample_forced(real, kept, condition, options, draws=draws, **in_loop(model))
        return
    made = model.sample_forced(real, kept, condition, options, draws=draws, **in_loop(model))
    assert torch.equal(made[kept], real[kept])
    assert not torch.equal(made[~kept], real[~kept])
    everything = model.sample_forced(real, torch.ones_like(kept), condition, options, draws=draws, **in_loop(model))
    assert torch.equal(everything, real)


def test_sigma_is_the_share_that_is_kept():
    made = pipe()
    images, condition = pixels(made.tokenizer), labels(0, 1, 1)
    keys, options = Keys.range(0, 3), made.options()
    whole = partly_generated(made, images, condition, 1.0, keys, options)
    torch.testing.assert_close(whole, made.tokenizer.reconstruct(images))
    free = partly_generated(made, images, condition, 0.0, keys, options)
    tokens = made.generator.sample(condition, options, draws=made.generator.sampling_draws(keys, options))
    torch.testing.assert_close(free, made.tokenizer.decode(tokens).detach().clamp(-1, 1))
    # Every image depends only on its own key.
    alone = partly_generated(made, images[1:2], condition[1:2], 0.5, keys.at([1]), options)
    torch.testing.assert_close(alone, partly_generated(made, images, condition, 0.5, keys, options)[1:2])


def test_pairs_have_the_names_of_their_files(photos, tmp_path):
    record = write_pairs(pipe(), data(photos), tmp_path / "pairs", sigma=0.5, seed=3, batch_size=4)
    generated, real = files(tmp_path / "pairs" / "generated"), files(tmp_path / "pairs" / "real")
    assert list(generated) == list(real)
    assert "cat/deeper/photo0.png" in generated
    assert len(generated) == 10
    assert all(generated[name] != real[name] for name in real)
    assert json.loads((tmp_path / "pairs" / "pairs.json").read_text()) == record
    assert record["sigma"] == 0.5
    assert record["images"] == 10


class Beside(Processes):
    """One of several processes, simulated by a thread."""

    def __init__(self, index: int, meeting: Barrier, told: dict):
        super().__init__(index, meeting.parties)
        object.__setattr__(self, "meeting", meeting)
        object.__setattr__(self, "told", told)

    def wait(self) -> None:
        self.meeting.wait(60)

    def gather(self, value):
        self.told[self.index] = value
        self.wait()
        return [self.told[index] for index in range(self.count)]


@pytest.mark.parametrize("count", [2, 5])
def test_several_processes_make_the_pairs_of_one(photos, tmp_path, count):
    expected = write_pairs(pipe(), data(photos), tmp_path / "one", batch_size=3)
    meeting, told = Barrier(count), {}
    pipes = [pipe() for _ in range(count)]

    def work(index: int):
        processes = Beside(index, meeting, told)
        return write_pairs(pipes[index], data(photos), tmp_path / "several", batch_size=3, processes=processes)

    with ThreadPoolExecutor(count) as pool:
        records = list(pool.map(work, range(count)))
    assert records == [expected] * count
    assert files(tmp_path / "several") == files(tmp_path / "one")
    assert (tmp_path / "several" / "pairs.json").read_bytes() == (tmp_path / "one" / "pairs.json").read_bytes()


def test_of_other_sources_they_have_numbers(tmp_path):
    tokenizer = tiny("llamagen_vq", in_channels=1)
    made = Pipeline(tokenizer, tiny("randar", spec=tokenizer.spec, num_classes=10), sampling={"num_steps": 3})
    write_pairs(made, DataConfig(16, source="digits", channels=1, limit=5), tmp_path / "pairs")
    assert [f"{index * 1433 // 5:08d}.png" for index in range(5)] == list(files(tmp_path / "pairs" / "real"))


@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_killed_run_goes_on_to_the_same_pairs(photos, tmp_path, monkeypatch, after):
    from vistok.pipelines import pairs

    write_pairs(pipe(), data(photos), tmp_path / "whole", batch_size=4)
    left, save_png = [2 * after], pairs.save_png

    def save(image, path):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save_png(image, path)

    monkeypatch.setattr(pairs, "save_png", save)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(pipe(), data(photos), tmp_path / "pairs", batch_size=3)
    monkeypatch.undo()
    assert not (tmp_path / "pairs").exists()
    if unfinished(tmp_path / "pairs").exists():
        with pytest.raises(ResumeError, match=r"another sigma: sigma was 0\.7 and is now 0\.6"):
            write_pairs(pipe(), data(photos), tmp_path / "pairs", sigma=0.6, resume=True)
    write_pairs(pipe(), data(photos), tmp_path / "pairs", batch_size=4, resume=after > 0)
    assert files(tmp_path / "pairs") == files(tmp_path / "whole")


@pytest.mark.parametrize("sigma", [-0.1, 1.1, float("nan")])
def test_sigma_out_of_range(photos, tmp_path, sigma):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        write_pairs(pipe(), data(photos), tmp_path / "pairs", sigma=sigma)


def test_what_cannot_be_paired(photos, tmp_path):
    out = tmp_path / "pairs"
    with pytest.raises(ValueError, match=r"other classes than the generator was trained on \(cat, fox\)"):
        write_pairs(pipe(class_names=("fox", "dog")), data(photos), out)
    with pytest.raises(ValueError, match="multiples of"):
        write_pairs(pipe(), data(photos, image_size=17), out)
    Image.new("RGB", (16, 16)).save(photos / "cat" / "deeper" / "photo0.jpg")
    with pytest.raises(ValueError, match=r"called cat/deeper/photo0 and differ in their endings"):
        write_pairs(pipe(), data(photos), out)
    assert not out.exists()
    assert not unfinished(out).exists()


def test_a_decoder_learns_from_pairs_alone(tmp_path):
    """Tokenizer, generator, pairs, post-training: the tokens do not change."""
    short = {"max_steps": 2, "image_every": 0, "save_every": 0, "log_every": 0}
    tokenizer = train(tokenizer_config(tmp_path / "tokenizer", training=short))
    digits = DataConfig(16, source="digits", channels=1, limit=40)
    tokenize(load_tokenizer(tokenizer), digits, tmp_path / "tokens")
    generator = train(generator_config(tmp_path / "generator", tmp_path / "tokens", training=short))
    write_pairs(Pipeline.from_pretrained(generator), digits, tmp_path / "pairs", sigma=0.5)
    post = tokenizer_config(
        tmp_path / "post",
        training=short,
        init_from=str(tokenizer),
        decoder_only=True,
        data={
            "source": "folder",
            "root": str(tmp_path / "pairs" / "generated"),
            "target_root": str(tmp_path / "pairs" / "real"),
            "split": None,
            "affine": None,
        },
    )
    before, after = load_tokenizer(tokenizer), load_tokenizer(train(post))
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    assert torch.equal(after.encode(images), before.encode(images))
    assert not torch.equal(after.reconstruct(images), before.reconstruct(images))
    (tmp_path / "pairs" / "real" / "00000000.png").unlink()
    with pytest.raises(ValueError, match="have no target of their name, such as 00000000"):
        train(post | {"output_dir": str(tmp_path / "again")})
