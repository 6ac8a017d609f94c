"""Processes that are killed while they replace folders: before each call that changes one, and at seeded moments.

``VISTOK_KILLS=200 pytest tests/train/test_kills.py`` kills as often at seeded moments; 3 times without the variable.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny
from support.tiny_runs import losses_of, saved_steps, tokenizer_config
from torch import Tensor

import vistok
from vistok.checkpoints.weights import read_weights
from vistok.cli import main
from vistok.data import DataConfig, TokenCache
from vistok.pipelines.folders import read_settings, write_pipeline
from vistok.text import PromptEncoder
from vistok.train import train
from vistok.train.checkpoints import Checkpoints, clean
from vistok.train.config import LoraConfig
from vistok.train.lora import add_adapters
from vistok.train.tokenize import tokenize
from vistok.utils import files
from vistok.utils.files import restore
from vistok.utils.outputs import unfinished

KILLS = int(os.environ.get("VISTOK_KILLS", "3"))
KEPT = 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that was forked off"),
]


class Replacement:
    """Something that is replaced again and again, and a look at it after a kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.old, self.new = self.make(0.0), self.make(1.0)

    def make(self, fill: float) -> vistok.Model:
        model = tiny("vit_vqgan")
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, fill)
        return model

    def begin(self) -> None:
        """What is there before."""
        self.replace(self.old)

    def replace(self, model: vistok.Model) -> None:
        model.save_pretrained(self.folder / "tokenizer")

    def check(self) -> float:
        """What is there: all old, or all new, as the value that fills it."""
        return filling(vistok.load(self.folder / "tokenizer").state_dict())

    def repair(self) -> None:
        """What the next command does first."""
        clean(self.folder)

    def leftovers(self) -> list[Path]:
        return [path for path in self.folder.rglob(".*") if path.name.endswith((".partial", ".old"))]


class AdapterBesideTheWeights(Replacement):
    """A model with an adapter, as a run that does not merge it exports it."""

    def make(self, fill: float) -> vistok.Model:
        model = super().make(fill)
        add_adapters(model, LoraConfig(rank=1, targets=("encoder.*",), merge=False))
        return model

    def check(self) -> float:
        value = super().check()
        assert (self.folder / "tokenizer" / "adapter_model.safetensors").is_file()
        assert (self.folder / "tokenizer" / "adapter_config.json").is_file()
        return value


class WholePipeline(Replacement):
    """A pipeline, whose parts are of one time."""

    def replace(self, model: vistok.Model) -> None:
        names = ["old" if model is self.old else "new"]
        write_pipeline(
            self.folder / "pipe", {"tokenizer": model}, PromptEncoder(), class_names=names, sampling={"top_k": 1}
        )

    def check(self) -> float:
        restore(self.folder)
        value = filling(vistok.load(self.folder / "pipe" / "tokenizer").state_dict())
        assert read_settings(self.folder / "pipe")["class_names"] == (("new",) if value else ("old",))
        return value


class PrunedCheckpoints(Replacement):
    """Checkpoints of which the newest two stay."""

    def begin(self) -> None:
        self.step = 0
        for _ in range(KEPT):
            self.replace(self.old)

    def replace(self, model: vistok.Model) -> None:
        self.step += 1
        self.checkpoints().save(self.step, {"weights": model.state_dict()}, {"loss": 1.0 - self.step / 1e6}, model)

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints", KEPT, None)

    def check(self) -> float:
        """Each folder that has the name of a checkpoint is a whole one."""
        steps = self.checkpoints().steps()
        assert len(steps) >= KEPT
        for step in steps:
            state = read_weights(self.checkpoints().path(step) / "state.pt")
            assert state["step"] == step
            filling(state["weights"])
            assert (self.checkpoints().path(step) / "config.json").is_file()
        state = self.checkpoints().load()
        assert state is not None
        return filling(state["weights"])

    def repair(self) -> None:
        state = self.checkpoints().load()
        assert state is not None
        self.step = state["step"]
        self.checkpoints().judge_again(state)
        self.checkpoints().prune()
        super().repair()
        assert len(self.checkpoints().steps()) == KEPT, "no checkpoint too many stays"


REPLACEMENTS = [Replacement, AdapterBesideTheWeights, WholePipeline, PrunedCheckpoints]


def filling(state: dict[str, Tensor]) -> float:
    """The one value of all weights."""
    ends = [tensor.aminmax() for tensor in state.values()]
    (value,) = {float(end) for pair in ends for end in pair}
    return value


