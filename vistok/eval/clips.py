"""``vistok eval`` for clips: the Frechet video distance of two sets of videos, or of statistics of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from vistok.checkpoints import CheckpointError
from vistok.checkpoints.weights import is_torchscript
from vistok.data.clip_sources import ClipSource
from vistok.data.clips import ClipTransform
from vistok.data.config import DataConfig
from vistok.data.loader import evaluation_loader
from vistok.data.opening import open_source
from vistok.data.sources import hash_lines
from vistok.data.video_decoders import decoder_versions
from vistok.data.video_files import folder_videos, listed_videos
from vistok.data.videos import UnreadableClipError
from vistok.draws import Keys
from vistok.eval.fvd import ClipNetwork, ClipStatistics, frechet_video_distance
from vistok.eval.guards import singular_warnings
from vistok.eval.i3d import I3DNetwork, TorchScriptI3D
from vistok.eval.metrics import Moments
from vistok.eval.record import library_versions
from vistok.eval.video import VIDEO_SSIM, psnr, ssim
from vistok.eval.video_protocols import DETECTORS, RECONSTRUCTION, VideoProtocol, chunks_of, drawn, video_protocol
from vistok.tokenizers.base import Tokenizer
from vistok.utils.processes import ALONE, Processes
from vistok.utils.progress import track

STATISTICS = ".safetensors"
MOST_DECIBELS = 100.0  # identical clips, whose PSNR is infinite, enter a mean with this value


@dataclass(frozen=True)
class ClipSet:
    """Clips cut from videos.

    Attributes:
        source: the videos.
        starts: (video, first frame) of each clip.
        transform: the length, stride, crop and resize of the clips.
        name: where they came from, for reports.
        left_out: videos that could not be read or are too short, with the reason.
    """

    source: ClipSource
    starts: list[tuple[int, int]]
    transform: ClipTransform
    name: str
    left_out: dict[str, str]

    def __len__(self) -> int:
        return len(self.starts)

    def label(self, index: int) -> int:
        """The class of the video that clip ``index`` is cut from; -1 without classes."""
        return self.source.label(self.starts[index][0])

    def fingerprint(self) -> str:
        """A hash of the videos (names and sizes), the clips' starts and their transform."""
        return hash_lines([self.source.fingerprint(), *map(str, self.starts), str(self.transform)])

    def batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        """Clips ``start`` to ``stop`` (B, 3, T, H, W) in [-1, 1]."""
        for first in range(start, stop, batch_size):
            chosen = self.starts[first : min(first + batch_size, stop)]
            yield torch.stack([self._clip(video, frame) for video, frame in chosen])

    def _clip(self, video: int, start: int) -> Tensor:
        last = self.source.length(video) - 1
        frames = [min(start + i * self.transform.frame_stride, last) for i in range(self.transform.num_frames)]
        return self.transform.pixels(self.source.read(video, frames))


def choose_clips(source: ClipSource, protocol: VideoProtocol, *, real: bool, name: str) -> ClipSet:
    """The clips of one side by a protocol. Of each generated video it is the one that begins at the first frame.

    Args:
        real: whether this is the real side.
        name: where the videos came from, for reports.

    Raises:
        ValueError: no video is long enough.
    """
    transform = ClipTransform(protocol.num_frames, protocol.image_size, protocol.frame_stride)
    lengths, left_out = [], {}
    for index in range(len(source)):
        try:
            lengths.append(source.length(index))
        except UnreadableClipError as error:
            lengths.append(0)
            left_out[source.name(index)] = error.args[-1]
    repeats = protocol.choice == "random_start" and real  # short videos are extended by copies of their last frame
    usable, needed = [], 1 if repeats else transform.span
    for index, length in enumerate(lengths):
        if length >= needed:
            usable.append(index)
        else:
            left_out.setdefault(source.name(index), f"{length} frames, fewer than {transform.span}")
    if not usable:
        raise ValueError(f"no video of {name} has the {transform.span} frames of a clip")
    if not real or protocol.choice == "given":
        starts = [(index, 0) for index in usable]
    elif protocol.choice == "random_start":
        uniforms = Keys.of(cast(int, protocol.seed), usable).uniform("start", 1)[:, 0].tolist()
        starts = [(i, transform.frames(lengths[i], u)[0]) for i, u in zip(usable, uniforms, strict=True)]
    else:
        starts = chunks_of(lengths, protocol.num_frames, protocol.frame_stride)
    if real:
        starts = [starts[index] for index in drawn(len(starts), protocol.real_count, protocol.seed)]
    return ClipSet(source, starts, transform, name, left_out)


def open_videos(what: str | Path) -> ClipSource:
    """Open a folder of videos, or list files joined by "+".

    Raises:
        FileNotFoundError, ValueError: as ``folder_videos`` and ``listed_videos``.
    """
    return folder_videos(what) if Path(what).is_dir() else listed_videos(what)


