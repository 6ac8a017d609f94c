"""Whether the reader of clips keeps up with the model, and its memory stays constant: clips per second of each.

Clips: 16 frames of 128 px from random places of real videos. Model: a training step of LARP's tokenizer, at full size
on a GPU; on a CPU with fewer layers, whose number is in the report.

    python benchmarks/video_data.py --root ../shared/data/videos

On a GPU add ``--device cuda --batch-size 8 --num-workers 8 --layers 12``.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from common import find, finish, say

from vistok.data.clips import ClipBatches, ClipTransform
from vistok.data.loader import Loader
from vistok.data.order import SequentialOrder
from vistok.data.video_files import VideoSource, folder_videos, survey
from vistok.draws import Keys
from vistok.tokenizers.larp import LARP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder of videos")
    parser.add_argument("--clips", type=int, default=1000, help="clips that are read")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--layers", type=int, default=1, help="layers of the encoder and of the decoder")
    parser.add_argument("--steps", type=int, default=2, help="training steps that are timed")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    source = folder_videos(find(arguments.root, "data/videos", "--root"))
    say(survey(source, ClipTransform(16, 128)).describe())
    rate, growth = read(source, arguments)
    say(f"reading  {rate:8.2f} clips/s; memory grows by {growth:.1f} MB over the second half")
    model = train(arguments)
    say(f"training {model:8.2f} clips/s")
    options = ("clips", "batch_size", "num_workers", "layers", "device")
    figures = {"read_clips_per_second": rate, "train_clips_per_second": model, "memory_growth_mb": growth}
    finish("video_data", {"read_over_train": rate / model}, figures | {n: getattr(arguments, n) for n in options})


def read(source: VideoSource, arguments: argparse.Namespace) -> tuple[float, float]:
    """Clips per second, and the rise of peak memory in MB while the second half is read."""
    rounds = -(-arguments.clips // len(source))
    repeated = VideoSource(source.paths * rounds, [source.label(i) for i in range(len(source))] * rounds)
    reader = ClipBatches(repeated, ClipTransform(16, 128, flip=True))
    order = SequentialOrder(len(repeated), arguments.batch_size)
    loader, peaks, count = Loader(reader, order, num_workers=arguments.num_workers), [], 0
    start = time.perf_counter()
    for batch in loader:
        count += len(batch.indices)
        peaks.append(peak_memory())
    seconds = time.perf_counter() - start
    return count / seconds, peaks[-1] - peaks[len(peaks) // 2]


def peak_memory() -> float:
    """Peak memory in MB of this process and of its finished workers."""
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def train(arguments: argparse.Namespace) -> float:
    """Clips per second of forward, backward and optimizer steps."""
    size = {"dim": 768, "num_layers": arguments.layers, "num_heads": 12}
    model = LARP(encoder=size, decoder=size).to(arguments.device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    clips = torch.rand(arguments.batch_size, 3, 16, 128, 128, device=arguments.device) * 2 - 1

    def step(number: int) -> None:
        output = model(clips, draws=model.training_draws(Keys.range(0, len(clips), step=number)))
        loss = (output.reconstruction - clips).abs().mean() + sum(term.mean() for term in output.losses.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if arguments.device != "cpu":
            torch.cuda.synchronize()

    step(0)  # warm up
    start = time.perf_counter()
    for number in range(arguments.steps):
        step(number + 1)
    return arguments.steps * len(clips) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
