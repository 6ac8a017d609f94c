"""Folders of samples: the same images from one process and from two, and after an interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_models import RASTER, tiny

import vistok
from vistok.pipelines import Pipeline
from vistok.pipelines.samples import write_samples
from vistok.utils.outputs import ResumeError, unfinished

COUNT = 11


class Killed(BaseException):
    """Simulates the end of a process."""


def tiny_pipeline() -> Pipeline:
    return Pipeline(tiny("llamagen_vq"), tiny("llama", spec=RASTER), sampling={"guidance_scale": 2.0})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".png"}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    write_samples(tiny_pipeline(), tmp_path / "whole", COUNT, seed=3, batch_size=4, npz=True)
    return tmp_path / "whole"


def interrupted(monkeypatch, out: Path, after: int, **options) -> None:
    """Start to write samples, and stop like a killed process after some images."""
    from vistok.pipelines import samples

    written = []

    def save(image, path):
        if len(written) == after:
            raise Killed
        written.append(path)
        save_png(image, path)

    save_png = samples.save_png
    monkeypatch.setattr(samples, "save_png", save)
    with pytest.raises(Killed):
        write_samples(tiny_pipeline(), out, COUNT, seed=3, **options)
    monkeypatch.undo()


@pytest.mark.parametrize("after", [1, 4, 6, COUNT])
def test_an_interrupted_run_goes_on_to_the_same_samples(whole, tmp_path, monkeypatch, after):
    out = tmp_path / "part"
    interrupted(monkeypatch, out, after, batch_size=4)
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in sorted(unfinished(out).glob("*.png"))[: after // 4 * 4]}
    (unfinished(out) / ".000010.png.x.partial").write_bytes(b"half")
    record = write_samples(tiny_pipeline(), out, COUNT, seed=3, batch_size=4, npz=True, resume=True)
    assert contents(out) == contents(whole)
    assert {path: (out / path.name).stat().st_mtime_ns for path in kept} == kept  # complete batches are kept
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert (out / "samples.npz").stat().st_size == (whole / "samples.npz").stat().st_size
    assert record == json.loads((whole / "samples.json").read_text())
    assert not unfinished(out).exists()


def test_a_resumed_run_may_have_another_batch_size(whole, tmp_path, monkeypatch):
    interrupted(monkeypatch, tmp_path / "part", 5, batch_size=3)
    write_samples(tiny_pipeline(), tmp_path / "part", COUNT, seed=3, batch_size=8, resume=True)
    assert contents(tmp_path / "part") == contents(whole)


def test_other_settings_are_not_mixed(tmp_path, monkeypatch):
    out = tmp_path / "part"
    interrupted(monkeypatch, out, 4, batch_size=4)
    before = contents(unfinished(out))
    with pytest.raises(FileExistsError, match="did not finish; go on with --resume"):
        write_samples(tiny_pipeline(), out, COUNT, seed=3)
    with pytest.raises(ResumeError, match="begun with another seed: seed was 3 and is now 4"):
        write_samples(tiny_pipeline(), out, COUNT, seed=4, resume=True)
    with pytest.raises(ResumeError, match="begun with another options"):
        write_samples(tiny_pipeline(), out, COUNT, seed=3, sampling={"top_k": 2}, resume=True)
    assert contents(unfinished(out)) == before
    with pytest.raises(ResumeError, match="nothing to resume"):
        write_samples(tiny_pipeline(), tmp_path / "other", COUNT, resume=True)


def test_two_processes_write_the_samples_of_one(whole, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "vistok"]
    arguments = [
        "sample",
        str(tmp_path / "pipe"),
        "--num-images",
        str(COUNT),
        "--seed",
        "3",
        "--batch-size",
        "4",
        "--npz",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(vistok.__file__).parents[1])}
    command = [*launch, *arguments, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("11 samples are in") == 1
    assert contents(tmp_path / "two") == contents(whole)
    for name in ("samples.npz", "samples.json"):
        assert (tmp_path / "two" / name).exists()
    assert not unfinished(tmp_path / "two").exists()


def test_a_bar_goes_on_while_one_batch_runs(tmp_path, monkeypatch):
    from vistok.utils.progress import Bar

    shown = []
    init = Bar.__init__

    def live(self, *arguments):
        init(self, *arguments)
        self.live = True

    monkeypatch.setattr(Bar, "__init__", live)
    monkeypatch.setattr(Bar, "show", lambda self, completed, note="": shown.append((completed, note)))
    write_samples(tiny_pipeline(), tmp_path / "out", 4, batch_size=4)
    length = RASTER.length
    assert shown[0] == (4 / length, f"1/{length} tokens, step 1")
    assert shown[length - 1 :] == [(4, f"{length}/{length} tokens, step {length}"), (4, "")]


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    from vistok.cli import main
    from vistok.pipelines import samples

    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    write, calls = samples._write, []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(samples, "_write", interrupt)
    with pytest.raises(SystemExit) as end:
        main(["sample", str(tmp_path / "pipe"), "--out", str(tmp_path / "out"), "--num", "4", "--batch-size", "2"])
    assert end.value.code not in (0, None)
    assert "--resume" in capsys.readouterr().err
