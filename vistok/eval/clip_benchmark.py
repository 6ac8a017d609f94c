"""``vistok benchmark`` for clips: generate clips, extract their features, and compute the Frechet video distance."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vistok.data.pictures import to_uint8
from vistok.data.video_decoders import decoder_versions
from vistok.eval.batches import Regrouper
from vistok.eval.clip_report import write_clip_report
from vistok.eval.clips import STATISTICS, ClipSet, choose_clips, distance_notes, open_videos, statistics_of
from vistok.eval.features import Extraction, digests_of
from vistok.eval.fvd import ClipNetwork, ClipStatistics, frechet_video_distance
from vistok.eval.plan import recorded_options, shards_of
from vistok.eval.record import RESULT_FILE, library_versions, save_result
from vistok.eval.store import FeatureStore
from vistok.eval.sweep import Setting, choose_settings
from vistok.eval.video_protocols import VIDEO_PROTOCOLS, VideoProtocol, video_protocol
from vistok.generators.base import Generator
from vistok.tokenizers.base import Tokenizer
from vistok.types import to_json
from vistok.utils.devices import dtype_of
from vistok.utils.files import read_json
from vistok.utils.numbers import MOST_IMAGES, check_seed, check_whole
from vistok.utils.outputs import continued
from vistok.utils.processes import ALONE, Processes
from vistok.utils.progress import track

GROUP = 4
"""Batch size of the feature network."""
Given = Literal["classes of the real clips", "balanced classes", "first frames of the real clips", "nothing"]
"""What clips are generated from. Clip i takes the class, or the first frames, of real clip i."""


class ClipPipeline(Protocol):
    """The pipeline of clips that is benchmarked; ``vistok.pipeline(path)`` returns one."""

    tokenizer: Tokenizer
    generator: Generator

    def options(self, **sampling: Any) -> Any:
        """The dataclass of sampling options of a call with these keyword arguments."""
        ...

    def __call__(self, class_labels: Any = None, **options: Any) -> Any:
        """Generate clips; the result has ``pixels`` (B, C, T, H, W) in [-1, 1]."""
        ...


@dataclass(frozen=True)
class ClipPlan:
    """The ``BenchmarkPlan`` of clips: everything that determines them and their features, except the ``Setting``.

    Attributes:
        num_clips: number of clips per setting.
        labels: what the clips are generated from.
        real: hash of the real clips whose classes or frames are taken; None if none are.
        seed: with the same seed, clip i is always the same.
        sampling: the generator's sampling options, without the guidance scale.
        tokenizer, generator: fingerprints of both models.
        protocol: the description of the protocol.
        network: name and weights of the feature network.
        dtype: of the generator's weights.
    """

    num_clips: int
    labels: Given
    real: str | None
    seed: int
    sampling: Mapping[str, Any]
    tokenizer: str
    generator: str
    protocol: Mapping[str, Any]
    network: Mapping[str, Any]
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, in which the number of clips is ``num_images``, as in the plans of images."""
        values = asdict(self)
        return to_json({"format": "vistok-clip-benchmark-1", "num_images": values.pop("num_clips")} | values)


