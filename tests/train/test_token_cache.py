"""The token cache: reading gives what was written, and other content is refused."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.data import (
    Loader,
    SequentialOrder,
    TokenBatches,
    TokenCache,
    TokenCacheError,
    TokenMixture,
    TokenWriter,
    token_loader,
)
from vistok.data.tokens import sample_shape, token_dtype
from vistok.types import TokenSpec

SPEC = TokenSpec(length=6, codebook_size=100, dim=4, grid=(2, 3))


def random_tokens(spec: TokenSpec, count: int, views: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    shape = (count, views, *sample_shape(asdict(spec)))
    if spec.codebook_size is None:
        return torch.randn(shape, generator=generator)
    return torch.randint(spec.codebook_size, shape, generator=generator)


def write_cache(folder: Path, spec: TokenSpec = SPEC, count: int = 23, views: int = 2, **options) -> torch.Tensor:
    tokens = random_tokens(spec, count, views)
    options = {"shard_size": 10, "classes": ("ant", "cat"), "source_fingerprint": "def", **options}
    with TokenWriter(folder, asdict(spec), "abc", views=views, **options) as writer:
        for part, labels in zip(tokens.split(7), (torch.arange(count) % 2).split(7)):
            writer.write(part, labels)
    return tokens


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    write_cache(tmp_path / "tokens")
    return tmp_path / "tokens"


specs = st.builds(
    TokenSpec,
    length=st.integers(1, 5),
    codebook_size=st.sampled_from([None, 2, 1 << 16, (1 << 16) + 1]),
    dim=st.integers(1, 3),
    depth=st.integers(1, 3),
)


@settings(max_examples=25, deadline=None)
@given(spec=specs, count=st.integers(1, 30), views=st.integers(1, 3), shard_size=st.integers(1, 12), data=st.data())
def test_round_trip(tmp_path_factory, spec: TokenSpec, count: int, views: int, shard_size: int, data: st.DataObject):
    folder = tmp_path_factory.mktemp("cache") / "tokens"
    tokens = write_cache(folder, spec, count, views, shard_size=shard_size)
    cache = TokenCache(folder)
    assert (len(cache), cache.views, cache.classes) == (count, views, ("ant", "cat"))
    assert (cache.tokenizer_hash, cache.source_fingerprint) == ("abc", "def")
    assert TokenSpec(**cache.spec) == spec
    indices = data.draw(st.lists(st.integers(0, count - 1), max_size=8))
    chosen = data.draw(st.lists(st.integers(0, views - 1), min_size=len(indices), max_size=len(indices)))
    got, labels = cache.batch(indices, chosen)
    assert torch.equal(got, tokens[torch.tensor(indices, dtype=torch.long), torch.tensor(chosen, dtype=torch.long)])
    assert got.dtype == tokens.dtype
    assert labels.tolist() == [index % 2 for index in indices]


def test_dtypes_are_as_small_as_the_codebook_allows(cache_folder: Path):
    assert np.load(cache_folder / "tokens-00000.npy").dtype == np.uint16
    assert token_dtype({"codebook_size": (1 << 16) + 1}) is np.int32
    assert token_dtype({"codebook_size": 1 << 31}) is np.int32
    assert token_dtype({"codebook_size": (1 << 31) + 1}) is np.int64
    assert token_dtype({"codebook_size": None}) is np.float32
    assert token_dtype({"codebook_size": 4}, "latents") is np.float32


def test_grid_survives_json(tmp_path: Path):
    spec = TokenSpec(length=5, codebook_size=9, dim=1, scales=((1, 1), (2, 2)), prefix_step=1)
    write_cache(tmp_path / "tokens", spec)
    assert TokenSpec(**TokenCache(tmp_path / "tokens").spec) == spec


@pytest.mark.parametrize("shape", [(3, 6), (3, 1, 6), (3, 2, 5), (3, 2, 6, 1)])
def test_writer_refuses_shapes_that_the_spec_excludes(tmp_path: Path, shape: tuple[int, ...]):
    with (
        pytest.raises(ValueError, match=r"expected tokens of shape \(B, 2, 6\) and B labels, got"),
        TokenWriter(tmp_path / "tokens", asdict(SPEC), "abc", views=2) as writer,
    ):
        writer.write(torch.zeros(shape, dtype=torch.long), torch.full((3,), -1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("token", "label", "message"),
    [
        (100, 0, r"token id 100 is out of range 0\.\.99"),
        (-1, 0, r"token id -1 is out of range 0\.\.99"),
        (0, 2, r"label 2 is out of range 0\.\.1"),
        (0, -1, r"label -1 is out of range 0\.\.1"),
        (0.5, 0, "token ids must be integers, got float32"),
    ],
)
def test_writer_refuses_values_out_of_range(tmp_path: Path, token: float, label: int, message: str):
    with (
        pytest.raises(ValueError, match=message),
        TokenWriter(tmp_path / "tokens", asdict(SPEC), "abc", classes=("ant", "cat")) as writer,
    ):
        writer.write(torch.full((1, 1, 6), token), torch.tensor([label]))


def test_unconditional_caches_have_no_labels(tmp_path: Path):
    with TokenWriter(tmp_path / "tokens", asdict(SPEC), "abc") as writer:
        writer.write(torch.zeros(2, 1, 6, dtype=torch.long), torch.tensor([-1, -1]))
        with pytest.raises(ValueError, match="labels must be -1 in a cache without class names"):
            writer.write(torch.zeros(1, 1, 6, dtype=torch.long), torch.tensor([3]))
    assert TokenCache(tmp_path / "tokens").labels.tolist() == [-1, -1]


def test_failed_writes_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="no samples were written"), TokenWriter(tmp_path / "a", asdict(SPEC), "abc"):
        pass

    def full_disk(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    for count in (3, 23):  # the disk is full at the end, and while writing
        with pytest.raises(OSError, match="No space left"):
            write_cache(tmp_path / "b", count=count)
    assert list(tmp_path.iterdir()) == []


def test_existing_target_is_refused_and_kept(cache_folder: Path):
    with pytest.raises(FileExistsError, match="exists already"):
        write_cache(cache_folder)
    assert len(TokenCache(cache_folder)) == 23


def test_another_tokenizers_cache_is_refused(cache_folder: Path):
    cache = TokenCache(cache_folder)
    cache.check_tokenizer("abc")
    with pytest.raises(
        TokenCacheError, match=r"its hash is abc, this tokenizer's is xyz; make a cache .*vistok tokenize"
    ):
        cache.check_tokenizer("xyz")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokens-00001.npy").unlink(), r"incomplete: tokens-00001\.npy is missing"),
        (lambda f: (f / "labels-00002.npy").unlink(), r"incomplete: labels-00002\.npy is missing"),
        (lambda f: cut(f / "tokens-00001.npy", 200), r"tokens-00001\.npy is damaged or truncated"),
        (lambda f: cut(f / "tokens-00001.npy", 20), r"tokens-00001\.npy is damaged or truncated"),
        (lambda f: cut(f / "tokens-00001.npy", 0), r"tokens-00001\.npy is damaged or truncated"),
        (
            lambda f: np.save(f / "tokens-00001.npy", np.zeros((2, 2))),
            r"holds float64 \(2, 2\), index\.json says uint16",
        ),
        (lambda f: (f / "index.json").unlink(), r"is no token cache: no index\.json"),
        (lambda f: cut(f / "index.json", 30), r"index\.json is damaged"),
        (lambda f: (f / "index.json").write_text("{}"), "is not in the format 'vistok-tokens-1'"),
    ],
)
def test_damaged_caches_are_refused_on_opening(cache_folder: Path, damage, message: str):
    damage(cache_folder)
    with pytest.raises(TokenCacheError, match=message):
        TokenCache(cache_folder)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_indices_and_views_out_of_range(cache_folder: Path):
    cache = TokenCache(cache_folder)
    with pytest.raises(IndexError, match=r"index out of range 0\.\.22: 23"):
        cache.batch([0, 23], [0, 0])
    with pytest.raises(IndexError, match=r"view out of range 0\.\.1: -1"):
        cache.batch([0], [-1])


def test_pickling_hands_on_the_folder_not_the_data(cache_folder: Path):
    cache = TokenCache(cache_folder)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 500
    assert torch.equal(pickle.loads(pickled).batch([3], [1])[0], cache.batch([3], [1])[0])


@pytest.mark.parametrize("mixed", [False, True])
def test_loader_is_the_same_for_any_workers_and_resumes(cache_folder: Path, tmp_path: Path, mixed: bool):
    cache = TokenCache(cache_folder)
    if mixed:
        write_cache(tmp_path / "other", views=3)
        cache = TokenMixture([cache, TokenCache(tmp_path / "other")], (1, 2))

    def drain(num_workers: int, state: dict | None = None, epochs: int = 2) -> list:
        loader = token_loader(cache, 4, seed=3, num_workers=num_workers)
        if state is not None:
            loader.load_state_dict(state)
        return [batch for _ in range(epochs) for batch in loader]

    expected = drain(0)
    half = token_loader(cache, 4, seed=3)
    running = iter(half)
    begun = [next(running) for _ in range(2)]
    assert_same(drain(2), expected)
    assert_same(begun + drain(1, half.state_dict()), expected)
    assert all(batch.condition.labels.tolist() == (batch.indices % 2).tolist() for batch in expected)


def test_every_view_is_drawn_and_changes_with_the_epoch(tmp_path: Path):
    tokens = write_cache(tmp_path / "tokens", count=60, views=3)
    reader = TokenBatches(TokenCache(tmp_path / "tokens"), seed=0)
    drawn = []
    for epoch in range(2):
        (batch,) = Loader(reader, SequentialOrder(60, 60), epoch=epoch)
        matches = (batch.tokens[:, None] == tokens).flatten(2).all(-1)  # (N, V)
        assert (matches.sum(1) == 1).all()
        drawn.append(matches.int().argmax(1))
    assert set(drawn[0].tolist()) == {0, 1, 2}
    assert not torch.equal(*drawn)


def drawn(tokens: torch.Tensor, reader: TokenBatches, epoch: int) -> torch.Tensor:
    """(N,) which of the views (N, V, L) of each sample an epoch reads."""
    batch, _ = reader.load(np.arange(len(reader)), epoch)
    return (batch.tokens[:, None] == tokens).all(-1).int().argmax(1)


def test_a_mixture_draws_from_each_cache_as_often_as_its_weight_says(tmp_path: Path):
    tokens = [write_cache(tmp_path / name, count=600, views=views) for name, views in (("a", 2), ("b", 3))]
    caches = [TokenCache(tmp_path / name) for name in "ab"]
    views = torch.cat(tokens, 1)
    for weights, share in ((None, 0.5), ((3, 1), 0.75)):
        counts = np.zeros(5)
        for epoch in range(4):
            reader = TokenBatches(TokenMixture(caches, weights), seed=5)
            counts += np.bincount(drawn(views, reader, epoch), minlength=5)
        expected = 2400 * np.array([share / 2] * 2 + [(1 - share) / 3] * 3)
        assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-squared, 4 degrees of freedom: 1 in 1,000


def test_a_mixture_of_one_is_that_cache(tmp_path: Path):
    tokens = write_cache(tmp_path / "a", count=200, views=10)
    cache = TokenCache(tmp_path / "a")
    for epoch in range(3):
        views = [drawn(tokens, TokenBatches(one, seed=1), epoch) for one in (cache, TokenMixture([cache]))]
        assert torch.equal(*views)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 22}, "their images differ"),
        ({"source_fingerprint": "xyz"}, "their images differ"),
        ({"classes": ("bee", "cow")}, "their images differ"),
        ({"spec": TokenSpec(length=5, codebook_size=100, dim=4)}, "their shape of tokens differ"),
    ],
)
def test_caches_that_do_not_belong_together_are_not_mixed(tmp_path: Path, changes: dict, message: str):
    write_cache(tmp_path / "a")
    write_cache(tmp_path / "b", **changes)
    with pytest.raises(TokenCacheError, match=rf"b cannot be mixed with .*a: {message}"):
        TokenMixture([TokenCache(tmp_path / "a"), TokenCache(tmp_path / "b")])


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, float("nan")), (1, 2, 3)])
def test_weights_are_one_positive_number_per_cache(cache_folder: Path, weights: tuple):
    cache = TokenCache(cache_folder)
    with pytest.raises(ValueError, match="2 token caches need as many token_weights above 0"):
        TokenMixture([cache, cache], weights)


def test_index_tells_what_made_the_cache(cache_folder: Path):
    index = json.loads((cache_folder / "index.json").read_text())
    assert index["tokenizer"] == "abc"
    assert index["spec"]["grid"] == [2, 3]
    assert index["shards"] == [10, 10, 3]


def assert_same(got: list, expected: list) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.condition.labels, other.condition.labels)
        assert torch.equal(one.indices, other.indices)