def load_clip_network(
    weights: str | Path | None, *, torchscript: bool = False, device: torch.device | str = "cpu"
) -> ClipNetwork:
    """Load I3D: the PyTorch port, or StyleGAN-V's TorchScript file.

    Args:
        weights: file with the weights; None downloads those of the port once.
        torchscript: whether ``weights`` is a TorchScript file. Loading it runs the code in it: say so only of a file
            that you trust.

    Raises:
        CheckpointError: the weights are absent, damaged or of another network, or cannot be downloaded; or they are
            TorchScript and ``torchscript`` is False.
        ValueError: ``torchscript`` is True, but no file is named.
    """
    if not torchscript:
        if weights is not None and is_torchscript(weights):
            raise CheckpointError(
                f"{weights} is TorchScript, which runs the code in the file when it is loaded. If you trust it, say "
                "so: torchscript=True (command line: --torchscript; of a probe: --network i3d_torchscript)"
            )
        return I3DNetwork.load(weights, device=device)
    if weights is None:
        raise ValueError("name the TorchScript file with weights=PATH (command line: --weights PATH)")
    return TorchScriptI3D(weights, device=device)


def clip_statistics(
    what: str | Path,
    protocol: VideoProtocol,
    network: ClipNetwork | None,
    *,
    real: bool,
    batch_size: int = 8,
    processes: Processes = ALONE,
) -> tuple[ClipStatistics, dict[str, str]]:
    """The statistics of one side, and the videos that were left out, with reasons.

    Several processes share the clips, and all of them return the whole.

    Args:
        what: a folder of videos, list files, or a file of statistics, which is only read.
        network: None if ``what`` is a file of statistics.

    Raises:
        ValueError: ``what`` holds videos and ``network`` is None; or as ``choose_clips``.
        StatisticsError: as ``ClipStatistics``.
    """
    if Path(what).suffix == STATISTICS:
        return ClipStatistics.load(what), {}
    if network is None:
        raise ValueError(f"{what} holds videos, which need a network to be scored by")
    clips = choose_clips(open_videos(what), protocol, real=real, name=str(what))
    return statistics_of(clips, protocol, network, batch_size=batch_size, processes=processes), clips.left_out