def benchmark_clips(
    pipe: ClipPipeline,
    out: str | Path,
    *,
    reference: str | Path,
    protocol: str,
    network: ClipNetwork,
    num_clips: int | None = None,
    seed: int = 0,
    guidance_scales: Sequence[float] | None = None,
    temperatures: Sequence[float] | None = None,
    sampling: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    processes: Processes = ALONE,
    command: str | None = None,
) -> dict[str, Any]:
    """Generate clips, keep their features, and score them against real clips by a protocol.

    Clip i depends on the seed and on i, and possibly on the class or the first frames of real clip i. Features are
    written shard by shard. If called again with the same arguments, the benchmark resumes where it stopped. Batch size,
    processes and settings may differ between calls.

    Args:
        out: folder for features, ``result.json`` and ``report.html``; a new folder, or that of the same benchmark.
        reference: the real side: a folder of videos, list files, or a file of statistics.
        protocol: a name that ``video_protocol`` knows.
        network: from ``load_clip_network``.
        num_clips: clips per setting; None takes the protocol's count, or the number of real clips.
        guidance_scales, temperatures: every pair of them is one setting; by default the pipeline's own.
        sampling: sampling options that differ from the pipeline's.

    Returns:
        The contents of ``result.json``; as for images, see ``vistok.eval.benchmark.benchmark``.

    Raises:
        ResumeError: ``out`` belongs to another benchmark.
        BenchmarkError: ``out`` is damaged.
        FolderInUseError: another process writes ``out``.
        ValueError, ConfigError: the clips' shape is not the protocol's, the generator needs a condition that the
            protocol does not give, or as the pipeline and ``choose_clips``.
    """
    check_whole("batch_size", batch_size, least=1)
    check_whole("num_clips", num_clips, least=2, most=MOST_IMAGES, optional=True)
    check_seed(seed)
    sampling, out = dict(sampling or {}), Path(out)
    channels, *shape = pipe.tokenizer.input_shape
    rules = video_protocol(protocol)
    rules.check_shape((1, channels, *shape))
    real = None
    if Path(reference).suffix != STATISTICS:
        real = choose_clips(open_videos(reference), rules, real=True, name=str(reference))
    source = _Requests.of(pipe, rules, real, reference)
    count = num_clips or rules.count or (len(real) if real is not None else 0)
    if count < 2:
        raise ValueError(f"the number of clips must be at least 2, got {count}; say how many with --num")
    if source.real is not None and count > len(source.real):
        raise ValueError(
            f"{count} clips are asked for, but they follow real ones, of which {reference} has {len(source.real)}"
        )
    plan = _plan(pipe, rules, network, source, count, seed, sampling)
    settings = choose_settings(pipe, guidance_scales, temperatures, sampling, plan.sampling)
    with continued(out, plan.to_json(), processes=processes):
        started, shards = time.perf_counter(), shards_of(count)
        made, runs, previews = 0, [], []
        stores = [
            (setting, FeatureStore(out / setting.folder, shards, (shape[1], shape[2]), keep_images=False))
            for setting in settings
        ]
        for setting, store in stores:
            made += _generate(pipe, plan, source, rules, setting, sampling, store, network, batch_size, processes)
        generated = sum(processes.gather(made))  # also waits for the others
        if real is None:
            theirs = ClipStatistics.load(reference)
        else:
            theirs = statistics_of(real, rules, network, batch_size=batch_size, processes=processes)
        if processes.is_first:
            for setting, store in stores:
                runs.append(setting.describe(plan.sampling) | _score(store, rules, network, theirs, real))
                if rules.guidance_scale is not None and setting.guidance_scale != rules.guidance_scale:
                    note = f"the published numbers of {rules.name} are at guidance scale {rules.guidance_scale:g}"
                    runs[-1]["warnings"].append(note)
                previews.append(store.previews())
            result = {
                "benchmark": plan.to_json(),
                "protocol": rules.name,
                "runs": runs,
                "generated": generated,
                "seconds": round(time.perf_counter() - started, 2),
                "processes": processes.count,
                "command": command,
            }
            save_result(result, out)
            write_clip_report(result, previews, shape[0], out)
        processes.wait()
        return read_json(out / RESULT_FILE)


@dataclass(frozen=True)
class _Requests:
    """What each clip is generated from.

    Attributes:
        given: the same in words, for the plan.
        real: the real clips whose classes or first frames are taken; None if none are.
        given_frames: number of first frames that are taken from a real clip.
        num_classes: of the generator, if classes are balanced.
    """

    given: Given
    real: ClipSet | None = None
    given_frames: int = 0
    num_classes: int = 0

    @classmethod
    def of(cls, pipe: ClipPipeline, rules: VideoProtocol, real: ClipSet | None, reference: str | Path) -> _Requests:
        spec = pipe.generator.condition_spec
        if spec.parts == ("given",):
            if not rules.given_frames:
                giving = ", ".join(name for name, other in VIDEO_PROTOCOLS.items() if other.given_frames)
                raise ValueError(
                    f"this generator goes on from given frames; {rules.name!r} gives none: take {giving}, or "
                    "own-FRAMESxSIDE-givenN"
                )
            if real is None:
                raise ValueError(f"frames are given from real clips, but {reference} holds statistics only")
            return cls("first frames of the real clips", real, rules.given_frames)
        if rules.given_frames:
            raise ValueError(
                f"the protocol {rules.name!r} gives {rules.given_frames} frames; this generator takes {spec.describe()}"
            )
        if spec.parts not in ((), ("labels",)):
            raise ValueError(
                f"this generator takes {spec.describe()}; clips are benchmarked by class, frames or nothing"
            )
        if not spec.num_classes:
            return cls("nothing")
        if real is not None and len(real.source.classes) == spec.num_classes:
            return cls("classes of the real clips", real)
        return cls("balanced classes", num_classes=spec.num_classes)

    def of_range(self, start: int, stop: int) -> dict[str, Any]:
        """The pipeline's arguments for clips ``start`` to ``stop``."""
        if self.given_frames and self.real is not None:
            clips = torch.cat(list(self.real.batches(stop - start, start, stop)))
            return {"frames": clips[:, :, : self.given_frames]}
        if self.real is not None:
            return {"class_labels": [self.real.label(index) for index in range(start, stop)]}
        if self.num_classes:
            return {"class_labels": [index % self.num_classes for index in range(start, stop)]}
        return {"num_images": stop - start}


