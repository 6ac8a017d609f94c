"""The demo's pages, in Gradio."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vistok.data.decoding import ImageDecoder
from vistok.data.pictures import open_picture, to_pil
from vistok.demo.pictures import (
    compare,
    error_map,
    heat_map_like,
    note,
    on_grid,
    picture,
    pictures,
    token_map,
    token_strip,
)
from vistok.demo.runs import MOST_IMAGES, Reconstruction, Run
from vistok.pipelines.display import describe, describe_tokens

if TYPE_CHECKING:
    import gradio

STYLE = Path(__file__).with_name("style.css")
TITLE = "vistok demo"
LOOPBACK = "127.0.0.1"
KNOB_NAMES = {"guidance_scale": "guidance", "temperature": "temperature", "top_p": "top-p"}
FORGOTTEN_AFTER = 60
"""Seconds after which Gradio removes the files of an interrupted upload."""
MOST_CLIPS = 4


class DemoError(RuntimeError):
    """The demo cannot be shown."""


def build(runs: Sequence[Run], uploads: str | Path) -> gradio.Blocks:
    """The demo's app, with a tab for each run.

    Args:
        uploads: the folder in which Gradio keeps visitors' uploads until they are read.

    Raises:
        DemoError: Gradio is not installed, or there are no runs.
    """
    gr = _gradio()
    if not runs:
        raise DemoError("name a run to show: vistok demo RUN…")
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(FORGOTTEN_AFTER, FORGOTTEN_AFTER)) as app:
        for number, run in enumerate(runs):
            with gr.Tab(run.name):
                _run_page(gr, run, Path(uploads), "" if len(runs) == 1 else f"_{number}")
    return app


@contextmanager
def launched(
    paths: Sequence[str],
    *,
    host: str = LOOPBACK,
    port: int | None = None,
    max_upload_mb: float = 10,
    device: str | None = None,
) -> Iterator[gradio.Blocks]:
    """Serve the demo within the block, and yield its app; ``local_url`` is the address.

    A visitor's upload lies in a private folder and is removed as soon as it is read. Results are never written to disk.

    Args:
        paths: runs, saved tokenizers or pipelines, or hub ids.
        host: the address to listen on; other machines can reach the demo unless it is a loopback address.
        port: None takes a free port from 7860 on.
        max_upload_mb: larger uploads are refused.
        device: where the models run; None chooses.

    Raises:
        DemoError: Gradio is not installed, there are no runs, or the port cannot be used.
        ValueError: the upload limit is not above 0.
        CheckpointError: as ``Run``.
    """
    if not max_upload_mb > 0:
        raise ValueError(f"the upload limit must be above 0 MB, got {max_upload_mb}")
    gr = _gradio()
    # No requests to the internet: fonts are those of the visitor's system, and analytics are off.
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    with TemporaryDirectory(prefix="vistok-demo-") as uploads, _environment(GRADIO_TEMP_DIR=uploads):
        app = build([Run(path, device) for path in paths], uploads)
        try:
            app.queue(default_concurrency_limit=1).launch(
                server_name=host,
                server_port=port,
                max_file_size=int(max_upload_mb * 2**20),
                prevent_thread_lock=True,
                share=False,
                ssr_mode=False,
                footer_links=[],
                theme=theme,
                css=STYLE.read_text(encoding="utf-8"),
                quiet=True,
            )
        except OSError as error:
            raise DemoError(f"the demo cannot listen on {host}: {error}; name another --port or --host") from error
        try:
            yield app
        finally:
            app.close(verbose=False)


def launch(
    paths: Sequence[str],
    *,
    host: str = LOOPBACK,
    port: int | None = None,
    max_upload_mb: float = 10,
    device: str | None = None,
) -> None:
    """Serve the demo until Ctrl-C; arguments as in :func:`launched`."""
    with launched(paths, host=host, port=port, max_upload_mb=max_upload_mb, device=device) as app:
        print(f"{TITLE}: {app.local_url} (Ctrl-C ends it)", flush=True)
        app.block_thread()


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables within the block: Gradio reads its upload folder from one."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise DemoError("the demo needs Gradio: pip install 'vistok[demo]'") from error
    return gradio


def _run_page(gr: Any, run: Run, uploads: Path, suffix: str) -> None:
    """Add the page of one run. ``suffix`` is appended to the names of its API endpoints."""
    gr.HTML(note(describe_tokens(run.spec).capitalize() + "."))
    if run.pipe is not None:
        with gr.Tab("Generate"):
            _generation(gr, run, suffix)
    if run.reads_pictures:
        reconstructed = gr.State(None)
        with gr.Tab("Reconstruct"):
            _reconstruction(gr, run, reconstructed, uploads, suffix)
        if run.spec.discrete and run.spec.depth == 1:
            with gr.Tab("Tokens"):
                _tokens(gr, run, reconstructed, suffix)
    if run.pipe is not None:
        with gr.Accordion("About this run", open=False):
            gr.Code(describe(run.pipe), language=None, show_label=False)


def _generation(gr: Any, run: Run, suffix: str) -> None:
    with gr.Row():
        what = gr.Dropdown(
            run.classes, value=next(iter(run.classes), None), label="class", visible=bool(run.classes), filterable=True
        )
        prompt = gr.Textbox(label="prompt", placeholder="empty: whatever it likes", visible=run.takes_prompts)
        most = MOST_CLIPS if run.is_video else MOST_IMAGES
        count = gr.Slider(1, most, value=min(4, most), step=1, label="clips" if run.is_video else "images")
        seed = gr.Number(0, precision=0, label="seed")
    with gr.Row():
        knobs = {
            name: gr.Slider(low, high, value=value, step=step, label=KNOB_NAMES[name])
            for name, (low, high, step, value) in run.knobs.items()
        }
    start = gr.Button("Generate", variant="primary")
    shown, said = gr.HTML(), gr.HTML()

    def generate(what: str, prompt: str, count: float, seed: float, *values: float) -> Iterator[tuple[str, str]]:
        sampling = dict(zip(knobs, values, strict=True))
        yield "", note("starting …")
        with _told(gr):
            for image, text, out in run.generate(what, prompt, int(count), int(seed), **sampling):
                if out is not None:
                    yield out._repr_html_() or "", note(f"seed {int(seed)}")
                elif image is not None:
                    yield picture(image, "what is generated", width=min(image.width, 720)), note(text)
                else:
                    yield "", note(text)

    start.click(generate, [what, prompt, count, seed, *knobs.values()], [shown, said], api_name=f"generate{suffix}")


def _reconstruction(gr: Any, run: Run, reconstructed: Any, uploads: Path, suffix: str) -> None:
    upload = gr.File(label="a picture", file_types=["image"], type="filepath")
    sides, errors = gr.HTML(note("Upload a picture: it is cropped to the size that this tokenizer reads.")), gr.HTML()
    lengths = run.prefixes()
    ordered = len(lengths) > 1
    label = "how many of the tokens, the first to all"
    prefix = gr.Slider(1, len(lengths), value=len(lengths), step=1, label=label) if ordered else None
    prefix_view = gr.HTML(visible=ordered)

    def take(path: str | None) -> tuple[Reconstruction | None, str, str]:
        if path is None:
            return None, "", ""
        with _told(gr):
            try:
                image = open_picture(path, ImageDecoder(3))
            finally:
                forget(Path(path), uploads)
            found = run.reconstruct(image)
        before, after = found.original, found.reconstruction
        shown = [(heat_image(found), f"error (white: 0.5 or more), PSNR {found.psnr:.1f} dB")]
        return found, compare(before, after), pictures([(after, "after"), *shown], 260)

    def heat_image(found: Reconstruction) -> Any:
        return error_map(found.pixels[0], found.decoded[0])

    def cut(found: Reconstruction | None, index: float) -> str:
        if found is None:
            return note("Upload a picture first.")
        with _told(gr):
            length = lengths[int(index) - 1]
            return pictures([(to_pil(run.decode(found.tokens[:, :length]))[0], f"{length} of {lengths[-1]} tokens")])

    upload.upload(take, upload, [reconstructed, sides, errors], api_name=f"reconstruct{suffix}")
    upload.clear(lambda: (None, "", ""), None, [reconstructed, sides, errors], api_name=False)
    if prefix is not None:
        prefix.release(cut, [reconstructed, prefix], prefix_view, api_name=f"prefix{suffix}")


def _tokens(gr: Any, run: Run, reconstructed: Any, suffix: str) -> None:
    gr.HTML(note("Of the picture in the tab Reconstruct. Equal ids have equal colours."))
    with gr.Row():
        what = gr.Dropdown(
            run.classes, value=next(iter(run.classes), None), label="entropy given the class", visible=bool(run.classes)
        )
        show = gr.Button("Show the tokens")
    maps = gr.HTML()
    with gr.Row():
        position = gr.Slider(0, run.spec.length - 1, value=0, step=1, label="place of a token")
        index = gr.Number(0, precision=0, label=f"another id, 0..{run.spec.num_ids - 1}")
    with gr.Row():
        swap, draw = gr.Button("Swap the token"), gr.Button("Another id at random")
    swapped = gr.HTML()

    def draw_maps(found: Reconstruction | None, what: str | None) -> str:
        if found is None:
            return note("Upload a picture in the tab Reconstruct first.")
        with _told(gr):
            ids, on_raster = found.tokens[0], run.spec.grid is not None and len(run.spec.grid) == 2
            colours = token_map(on_grid(ids, run.spec.grid), found.original) if on_raster else token_strip(ids)
            shown = [(colours, f"{len(ids.unique())} different ids of {len(ids)} tokens")]
            bits = run.entropy(found.tokens, what)
            if bits is not None:
                text = f"entropy of the generator: {bits.mean():.2f} bits on average, white is {bits.max():.2f}"
                shown.append((heat_map_like(on_grid(bits, run.spec.grid), found.original), text))
        return pictures(shown)

    def change(found: Reconstruction | None, position: float, index: float) -> str:
        if found is None:
            return note("Upload a picture in the tab Reconstruct first.")
        with _told(gr):
            changed = run.swapped(found.tokens, int(position), int(index))
            after = run.decode(changed)
            old = int(found.tokens[0, int(position)])
            shown = [
                (found.reconstruction, f"with id {old} at place {int(position)}"),
                (to_pil(after)[0], f"with id {int(index)}"),
                (error_map(found.decoded[0], after[0]), "what changed"),
            ]
        return pictures(shown, 260)

    show.click(draw_maps, [reconstructed, what], maps, api_name=f"tokens{suffix}")
    swap.click(change, [reconstructed, position, index], swapped, api_name=f"swap{suffix}")
    draw.click(partial(random.randrange, run.spec.num_ids), None, index, api_name=False).then(
        change, [reconstructed, position, index], swapped, api_name=False
    )


@contextmanager
def _told(gr: Any) -> Iterator[None]:
    """Show errors that a user can act upon as messages on the page."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def forget(path: Path, uploads: Path) -> None:
    """Remove an upload, with the folder that Gradio made for it in ``uploads``."""
    path.unlink(missing_ok=True)
    if path.parent != uploads and path.is_relative_to(uploads):
        shutil.rmtree(path.parent, ignore_errors=True)