def statistics_of(
    clips: ClipSet,
    protocol: VideoProtocol,
    network: ClipNetwork,
    *,
    batch_size: int = 8,
    processes: Processes = ALONE,
) -> ClipStatistics:
    """The statistics of ``clips``. Several processes share the clips, and all of them return the whole."""
    what = clips.name
    start, stop = processes.part(len(clips))
    batches = track(clips.batches(batch_size, start, stop), f"features of {what}", -(-(stop - start) // batch_size))
    part = ClipStatistics.of(batches, network, protocol, source=what) if stop > start else None
    parts = [each for each in processes.gather(part) if each is not None]
    whole = parts[0]
    for each in parts[1:]:
        whole = whole.merge(each)
    return whole


def evaluate_clips(
    generated: str | Path,
    reference: str | Path,
    *,
    protocol: str,
    network: ClipNetwork | None,
    batch_size: int = 8,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """The Frechet video distance of two sets of videos, and everything that it depends on, JSON-ready.

    Args:
        generated, reference: folders of videos, list files, or files of statistics.
        protocol: a name that ``video_protocol`` knows.
        network: from ``load_clip_network``; None if both sides are statistics.

    Raises:
        ValueError: the protocol is unknown, a side has no usable videos, or the sides were made by other means.
    """
    rules = video_protocol(protocol)
    ours, left_out = clip_statistics(generated, rules, network, real=False, batch_size=batch_size, processes=processes)
    theirs, left_out_there = clip_statistics(
        reference, rules, network, real=True, batch_size=batch_size, processes=processes
    )
    score = frechet_video_distance(ours, theirs)
    name = "fvd" if "fvd" in score else "frechet_distance"
    return {
        "protocol": protocol,
        "scores": {name: score[name]},
        "images": score["generated"],
        "reference": score["real"],
        "network": score["network"],
        "video_protocol": score["protocol"],
        "left_out": left_out | left_out_there,
        "warnings": distance_notes(rules, ours, theirs, left_out | left_out_there),
        "versions": library_versions() | decoder_versions(),
    }


def distance_notes(
    rules: VideoProtocol, generated: ClipStatistics, real: ClipStatistics, left_out: dict[str, str]
) -> list[str]:
    """Warnings about a distance: another network than the protocol's, other or too few clips, videos left out."""
    notes = []
    if generated.network not in DETECTORS[rules.detector]:
        known = " or ".join(DETECTORS[rules.detector])
        notes.append(
            f"{rules.name} is defined with {known}, and these are features of {generated.network}: compare the "
            "distance only with others of that network"
        )
    for count, expected, name in ((generated.count, rules.count, "generated"), (real.count, rules.real_count, "real")):
        if expected is not None and count != expected:
            notes.append(f"{rules.name} has {expected:,} {name} clips; these are {count:,}, and the distance is biased")
    for side, name in ((generated, "generated"), (real, "real")):
        notes += singular_warnings(name, side.count, {"pool": len(side.moments.sum)}, "clips")
    if left_out:
        shown = ", ".join(list(left_out)[:3])
        notes.append(f"{len(left_out)} videos were left out: {shown}{', …' if len(left_out) > 3 else ''}")
    return notes


def pair_scores(
    originals: Tensor, reconstructions: Tensor, lpips: Callable[[Tensor, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Scores (B,) of reconstructed clips (B, C, T, H, W), which are clamped to [-1, 1].

    ``psnr`` is LARP's, from one error per clip. ``psnr_frames``, ``ssim_frames`` and, with ``lpips``, ``lpips_frames``
    are means over frames. There is no ``ssim_frames`` if frames are smaller than SSIM's window.
    """
    pair = [clips.float().clamp(-1, 1) for clips in (originals, reconstructions)]
    a, b = ((clips + 1) / 2 for clips in pair)
    scores = {"psnr": psnr(a, b), "psnr_frames": psnr(a, b, per="frame").mean(1)}
    if min(a.shape[-2:]) >= VIDEO_SSIM.window_size:
        scores["ssim_frames"] = ssim(a, b).mean(1)
    if lpips is not None:
        frames = [rearrange(clips, "b c t h w -> (b t) c h w").expand(-1, 3, -1, -1) for clips in pair]
        scores["lpips_frames"] = lpips(*frames).unflatten(0, (len(a), -1)).mean(1).double()
    return scores


@torch.no_grad()
def evaluate_clip_tokenizer(
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    protocol: str = RECONSTRUCTION,
    network: ClipNetwork | None = None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Score the reconstructions of all clips of ``data``: PSNR, SSIM and LPIPS, and the Frechet video distance.

    Args:
        protocol: of the distance.
        network: from ``load_clip_network``; without it there is no distance.
        lpips: a distance (N,) of two batches of frames (N, 3, H, W) in [-1, 1]; without it there is no LPIPS.
        processes: the processes that share the clips; all of them return the result.

    Returns:
        The scores, and everything that they depend on, JSON-ready.

    Raises:
        ValueError: the clips' shape is not the tokenizer's, or not the protocol's, or no clip can be read.
    """
    tokenizer.spec_for(data.input_shape)
    source, rules = open_source(data), video_protocol(protocol)
    loader = evaluation_loader(source, data, rank=processes.index, world_size=processes.count)
    tokenizer.eval()
    sums: dict[str, float] = {}
    count = 0
    moments: list[Moments | None] = [None, None]
    for batch in track(loader, "reconstructions", len(loader)):
        pixels = batch.pixels.to(tokenizer.device, tokenizer.dtype)
        made = tokenizer.reconstruct(pixels)
        count += len(pixels)
        for name, values in pair_scores(pixels, made, lpips).items():
            sums[name] = sums.get(name, 0.0) + float(values.clamp_max(MOST_DECIBELS).sum())
        for side, clips in enumerate((made, pixels)):
            if network is not None:
                features = network(rules.prepare(clips))["pool"]
                running = moments[side] = moments[side] or Moments(features.shape[1])
                running.update(features)
    parts = [part for part in processes.gather((sums, count, moments)) if part[1]]
    if not parts:
        raise ValueError(f"no clip of {data.source} can be read")
    total = sum(part[1] for part in parts)
    scores = {name: sum(part[0][name] for part in parts) / total for name in parts[0][0]}
    result: dict[str, Any] = {
        "protocol": protocol,
        "scores": scores,
        "warnings": [],
        "versions": library_versions() | decoder_versions(),
    }
    name = data.title
    result |= {"images": {"source": f"reconstructions of {name}", "count": total}, "reference": {"source": name}}
    if network is not None:
        whole = [part[2] for part in parts]
        sides = []
        for side in (0, 1):
            merged = whole[0][side]
            for other in whole[1:]:
                merged = merged.merge(other[side])
            sides.append(ClipStatistics(merged, protocol, network.name, network.weights_sha256, name))
        made_side, real_side = sides
        distance = frechet_video_distance(made_side, real_side)
        names = {"fvd": "rfvd", "frechet_distance": "frechet_distance"}
        result["scores"] |= {names[key]: distance[key] for key in names if key in distance}
        result |= {"network": distance["network"], "video_protocol": distance["protocol"]}
        result["warnings"] = distance_notes(rules, made_side, real_side, {})
        if rules.choice == "random_start":
            result["warnings"].append(f"{protocol} begins clips at random; these are from the middle of their videos")
    return result
