"""Official checkpoints: every released file's key list fits the full-size model, and files are read safely."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from golden.harness import Case
from safetensors.torch import save_file
from support.key_lists import FOLDER, KNOWN_IDS, build, on_meta, read_key_list
from torch import Tensor

import vistok
from vistok.checkpoints import CheckpointError, Model, convert, known_config, load_strictly, registry, unwrap

GOLDEN = Path(__file__).parents[1] / "golden"
KEY_LISTS = sorted(FOLDER.glob("*.json.gz"))

UNLISTED = {"AILab-CVC/seed-tokenizer-2/seed_quantizer.pt"}
"""Released files whose keys are known by their naming alone."""

TRAINING_ONLY = ("prior_model.", "semantic_model.")
"""Parts of released files that belong to a loss of training: the model is built without them."""


@pytest.fixture(scope="module", params=KEY_LISTS, ids=lambda path: path.name.removesuffix(".json.gz"))
def listed(request) -> dict:
    return read_key_list(request.param)


@pytest.fixture(scope="module")
def full_size(listed) -> Model:
    return build(listed, on_meta(listed["state"]))


def test_key_list_fits_the_full_size_model(listed, full_size):
    left_out = sum(math.prod(shape) for key, shape in listed["state"].items() if key.startswith(TRAINING_ONLY))
    assert sum(parameter.numel() for parameter in full_size.parameters()) == listed["parameters"] - left_out


def test_surplus_of_the_file_is_dropped_and_unknown_keys_are_named(listed):
    surplus = {"freqs_cis": [257, 32, 2]} if listed["model"] == "llamagen/gpt" else {}
    surplus |= listed.get("surplus_in_file", {})
    if listed["system"] == "vit_vqgan":
        surplus |= {"loss.discriminator.final_linear.1.bias": [1], "loss.perceptual_loss.lin0.model.1.weight": [1, 64]}
    build(listed, on_meta(listed["state"] | surplus))
    with pytest.raises(CheckpointError, match=r"1 surplus: encoder\.teacher\.weight"):
        build(listed, on_meta(listed["state"] | {"encoder.teacher.weight": [3]}))


def test_missing_and_misshapen_keys_are_named(listed):
    (key, shape), (absent, _) = [item for item in listed["state"].items() if item[0] not in listed["buffers"]][:2]
    wrong = listed["state"] | {key: [size + 1 for size in shape]}
    del wrong[absent]
    with pytest.raises(CheckpointError, match=r"(?s)1 missing.*1 of another shape"):
        build(listed, on_meta(wrong))


def test_checkpoint_table_knows_the_file_and_its_arguments(listed, full_size):
    assert listed["id"] in KNOWN_IDS
    entry = registry.official_entry(listed["model"])
    config = known_config(entry, listed["id"])
    assert build(listed | {"config": config}, on_meta(listed["state"])).config == full_size.config


def test_every_released_checkpoint_has_a_key_list():
    assert {read_key_list(path)["id"] for path in KEY_LISTS} == KNOWN_IDS - UNLISTED


RELEASED = [checkpoint for item in registry.ENTRIES for _, checkpoint in item.released()]
PAIRS = {checkpoint.tokenizer: checkpoint.id for checkpoint in RELEASED if checkpoint.tokenizer}
"""A released generator by the id of the tokenizer that it goes with."""


@pytest.fixture(scope="module")
def lists_by_id() -> dict[str, dict]:
    return {listed["id"]: listed for listed in map(read_key_list, KEY_LISTS)}


@pytest.mark.parametrize("tokenizer", PAIRS)
def test_tokenizer_and_generator_that_go_together_agree_on_the_tokens(tokenizer, lists_by_id):
    parts = [lists_by_id[name] for name in (tokenizer, PAIRS[tokenizer])]
    tokens, modelled = (build(listed, on_meta(listed["state"])).spec for listed in parts)
    assert (tokens.codebook_size, tokens.depth) == (modelled.codebook_size, modelled.depth)
    assert tokens.discrete or tokens.dim == modelled.dim
    assert tokens.grid is not None or tokens.length == modelled.length


def test_every_generator_that_is_released_has_a_tokenizer():
    generators = [item for item in registry.ENTRIES if item.kind == "generator"]
    alone = [
        checkpoint.id
        for item in generators
        for _, checkpoint in item.released()
        if checkpoint.tokenizer not in KNOWN_IDS
    ]
    # Its tokenizer is the same file as that of the others, at 512 px, which its config must state.
    assert alone == ["FoundationVision/var/var_d36.pth"]


# ---------------------------------------------------------------------------------------------------------------------
# Reading files


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(GOLDEN / "cases" / "llamagen_gpt_c2i")


def write_torch(content, **options) -> callable:
    def write(folder: Path, state: dict[str, Tensor]) -> Path:
        torch.save(content(state), folder / "weights.pt", **options)
        return folder / "weights.pt"

    return write


def write_safetensors(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def as_fsdp(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with attributes pickle through another rebuild function; the largest released files are of this kind."""
    state = {key: tensor.clone() for key, tensor in state.items()}
    for tensor in state.values():
        tensor.shard = 0
    return state