def _plan(
    pipe: ClipPipeline,
    rules: VideoProtocol,
    network: ClipNetwork,
    source: _Requests,
    count: int,
    seed: int,
    sampling: Mapping[str, Any],
) -> ClipPlan:
    return ClipPlan(
        num_clips=count,
        labels=source.given,
        real=None if source.real is None else source.real.fingerprint(),
        seed=seed,
        sampling=recorded_options(pipe, sampling),
        tokenizer=pipe.tokenizer.fingerprint(),
        generator=pipe.generator.fingerprint(),
        protocol=rules.describe(),
        network={"name": network.name, "weights_sha256": network.weights_sha256},
        dtype=dtype_of(pipe.generator),
    )


def _generate(
    pipe: ClipPipeline,
    plan: ClipPlan,
    source: _Requests,
    rules: VideoProtocol,
    setting: Setting,
    sampling: Mapping[str, Any],
    store: FeatureStore,
    network: ClipNetwork,
    batch_size: int,
    processes: Processes,
) -> int:
    """Generate this process's share of the missing shards; returns the number of clips."""
    todo = store.todo(processes)
    options = setting.options(sampling)
    for shard in track(todo, f"{plan.num_clips:,} clips, {store.folder.name}", len(todo)):
        features, hashes, columns = [], [], []
        groups = Regrouper(GROUP)
        for start in range(*shard, batch_size):
            stop = min(start + batch_size, shard[1])
            what = source.of_range(start, stop)
            pixels = pipe(**what, seed=plan.seed, index_start=start, batch_size=stop - start, **options).pixels
            features += [_features(network, rules, group) for group in groups.add(pixels)]
            frames = to_uint8(pixels).expand(-1, 3, -1, -1, -1)
            columns.append(frames.flatten(2, 3))  # (B, 3, T * H, W): the frames of a clip below one another
            hashes.append(digests_of(columns[-1]))
        if groups.rest is not None and len(groups.rest):
            features.append(_features(network, rules, groups.rest))
        extraction = Extraction(store.size, torch.cat(hashes), {"pool": torch.cat(features)}, {})
        store.write(shard, torch.cat(columns), extraction)
    return sum(stop - start for start, stop in todo)


def _features(network: ClipNetwork, rules: VideoProtocol, clips: Tensor) -> Tensor:
    """Features of at most ``GROUP`` clips, padded to ``GROUP`` so that no feature depends on the number of clips.

    Raises:
        ValueError: the features are not finite.
    """
    missing = clips[-1:].expand(GROUP - len(clips), *clips.shape[1:])
    features = network(rules.prepare(torch.cat([clips, missing])))["pool"][: len(clips)].float().cpu()
    if not bool(features.isfinite().all()):
        raise ValueError(f"{network.name} gives features that are not finite for the generated clips")
    return features


def _score(
    store: FeatureStore,
    rules: VideoProtocol,
    network: ClipNetwork,
    theirs: ClipStatistics,
    real: ClipSet | None,
) -> dict[str, Any]:
    """The result of ``evaluate_clips`` for the clips of one setting."""
    samples = store.read(keep=[], moments=["pool"])
    name = f"generated clips ({store.folder.name})"
    ours = ClipStatistics(samples.moments["pool"], rules.name, network.name, network.weights_sha256, name)
    score = frechet_video_distance(ours, theirs)
    left_out = {} if real is None else real.left_out
    return {
        "protocol": rules.name,
        "scores": {key: score[key] for key in ("fvd", "frechet_distance") if key in score},
        "images": score["generated"] | {"distinct": samples.distinct, "fingerprint": samples.fingerprint},
        "reference": score["real"],
        "network": score["network"],
        "video_protocol": score["protocol"],
        "left_out": left_out,
        "warnings": distance_notes(rules, ours, theirs, left_out),
        "versions": library_versions() | decoder_versions(),
    }
