"""Training on two processes computes the numbers of one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import wait_until
from support.tiny_models import names, tiny, training_loss
from support.tiny_runs import GAN, generator_config, tokenizer_config, write_tokens
from torch import distributed

import vistok
from vistok.checkpoints import CheckpointError
from vistok.config import save_config
from vistok.signatures import ConfigError
from vistok.train import train
from vistok.train.config import OptimizerConfig
from vistok.train.monitor import read_metrics
from vistok.train.optim import build_optimizer
from vistok.train.parallel import load_named_state, named_state, shard

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version=2", "--num_processes=2")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run on one process."""
    return train(config(tmp_path_factory.mktemp("one") / "run"))


def remedies(folder: Path, batch_size: int, **training) -> dict:
    """A run with restart of dead codes and an entropy loss, which both use the whole batch."""
    return tokenizer_config(
        folder,
        model={"codebook_restart_after": 1, "entropy_temperature": 0.1},
        losses={"entropy": 0.5},
        data={"batch_size": batch_size},
        training={"gradient_accumulation_steps": 2, "image_every": 0, "save_every": 0, **training},
    )


def config(folder: Path, **training) -> dict:
    # No batch statistics; the adaptive weight is a ratio of local gradients, so it is left out.
    gan = GAN | {"balance": "fixed", "discriminator": {"name": "patchgan", "width": 4, "num_layers": 1, "norm": "none"}}
    return tokenizer_config(
        folder,
        losses={"gan": gan},
        training={"gradient_accumulation_steps": 2, **training},
        validation={"data": {"split": "test", "limit": 30}},
    )


def launch(launcher: tuple[str, ...], folder: Path, *options: str, **training) -> None:
    """Train on two processes, half the batch on each."""
    halved = config(folder, **training)
    halved["data"]["batch_size"] //= 2
    run_processes(launcher, halved, *options)


def run_processes(launcher: tuple[str, ...], values: dict, *options: str) -> None:
    folder = Path(values["output_dir"])
    save_config(values, folder.with_suffix(".yaml"))
    command = [*launcher, "-m", "vistok", "train", str(folder.with_suffix(".yaml")), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stderr[:4000]}\n…\n{done.stderr[-1000:]}"


def assert_same_curves(one: Path, two: Path) -> None:
    curves = [read_metrics(folder / "metrics.jsonl") for folder in (one, two)]
    assert len(curves[0]) == len(curves[1])
    for name in ("loss", "d_loss", "psnr", "entropy", "grad_norm", "codebook_usage"):
        ours, theirs = ([row[name] for row in rows if name in row] for rows in curves)
        assert theirs == pytest.approx(ours, rel=1e-4), name
    ours, theirs = ({row["step"]: row["val_loss"] for row in rows if "val_loss" in row} for rows in curves)
    both = ours.keys() & theirs.keys()  # the steps at which both runs saved a checkpoint
    assert bool(both) == bool(ours)
    assert [theirs[step] for step in both] == pytest.approx([ours[step] for step in both], rel=1e-4)


def test_two_processes_train_like_one(tmp_path, one):
    launch(TORCHRUN, tmp_path / "two")
    assert_same_curves(one, tmp_path / "two")


def with_batch_statistics(folder: Path, batch_size: int) -> dict:
    """A run whose adversary has batch norms, LeCam's averages and an adaptive weight."""
    gan = GAN | {"lecam_weight": 0.1, "lecam_compare": "batch_means"}
    return tokenizer_config(folder, losses={"gan": gan}, data={"batch_size": batch_size})


def test_statistics_of_a_batch_are_those_of_all_processes(tmp_path):
    one = train(with_batch_statistics(tmp_path / "one", 16))
    run_processes(TORCHRUN, with_batch_statistics(tmp_path / "two", 8))
    assert_same_curves(one, tmp_path / "two")
    ours, theirs = (
        torch.load(folder / "checkpoints" / "step-0000006" / "state.pt", weights_only=True)["players"]["adversary"]
        for folder in (one, tmp_path / "two")
    )
    for key, tensor in ours["weights"].items():
        assert torch.allclose(theirs["weights"][key].double(), tensor.double(), rtol=1e-3, atol=1e-5), key