def write_shards(folder: Path, state: dict[str, Tensor]) -> Path:
    """Two safetensors files with their index."""
    names = {key: f"model-{1 + number % 2:05d}-of-00002.safetensors" for number, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: tensor for key, tensor in state.items() if names[key] == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index


FILES = {
    "shards": write_shards,
    "bare": write_torch(lambda state: state),
    "before 1.6": write_torch(lambda state: state, _use_new_zipfile_serialization=False),
    "data parallel": write_torch(lambda state: {"model": state, "steps": 10, "args": argparse.Namespace(lr=1e-4)}),
    "deepspeed": write_torch(lambda state: {"module": {f"module.{key}": t for key, t in state.items()}}),
    "compiled": write_torch(lambda state: {"model": {f"_orig_mod.{key}": t for key, t in state.items()}}),
    "lightning": write_torch(lambda state: {"state_dict": state, "epoch": 3, "lr_schedulers": []}),
    "fsdp": write_torch(as_fsdp),
    "rotary table": write_torch(lambda state: state | {"freqs_cis": torch.zeros(17, 8, 2)}),
    "used cache": write_torch(lambda state: state | {"layers.0.attention.kv_cache.k_cache": torch.zeros(2, 4, 24, 16)}),
    "safetensors": write_safetensors,
}


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_convert_reads_every_kind_of_file(write, tmp_path, case):
    model = convert("llamagen/gpt", write(tmp_path, case.state), case.config)
    assert model.fingerprint() == case.build_model().fingerprint()


def rewritten(index: Path, change) -> Path:
    """An index after ``change`` of its file names."""
    content = json.loads(index.read_text())
    content["weight_map"] = change(content["weight_map"])
    index.write_text(json.dumps(content))
    return index


def test_shards_that_do_not_fit_their_index_are_refused(tmp_path, case):
    index = write_shards(tmp_path, case.state)
    first, *others = json.loads(index.read_text())["weight_map"]
    before = index.read_text()
    for change, message in (
        (lambda names: names | {first: "../elsewhere.safetensors"}, r"no safetensors file beside it"),
        (lambda names: names | {first: "weights.bin"}, r"weights\.bin', which is no safetensors file"),
        (lambda names: names | {"invented": names[first]}, r"lack: model-00001-of-00002\.safetensors: invented"),
        (lambda names: {key: names[key] for key in others}, r"does not name: model-00001"),
        (lambda names: list(names), r"no safetensors file beside it"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert("llamagen/gpt", rewritten(index, change), case.config)
        index.write_text(before)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not beside it: model-00002-of-00002\.safetensors; fetch them too"):
        convert("llamagen/gpt", index, case.config)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="no index of safetensors files"):
        convert("llamagen/gpt", index, case.config)


def test_a_file_of_tokenizer_and_generator_gives_both(tmp_path):
    case = Case(GOLDEN / "cases" / "mingtok_univision_t2i")
    index = write_shards(tmp_path, case.state)
    generator = convert("ming_univision/generator", index, case.config)
    tokenizer = convert("mingtok/tokenizer", index, case.config["mingtok"])
    assert generator.spec == tokenizer.spec
    assert generator.feature_dim == tokenizer.raster_features["semantic"]


@pytest.mark.parametrize("with_counter", [True, False])
def test_usage_counter_of_the_tokenizer_may_be_absent(with_counter):
    case = Case(GOLDEN / "cases" / "llamagen_vq16")
    state = {key: t for key, t in case.state.items() if with_counter or key != "quantize.codebook_used"}
    assert vistok.from_official(case.model, case.config, state).fingerprint() == case.build_model().fingerprint()


def test_stage_2_checkpoint_gives_its_transformer(tmp_path):
    case = Case(GOLDEN / "cases" / "vit_vqgan_gpt")
    state = {f"transformer.{key}": tensor for key, tensor in case.state.items()}
    torch.save({"state_dict": state | {"stage1_model.pre_quant.bias": torch.zeros(32)}}, tmp_path / "last.ckpt")
    converted = convert("vit_vqgan/gpt", tmp_path / "last.ckpt", case.config)
    assert converted.fingerprint() == case.build_model().fingerprint()


def test_truncated_safetensors_is_refused(tmp_path, case):
    file = write_safetensors(tmp_path, case.state)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        convert("llamagen/gpt", file, case.config)


def test_truncated_torch_file_is_refused(tmp_path, case):
    file = FILES["bare"](tmp_path, case.state)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        convert("llamagen/gpt", file, case.config)


class Foreign:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_foreign_object_is_not_unpickled(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": case.state, "args": Foreign()}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"pickles a getattr .* state dict alone") as error:
        convert("llamagen/gpt", tmp_path / "weights.pt", case.config)
    assert not Path("touched").exists()
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.module."])
def test_wrappings_are_taken_off_in_any_order(prefix):
    state = {"blocks.0.weight": torch.zeros(2), "module_list.bias": torch.zeros(1)}
    wrapped = {f"{prefix}{key}": tensor for key, tensor in state.items()}
    for nested in (wrapped, {"model": wrapped}, {"state_dict": {"model": wrapped}}, {"model": {"state_dict": wrapped}}):
        assert unwrap(nested).keys() == state.keys()


def test_file_without_weights_lists_what_it_holds(tmp_path, case):
    torch.save({"optimizer": {}, "epoch": 3}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"\['epoch', 'optimizer'\]"):
        convert("llamagen/gpt", tmp_path / "weights.pt", case.config)


def test_unknown_file_name_needs_arguments(tmp_path, case):
    file = FILES["bare"](tmp_path, case.state)
    with pytest.raises(CheckpointError, match=r"'weights\.pt' is not the name of a released"):
        convert("llamagen/gpt", file)


def test_absent_file(case):
    with pytest.raises(CheckpointError, match=r"no weights file nowhere\.pt"):
        convert("llamagen/gpt", "nowhere.pt", case.config)


def test_unknown_system_gets_a_hint(case):
    with pytest.raises(registry.UnknownModelError, match="did you mean 'llamagen/gpt'"):
        vistok.from_official("lamagen/gpt", case.config, case.state)


@pytest.mark.parametrize(("name", "value"), [("ffn_dim_multiplier", 1.3), ("drop_path_rate", 0.1)])
def test_options_of_no_released_llama_are_refused(case, name, value):
    with pytest.raises(CheckpointError, match=name):
        vistok.from_official(case.model, case.config | {name: value}, case.state)


def test_a_wrong_file_of_the_right_kind_is_refused(case):
    other = Case(GOLDEN / "cases" / "llamagen_gpt_t2i")
    with pytest.raises(CheckpointError, match="class_embedding"):
        vistok.from_official(case.model, case.config, other.state)


def test_two_tensors_of_one_name_are_refused_and_aliases_are_not():
    first, second = torch.zeros(2), torch.ones(2)
    with pytest.raises(CheckpointError, match=r"weight and module\.weight are two tensors for weight"):
        unwrap({"weight": first, "module.weight": second})
    assert unwrap({"weight": first, "module.weight": first}) == {"weight": first}


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (torch.ones(2, dtype=torch.float64) * 1e60, "NaN or infinities"),
        (torch.ones(2).to_sparse(), "not stored as plain numbers"),
        (torch.ones(2, device="meta"), "without values"),
        (torch.ones(2, dtype=torch.complex64), "another kind"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "another kind"),
    ],
)
def test_tensors_that_are_no_plain_finite_numbers_are_refused(tensor, told):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=told):
        load_strictly(model, model.state_dict() | {"bias": tensor})


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, dtype=torch.float64), torch.ones(1).expand(2), torch.ones(2).to(torch.float8_e4m3fn)]
)
def test_other_precisions_and_views_are_read(tensor):
    model = torch.nn.Linear(2, 2)
    load_strictly(model, model.state_dict() | {"bias": tensor})
    assert model.bias.tolist() == [1, 1]
