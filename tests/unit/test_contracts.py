"""Contracts of the value types, of randomness, and of saving and loading."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import ARGUMENTS, names, pixels, tiny

import vistok
from vistok import checkpoints
from vistok.checkpoints import CheckpointError, registry
from vistok.draws import Keys
from vistok.generators.base import Generator
from vistok.tokenizers.base import Tokenizer
from vistok.types import Condition, TokenSpec, to_json
from vistok.utils.files import atomic_file, atomic_folder, write_json

ALL = names("tokenizer") + names("generator")

# ---------------------------------------------------------------------------------------------------------------------
# TokenSpec


def test_spec_read_back_from_json_is_equal():
    spec = TokenSpec(20, 512, dim=8, grid=(4, 5), scales=((2, 2), (4, 4)))
    assert TokenSpec(**json.loads(json.dumps(to_json(spec)))) == spec


@pytest.mark.parametrize("wrong", [{"grid": (4, 4)}, {"scales": ((2, 2), (3, 3))}])
def test_spec_whose_raster_does_not_hold_its_tokens_is_refused(wrong):
    with pytest.raises(ValueError, match="but length is 15"):
        TokenSpec(15, 512, dim=8, **wrong)


@given(st.integers(1, 50), st.lists(st.integers(0, 1000), min_size=1, max_size=8))
def test_check_ids_accepts_exactly_the_alphabet(codebook_size, ids):
    spec = TokenSpec(8, codebook_size, dim=4)
    tensor = torch.tensor([ids])
    if max(ids) < codebook_size:
        assert spec.check_ids(tensor) is tensor
    else:
        with pytest.raises(ValueError, match=f"{max(ids)} is out of range"):
            spec.check_ids(tensor)


@pytest.mark.parametrize(
    ("spec", "ids", "message"),
    [
        (TokenSpec(4, 8, dim=2), torch.tensor([[0, -1]]), "-1 is out of range"),
        (TokenSpec(4, 8, dim=2), torch.zeros(1, 4), "must be integers"),
        (TokenSpec(4, 8, dim=2), torch.zeros(4, dtype=torch.long), r"must have shape \(B, n\)"),
        (TokenSpec(4, 8, dim=2, depth=3), torch.zeros(1, 4, dtype=torch.long), r"must have shape \(B, n, 3\)"),
        (TokenSpec(4, 8, dim=2, depth=3), torch.zeros(1, 4, 2, dtype=torch.long), r"must have shape \(B, n, 3\)"),
        (TokenSpec(4, None, dim=2), torch.zeros(1, 4, dtype=torch.long), "continuous"),
    ],
)
def test_check_ids_names_what_is_wrong(spec, ids, message):
    with pytest.raises(ValueError, match=message):
        spec.check_ids(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Condition


def test_negative_labels_are_unconditional():
    assert Condition.from_labels([3, -1, 0]).dropped.tolist() == [False, True, False]


def test_guidance_stacks_null_rows_behind_and_keeps_the_mask():
    mask = torch.tensor([[0, 1], [1, 1]])
    one = Condition.from_features(torch.randn(2, 2, 3), mask)
    both = Condition.cat([one, one.null()])
    assert both.dropped.tolist() == [False, False, True, True]
    assert torch.equal(both.mask, torch.cat([mask, mask]).bool())
    assert torch.equal(both.features[2:], both.features[:2])


def test_drop_only_adds_and_leaves_the_original():
    condition = Condition.from_labels([1, -1, 2])
    dropped = condition.drop(torch.tensor([True, False, False]))
    assert dropped.dropped.tolist() == [True, True, False]
    assert condition.dropped.tolist() == [False, True, False]


def test_rows_of_a_condition():
    condition = Condition.from_features(torch.arange(12.0).view(3, 2, 2), torch.ones(3, 2))[1:]
    assert len(condition) == 2
    assert condition.features[0, 0, 0] == 4
    assert condition.labels is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: Condition.from_labels(torch.tensor([0.5])),
        lambda: Condition.from_labels(torch.tensor([[1]])),
        lambda: Condition.from_ids(torch.tensor([1])),
        lambda: Condition.from_features(torch.zeros(2, 3)),
        lambda: Condition.from_features(torch.zeros(2, 3, 4), torch.ones(2, 4)),
    ],
)
def test_condition_of_wrong_shape_or_type_is_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# Randomness


@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6, unique=True),
    st.integers(0, 2**40),
    st.data(),
)
def test_a_samples_draws_depend_on_nothing_else_in_its_batch(seed, indices, step, data):
    chosen = data.draw(st.lists(st.sampled_from(indices), min_size=1, max_size=6))
    whole, part = Keys.of(seed, indices, step), Keys.of(seed, chosen, step)
    rows = [indices.index(index) for index in chosen]
    assert torch.equal(part.uniform("a", 3), whole.uniform("a", 3)[rows])
    assert torch.equal(part.normal("a", 2, 2), whole.normal("a", 2, 2)[rows])
    assert torch.equal(part.permutation("a", 5), whole.permutation("a", 5)[rows])


def test_seed_index_step_and_name_each_give_other_numbers():
    base = Keys.range(0, 2)
    draws = [base.uniform("a", 4), base.uniform("b", 4), Keys.range(1, 2).uniform("a", 4)]
    draws += [Keys.range(0, 2, step=1).uniform("a", 4), Keys.range(0, 2, start=2).uniform("a", 4)]
    numbers = torch.cat(draws).flatten().tolist()
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 2, -5])
def test_neighbouring_seeds_differ_however_large(seed):
    assert not torch.equal(Keys.range(seed, 1).uniform("a", 4), Keys.range(seed + 1, 1).uniform("a", 4))


def test_numbers_of_a_seed_never_change():
    # Written down once: saved samples and caches must stay reproducible.
    assert Keys.of(7, [3], step=2).uniform("ids", 2).tolist() == [[0.7784321308135986, 0.8267332911491394]]


def test_longer_draws_continue_shorter_ones():
    assert torch.equal(Keys.range(0, 2).uniform("a", 8)[:, :3], Keys.range(0, 2).uniform("a", 3))


def test_distributions_are_what_they_are_called():
    keys = Keys.range(0, 4)
    uniform, normal = keys.uniform("u", 5000), keys.normal("n", 5000)
    assert 0 <= uniform.min() <= uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert normal.mean().item() == pytest.approx(0, abs=0.03)
    assert normal.std().item() == pytest.approx(1, abs=0.03)
    assert all(sorted(row) == list(range(50)) for row in keys.permutation("p", 50).tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading


def test_every_registered_model_has_a_tiny_one():
    assert {entry.name for entry in registry.ENTRIES} <= ARGUMENTS.keys(), "add its arguments to tests/tiny_models.py"


@pytest.mark.parametrize("name", ALL)
def test_registered_model_is_of_its_kind_and_knows_its_name(name):
    kind = {"tokenizer": Tokenizer, "generator": Generator}[registry.entry(name).kind]
    assert isinstance(tiny(name), kind)
    assert registry.entry(name).load().registry_name == name


@pytest.mark.parametrize("name", ALL)
def test_saved_model_comes_back_bit_for_bit(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path / "model")
    for loaded in (vistok.load(tmp_path / "model"), type(model).from_pretrained(tmp_path / "model")):
        assert type(loaded) is type(model)
        assert loaded.config == model.config
        assert not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
        assert loaded.fingerprint() == model.fingerprint()


@pytest.mark.parametrize("name", ALL)
def test_fingerprint_sees_every_weight_and_the_config(name):
    model = tiny(name)
    before = model.fingerprint()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        assert model.fingerprint() != before
        with torch.no_grad():
            parameter.view(-1)[-1] -= 1


def test_config_holds_the_defaults_too():
    assert tiny("llamagen_vq").config["codebook_l2_norm"] is True
    assert json.loads(json.dumps(tiny("llama").config)) == tiny("llama").config


def test_unknown_argument_is_refused_when_building():
    with pytest.raises(TypeError, match="widht"):
        tiny("llama", widht=3)


def test_model_of_another_class_is_refused_by_name(tmp_path):
    tiny("vit_vqgan").save_pretrained(tmp_path / "model")
    wrong = registry.entry("llamagen_vq").load()
    with pytest.raises(CheckpointError, match=r"holds a ViTVQGAN \(vit_vqgan\), not a LlamaGenVQ"):
        wrong.from_pretrained(tmp_path / "model")


@pytest.fixture
def saved(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / checkpoints.CONFIG).read_text())
    (folder / checkpoints.CONFIG).write_text(json.dumps(config | changes))


def test_a_model_saved_under_old_names_loads_and_keeps_its_fingerprint(saved):
    config = json.loads((saved / checkpoints.CONFIG).read_text())
    arguments = config["arguments"]
    arguments |= {"layers": arguments.pop("num_layers"), "heads": arguments.pop("num_heads")}
    edit_config(saved, arguments=arguments)
    model = vistok.load(saved)
    assert (model.config["num_layers"], model.config["num_heads"]) == (arguments["layers"], arguments["heads"])
    # Token caches of that version hold the hash over the names of that version.
    digest = hashlib.sha256(json.dumps(["llama", arguments], sort_keys=True).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    assert model.fingerprint() == digest.hexdigest()


def test_arguments_that_do_not_fit_are_refused_with_the_file(saved):
    edit_config(saved, arguments={"spec": None, "num_layers": "many"})
    with pytest.raises(checkpoints.CheckpointError, match=r"(?s)config\.json does not describe a llama: .*num_layers"):
        vistok.load(saved)


def test_unknown_registry_name_gets_a_hint(saved):
    edit_config(saved, model="lama")
    with pytest.raises(registry.UnknownModelError, match="did you mean 'llama'"):
        vistok.load(saved)


def test_damaged_config_is_refused(saved):
    text = (saved / checkpoints.CONFIG).read_text()
    (saved / checkpoints.CONFIG).write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        vistok.load(saved)


@pytest.mark.parametrize("content", ["[]", '{"architectures": ["T5"]}'])
def test_config_of_another_library_is_refused(saved, content):
    (saved / checkpoints.CONFIG).write_text(content)
    with pytest.raises(CheckpointError, match="was not written by vistok"):
        vistok.load(saved)


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no saved model"):
        vistok.load(tmp_path)


def test_truncated_weights_are_refused(saved):
    weights = saved / checkpoints.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        vistok.load(saved)


def test_absent_weights_are_refused(saved):
    (saved / checkpoints.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no weights file"):
        vistok.load(saved)


def test_weights_that_do_not_fit_the_config_are_listed(saved):
    edit_config(saved, arguments=to_json(ARGUMENTS["llama"] | {"num_layers": 3, "num_classes": 7}))
    with pytest.raises(CheckpointError, match=r"missing: blocks\.2.*another shape: class_embedding\.weight \(6, 16\)"):
        vistok.load(saved)


def test_failed_load_leaves_the_model_as_it_was():
    model = tiny("llama")
    before = model.fingerprint()
    state = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    state["output.weight"] = torch.zeros(1, 1)
    with pytest.raises(CheckpointError):
        checkpoints.load_strictly(model, state)
    assert model.fingerprint() == before


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(torch.nan), "1 with NaN or infinities: output.weight"),
        (torch.tensor(-torch.inf), "1 with NaN or infinities: output.weight"),
        (torch.tensor(3, dtype=torch.int32), "1 of another kind: output.weight torch.int32 instead of torch.float32"),
        (torch.tensor(True), "1 of another kind: output.weight torch.bool"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(value, message):
    model = tiny("llama")
    before = model.fingerprint()
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_strictly(model, model.state_dict() | {"output.weight": value.expand(32, 16)})
    assert model.fingerprint() == before


def test_half_precision_weights_fit_and_a_buffer_may_hold_infinities():
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.zeros(2))
            self.weight = torch.nn.Parameter(torch.zeros(2))

    model, mask = Masked(), torch.tensor([0.0, -torch.inf])
    checkpoints.load_strictly(model, {"mask": mask, "weight": torch.ones(2, dtype=torch.bfloat16)})
    assert torch.equal(model.mask, mask)
    with pytest.raises(CheckpointError, match="1 with NaN or infinities: mask"):
        checkpoints.load_strictly(model, {"mask": mask * torch.nan, "weight": torch.ones(2)})


def fill_the_disk(monkeypatch) -> None:
    def save_half(state, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vistok.checkpoints.model.save_file", save_half)


def test_what_is_renamed_is_on_the_disk_before(tmp_path, monkeypatch):
    def inode(path: Path) -> int:
        return path.stat().st_ino

    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("rename"), replace(old, new)))
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "weights").write_bytes(b"weights")
    model = tmp_path / "model"
    assert events == [inode(model / "weights"), inode(model), "rename", inode(tmp_path)]
    events.clear()
    write_json(tmp_path / "record.json", {})
    assert events == [inode(tmp_path / "record.json"), "rename", inode(tmp_path)]
    events.clear()
    with atomic_file(tmp_path / "000001.png", durable=False) as partial:
        partial.write_bytes(b"one image of thousands")
    assert events == ["rename"]


def test_full_disk_leaves_the_old_model_and_nothing_half_written(saved, monkeypatch):
    before = vistok.load(saved).fingerprint()
    fill_the_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        tiny("llama", num_classes=9).save_pretrained(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert vistok.load(saved).fingerprint() == before


def test_full_disk_leaves_no_folder_where_there_was_none(tmp_path, monkeypatch):
    fill_the_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        tiny("llama").save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_saving_replaces_the_whole_folder(saved):
    (saved / "old-card.md").write_text("of the old model")
    tiny("vit_vqgan").save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == [checkpoints.CONFIG, checkpoints.WEIGHTS]
    assert isinstance(vistok.load(saved), Tokenizer)


@pytest.mark.parametrize("source", ["someone/some-model", "FoundationVision/LlamaGen/c2i_B_256.pt"])
def test_unreachable_hub_is_said(source, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be fetched from the hub"):
        vistok.load(source, cache_dir=tmp_path)


@pytest.mark.parametrize("source", ["no-such-folder", "a/b/c/d"])
def test_neither_folder_nor_hub_id_is_said(source):
    with pytest.raises(CheckpointError, match="not a hub id"):
        vistok.load(source)


def test_atomic_folder_refuses_an_existing_one_before_any_work(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"), atomic_folder(tmp_path / "there"):
        pytest.fail("the block must not run")


def interrupted_write(path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("{")
        raise KeyboardInterrupt


def test_interrupted_file_keeps_its_old_content(tmp_path):
    write_json(tmp_path / "file.json", {"old": 1})
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(tmp_path / "file.json")
    assert json.loads((tmp_path / "file.json").read_text()) == {"old": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_nan_is_not_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", names("tokenizer"))
def test_loaded_tokenizer_computes_the_same(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path / "model")
    loaded, images = vistok.load(tmp_path / "model"), pixels(model)
    tokens = model.encode(images)
    assert torch.equal(loaded.encode(images), tokens)
    if not model.renders:
        return
    draws = model.decoding_draws(Keys.range(0, len(images)))
    options = {"draws": draws} if draws else {}
    with torch.no_grad():
        assert torch.equal(loaded.decode(tokens, **options), model.decode(tokens, **options))