def test_the_losses_of_three_processes_are_those_of_one_for_every_model():
    """With weights that differ from sample to sample, as unreadable ones have, and thus from process to process."""
    launcher = [*TORCHRUN[:-1], "--nproc_per_node=3"]
    done = subprocess.run(
        [*launcher, "-m", "support.parts"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    models = [*names("tokenizer"), *names("generator")]
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert [line.partition(": ")[0] for line in lines] == models
    assert [line for line in lines if not line.endswith(": the same")] == []


def test_dropout_is_keyed_by_process_and_all_else_by_sample(tmp_path):
    tokens = write_tokens(tmp_path / "tokens")

    def curve(name: str, processes: int, drop: float) -> list[float]:
        model = dict.fromkeys(("token_drop", "proj_drop", "ffn_drop"), drop) | {"condition_dropout": 0.5}
        training = {"max_steps": 2, "batch_size": 16 // processes, "image_every": 0}
        values = generator_config(tmp_path / name, tokens, model=model, training=training)
        if processes == 1:
            train(values)
        else:
            run_processes(TORCHRUN, values)
        return [row["grad_norm"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]

    assert curve("two", 2, 0.0) == pytest.approx(curve("one", 1, 0.0), rel=1e-4)
    assert curve("two with dropout", 2, 0.5) != pytest.approx(curve("one with dropout", 1, 0.5), rel=1e-3)


def test_fsdp2_trains_exports_one_file_and_resumes_in_any_setting(tmp_path, one):
    saving = {"save_every": 2, "keep_checkpoints": 3}
    launch(ACCELERATE, tmp_path / "two", **saving)
    assert_same_curves(one, tmp_path / "two")
    exported = tmp_path / "two" / "tokenizer"
    assert sorted(path.name for path in exported.iterdir()) == ["config.json", "model.safetensors"]
    whole = load_file(one / "tokenizer" / "model.safetensors")
    for key, tensor in load_file(exported / "model.safetensors").items():
        assert torch.allclose(tensor, whole[key], atol=1e-5), key
    assert vistok.load(exported).reconstruct(torch.zeros(1, 1, 16, 16)).isfinite().all()

    go_back_to(2, tmp_path / "two")
    train(config(tmp_path / "two", **saving), resume=True)  # on one process
    assert_same_curves(one, tmp_path / "two")
    go_back_to(4, tmp_path / "two")
    launch(TORCHRUN, tmp_path / "two", "--resume", parallel="fsdp2", activation_checkpointing=True, **saving)
    assert_same_curves(one, tmp_path / "two")


def go_back_to(step: int, run: Path) -> None:
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_remedies_of_a_dying_codebook_see_the_whole_batch(tmp_path, parallel):
    one = train(remedies(tmp_path / "one", 16))
    run_processes(TORCHRUN, remedies(tmp_path / "two", 8, parallel=parallel))
    assert_same_curves(one, tmp_path / "two")
    codebook = "quantizer.embedding.weight"
    ours, theirs = (load_file(tmp_path / run / "tokenizer/model.safetensors")[codebook] for run in ("one", "two"))
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_sigterm_stops_all_processes_at_one_step(tmp_path):
    endless = config(tmp_path / "two", max_steps=100_000, save_every=0, image_every=0)
    endless["data"]["num_workers"] = 1  # torchrun also signals the loader's processes
    save_config(endless, tmp_path / "two.yaml")
    command = [*TORCHRUN, "-m", "vistok", "train", str(tmp_path / "two.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "two" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and bool(read_metrics(metrics)), process)
    for child in children(process):  # as schedulers signal all processes; torchrun also forwards its signal
        os.kill(child, signal.SIGTERM)
    process.terminate()
    _, printed = process.communicate(timeout=120)
    [saved] = (tmp_path / "two" / "checkpoints").glob("step-*")
    assert int(saved.name[5:]) == read_metrics(metrics)[-1]["step"]
    assert "stopped by SIGTERM after step" in printed


@pytest.mark.parametrize("option", ["--dry-run", "--profile"])
def test_what_does_not_train_speaks_once_per_job(tmp_path, option):
    save_config(config(tmp_path / "run"), tmp_path / "run.yaml")
    command = [*TORCHRUN, "-m", "vistok", "train", str(tmp_path / "run.yaml"), option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stderr[:4000]}\n…\n{done.stderr[-1000:]}"
    what = "The first batch is in" if option == "--dry-run" else "the trace is in"
    assert done.stdout.count(what) == 1


def children(process: subprocess.Popen) -> list[int]:
    """Where the system lists them."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in listed.read_text().split()] if listed.exists() else []


def test_the_optimizer_state_of_other_parameters_is_refused():
    frozen, trained = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    frozen.bias.requires_grad_(False)
    optimizers = [build_optimizer(model.named_parameters(), OptimizerConfig()) for model in (frozen, trained)]
    with pytest.raises(CheckpointError, match="other parameters"):
        load_named_state(
            optimizers[1],
            trained,
            dict(trained.named_parameters()),
            named_state(optimizers[0], frozen, dict(frozen.named_parameters())),
        )


@pytest.fixture
def _process_group():
    """Of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
@pytest.mark.filterwarnings("error:.*returned a view")
def test_fsdp2_gives_every_model_the_gradients_of_autocast():
    for name in (*names("tokenizer"), *names("generator")):
        whole, sharded = (tiny(name).train() for _ in range(2))
        shard(sharded, torch.device("cpu"), mixed_precision="bf16")
        expected, found = (gradients(model) for model in (whole, sharded))
        assert found.keys() == expected.keys()
        for key, gradient in found.items():
            assert gradient.dtype == torch.float32
            assert torch.allclose(gradient.full_tensor(), expected[key], rtol=1e-5, atol=1e-6), (name, key)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        training_loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("_process_group")
def test_blocks_are_gathered_in_bfloat16_and_codebooks_as_they_are():
    seen = {}
    model = shard(tiny("vit_vqgan").train(), torch.device("cpu"), mixed_precision="bf16")
    for name in ("encoder.blocks.0.mlp.up", "encoder.blocks.0.norm1", "quantizer.embedding"):
        model.get_submodule(name).register_forward_hook(
            lambda module, *_, name=name: seen.update({name: module.weight.dtype})
        )
    with torch.autocast("cpu", torch.bfloat16):
        training_loss(model)
    assert list(seen.values()) == [torch.float32, torch.bfloat16, torch.float32]


def test_a_launcher_of_another_precision_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match=r"launch says mixed precision bf16, the config no.*mixed_precision=bf16"):
        train(tokenizer_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    train(tokenizer_config(tmp_path / "run", training={"mixed_precision": "bf16", "max_steps": 1}))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what accelerate launch sets without the option
    train(tokenizer_config(tmp_path / "other", training={"mixed_precision": "bf16", "max_steps": 1}))


def test_fsdp2_refuses_what_it_cannot_do(tmp_path):
    adaptive = tokenizer_config(tmp_path / "run", losses={"gan": GAN}, training={"parallel": "fsdp2"})
    with pytest.raises(ConfigError, match=r"balance=adaptive .* FSDP2"):
        train(adaptive)
