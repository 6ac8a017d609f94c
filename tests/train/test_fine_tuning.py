"""Fine-tuning from other models and other classes, of all weights or by low-rank adapters."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.released import tiny_tokenizer, write_generator
from support.tiny_models import ARGUMENTS, names, randomise, tiny, training_loss
from support.tiny_runs import generator_config, tokenizer_config

import vistok
from vistok.checkpoints import CheckpointError, convert
from vistok.checkpoints.adapters import ADAPTER, merged
from vistok.config import load_config
from vistok.data import DataConfig
from vistok.signatures import ConfigError
from vistok.train import train
from vistok.train.config import InitFrom, LoraConfig
from vistok.train.lora import add_adapters
from vistok.train.start import Start, initialise
from vistok.train.tokenize import tokenize
from vistok.utils.files import read_json

QUICK = {"max_steps": 2, "batch_size": 4, "ema_decay": 0.0, "log_every": 1, "save_every": 2, "image_every": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted generator of 1,000 classes, and a token cache of digits with ten classes."""
    folder = tmp_path_factory.mktemp("source")
    file, config = write_generator(folder)
    convert("llamagen/gpt", file, read_json(config)).save_pretrained(folder / "gpt")
    tokenize(tiny_tokenizer(), DataConfig(32, source="digits", limit=20), folder / "tokens")
    return folder


def fine_tuning(run, folder, **changes) -> dict:
    config = generator_config(run, folder / "tokens", init_from=str(folder / "gpt"), training=QUICK, **changes)
    return {key: value for key, value in config.items() if key != "model"}


def test_a_generator_of_other_classes_is_trained_on(folder, tmp_path, caplog):
    still = {"optimizer": {"lr": 0.0}}
    run = train(fine_tuning(tmp_path / "run", folder, **still))
    assert "has 1000 classes and this run 10: those of class_embedding.weight begin anew" in caplog.text
    found, source = vistok.load(run), vistok.load(folder / "gpt")
    assert (found.num_classes, source.num_classes) == (10, 1000)
    theirs, ours = source.state_dict(), found.state_dict()
    assert torch.equal(ours.pop("class_embedding.weight")[10], theirs.pop("class_embedding.weight")[1000])  # the null
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert load_config(run / "config.yaml")["model"]["dim"] == 32
    pipe = vistok.pipeline(run)
    assert pipe.class_names == tuple("0123456789")


@pytest.mark.parametrize("name", [name for name in names("generator") if "num_classes" in ARGUMENTS[name]])
def test_rows_that_are_no_classes_stay(name):
    source, model = tiny(name), tiny(name, num_classes=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    start = Start(InitFrom("x"), {"model": name, "arguments": source.config}, source)
    tables = initialise(model, [start])
    assert tables
    first, old, new = model.class_rows_from, source.state_dict(), model.state_dict()
    for key in tables:
        assert (new[key][first : first + 8] == 7).all()
        kept = torch.cat([new[key][:first], new[key][first + 8 :]])
        assert torch.equal(kept, torch.cat([old[key][:first], old[key][first + 5 :]]))


def test_another_system_is_said_so_before_data_are_read(folder, tmp_path):
    config = generator_config(tmp_path / "run", tmp_path / "nowhere", init_from=str(folder / "gpt"))
    config["model"] = {"name": "var"}
    with pytest.raises(CheckpointError, match="is a llama, but the model of this run is a var: leave model out"):
        train(config)
    with pytest.raises(CheckpointError, match=r"did you mean FoundationVision/LlamaGen/c2i_B_256\.pt"):
        train(config | {"init_from": "FoundationVision/LlamaGen/c2i_B_25.pt"})
    assert not (tmp_path / "run").exists()


def test_weights_alone_do_not_say_their_model(folder, tmp_path):
    config = fine_tuning(tmp_path / "run", folder) | {"init_from": str(folder / "gpt" / "model.safetensors")}
    with pytest.raises(ConfigError, match=r"holds weights alone, so the config has to say model\.name"):
        train(config)


@pytest.mark.parametrize("name", [*names("tokenizer"), *names("generator")])
def test_whatever_reads_a_weight_reads_the_adapted_one(name):
    """Some layers are fused, packed or read by their weight: an adapter of the layer's call would be missed there."""
    adapted, plain = tiny(name), tiny(name)
    add_adapters(adapted, LoraConfig(rank=2, alpha=4.0))
    randomise(adapted)
    plain.load_state_dict(merged(adapted.state_dict()))
    assert torch.allclose(training_loss(adapted), training_loss(plain), rtol=1e-4)


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_and_new_classes_are_all_that_is_trained(folder, tmp_path, merge):
    lora = {"rank": 2, "alpha": 4.0, "targets": ["*.attn.*"], "merge": merge}
    config = fine_tuning(tmp_path / "run", folder, optimizer={"lr": 0.1})
    config["training"] = QUICK | {"lora": lora}
    run = train(config)
    assert (run / "generator" / ADAPTER).exists() != merge
    found, source = vistok.load(run).state_dict(), vistok.load(folder / "gpt").state_dict()
    changed = {
        key for key in found if found[key].shape != source[key].shape or not torch.equal(found[key], source[key])
    }
    assert changed == {"class_embedding.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.out.weight"}
    delta = found["blocks.0.attn.out.weight"] - source["blocks.0.attn.out.weight"]
    assert torch.linalg.matrix_rank(delta, rtol=1e-3) <= 2
    step = vistok.load(run / "checkpoints" / "step-0000002")
    assert all(torch.allclose(tensor, found[key], atol=1e-6) for key, tensor in step.state_dict().items())
    assert vistok.pipeline(run)(["3"], seed=1).labels == [3]


def test_an_adapter_that_is_kept_apart_is_pefts(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = vistok.load(folder / "gpt")
    add_adapters(model, LoraConfig(rank=2, alpha=8.0, targets=("*.ffn.*",), merge=False))
    randomise(model)
    model.save_pretrained(tmp_path / "adapted")
    base = type(model)(**model.config)
    base.load_state_dict(load_file(tmp_path / "adapted" / "model.safetensors"))
    wrapped = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapted"))
    theirs = wrapped.merge_and_unload().state_dict()
    for key, tensor in vistok.load(tmp_path / "adapted").state_dict().items():
        assert torch.allclose(tensor, theirs[key], atol=1e-6), key


def test_a_tokenizer_is_adapted_too(tmp_path):
    first = train(tokenizer_config(tmp_path / "first", training={"max_steps": 1, "image_every": 0}))
    lora = {"max_steps": 2, "image_every": 0, "lora": {"rank": 2, "targets": ["decoder.*"]}}
    config = tokenizer_config(tmp_path / "run", init_from=str(first), training=lora)
    del config["model"]
    run = train(config)
    before, after = vistok.load(first).state_dict(), vistok.load(run).state_dict()
    changed = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder"}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["decodr.*"]}, r"training\.lora\.targets: no layer is called 'decodr\.\*'"),
        ({"also": ["nothing"]}, r"training\.lora\.also: no parameter is called 'nothing'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"ranks": 4}, r"did you mean training\.lora\.rank"),
    ],
)
def test_bad_adapters_are_refused(tmp_path, lora, message):
    with pytest.raises(ConfigError, match=message):
        train(tokenizer_config(tmp_path / "run", training={"lora": lora}))