def forked(work: Callable[[], object]) -> int:
    """The pid of a child that does the work and ends."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def dying_before(call: int, work: Callable[[], None], *, exchange: bool) -> Callable[[], None]:
    """The work of a process that is killed before its n-th call that changes a folder."""

    def patched() -> None:
        left = call

        def deadly(function: Callable) -> Callable:
            def killed_before(*arguments, **options):
                nonlocal left
                left -= 1
                if not left:
                    os._exit(9)
                return function(*arguments, **options)

            return killed_before

        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "chmod", "fsync"):
            setattr(os, name, deadly(getattr(os, name)))
        files._exchange = deadly(files._exchange) if exchange else lambda *_: False
        work()

    return patched


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_killed_before_each_call(tmp_path: Path, kind: type[Replacement], exchange: bool):
    begun = kind(tmp_path / "begun")
    begun.begin()
    seen = []
    for call in range(1, 200):
        there = kind(tmp_path / str(call))
        shutil.copytree(begun.folder, there.folder)
        vars(there).update({name: value for name, value in vars(begun).items() if name == "step"})
        work = dying_before(call, partial(there.replace, there.new), exchange=exchange)
        _, status = os.waitpid(forked(work), 0)
        assert os.waitstatus_to_exitcode(status) in (0, 9)
        seen.append(there.check())
        there.repair()
        assert there.check() == seen[-1]
        there.replace(there.new)
        assert there.check() == 1.0
        there.repair()
        assert not there.leftovers()
        if not status:
            break
    assert not status, "the last one must not be killed"
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert seen == sorted(seen), "once the new one is there, it stays"


@contextmanager
def working(work: Callable[[], None]) -> Iterator[int]:
    """A child that does the work again and again, killed at the end."""

    def again_and_again() -> None:
        while True:
            work()

    pid = forked(again_and_again)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "it ended by itself"


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_killed_at_seeded_moments(tmp_path: Path, kind: type[Replacement]):
    moment, there = random.Random(kind.__name__), kind(tmp_path / "there")
    there.begin()

    def replace() -> None:
        there.replace(there.old)
        there.replace(there.new)

    for _ in range(KILLS):
        with working(replace):
            time.sleep(moment.random() * 0.1)
        before = there.check()
        there.repair()
        assert there.check() == before
        assert not there.leftovers()


def test_tokenizing_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vistok.train.tokenize.SHARD_SIZE", 16)
    tokenizer, data = tiny("vit_vqgan"), DataConfig(16, source="digits", limit=100, batch_size=4)
    whole, every = tokenize(tokenizer, data, tmp_path / "whole"), [0] * 100
    moment = random.Random("tokens")

    def make_or_wait(out: Path) -> None:
        if out.exists():
            time.sleep(60)
        tokenize(tokenizer, data, out)

    for number in range(KILLS):
        out = tmp_path / str(number)
        with working(partial(make_or_wait, out)):
            time.sleep(moment.random() * 0.3)
        if not out.exists():
            tokenize(tokenizer, data, out, resume=unfinished(out).exists())
        cache = TokenCache(out)
        assert torch.equal(cache.batch(range(100), every)[0], whole.batch(range(100), every)[0])
        assert vistok.load(out / "tokenizer").fingerprint() == cache.tokenizer_hash
        assert sorted(path.name for path in out.rglob("*")) == sorted(
            path.name for path in (tmp_path / "whole").rglob("*")
        )


def test_a_command_removes_what_a_killed_one_left(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in ("vit_vqgan", "llama"):
        tiny(name).save_pretrained(tmp_path / name)
    out = tmp_path / "pipe"
    for name in (".pipe.abcd_123.partial", ".pipe.efgh4567.old", ".pipe.2.abcd_123.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["pipeline", str(tmp_path / "vit_vqgan"), str(tmp_path / "llama"), "--out", str(out)])
    assert not ended.value.code, capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".pipe.2.abcd_123.partial",
        "llama",
        "pipe",
        "vit_vqgan",
    ]


def test_training_that_is_killed_again_and_again_is_the_same(tmp_path: Path):
    def config(name: str) -> dict:
        training = {"max_steps": 12, "save_every": 1, "keep_checkpoints": 1, "image_every": 0}
        return tokenizer_config(tmp_path / name, training=training, validation={"data": {"split": "test", "limit": 20}})

    whole, part = train(config("whole")), tmp_path / "part"
    moment = random.Random("training")
    for _ in range(KILLS):
        pid = forked(partial(train, config("part"), resume=True))
        time.sleep(moment.random())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for step in saved_steps(part):
            assert read_weights(part / "checkpoints" / step / "state.pt")["step"] == int(step[5:])
        for folder in (part, part / "best"):
            if (folder / "tokenizer").exists():
                assert vistok.load(folder)
    train(config("part"), resume=True)
    assert losses_of(part) == losses_of(whole)
    assert saved_steps(part) == saved_steps(whole)
    assert vistok.load(part / "best").fingerprint() == vistok.load(whole / "best").fingerprint()
    assert not [path for path in part.rglob(".*") if path.name.endswith((".partial", ".old"))]
