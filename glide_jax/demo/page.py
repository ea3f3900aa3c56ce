"""The page itself: what each control does."""

import json
import random
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np
from gradio.processing_utils import (  # pyright: ignore[reportMissingImports]
    save_file_to_cache,
)
from PIL import Image

from glide_jax.demo import actions
from glide_jax.demo.layout import STYLE, THEME, lay_out, status
from glide_jax.demo.studio import Studio, Update
from glide_jax.demo.uploads import keep, painted_mask, read_upload
from glide_jax.errors import GlideError
from glide_jax.pipeline.images import Images
from glide_jax.pipeline.prompts import read_prompt

# How the page is served: nothing comes from, or goes to, another machine.
LAUNCH: dict[str, Any] = {
    "theme": THEME,
    "css_paths": STYLE,
    "footer_links": [],
    "run_history": False,
    "enable_monitoring": False,
    "mcp_server": False,
    "ssr_mode": False,
    "quiet": True,
}
# What each mode of the editor says; None: it has no amount.
MODES: dict[str, tuple[str, str | None, float]] = {
    actions.FILL: (
        "Paint over what is to be filled. Everything else is kept to the byte.", None, 0.6,
    ),
    actions.IMG2IMG: (
        "Change the image by the prompt, or only what is painted.", "Strength", 0.6,
    ),
    actions.VARY: ("Variations of the whole image, without guidance.", "Variation", 0.3),
}  # fmt: skip
VARIATIONS = 4


class Page:
    """The page's components and what happens to them."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Blocks(
            title="glide-jax", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
        ) as self.blocks:
            self.parts = lay_out(studio)
            # Of each visitor: the image in the editor, the last result, the image chosen of it, and
            # the mask of the edit that begins.
            self.source, self.result = gr.State(), gr.State()
            self.chosen, self.mask = gr.State(0), gr.State()
            self._connect(self.parts)
        self.blocks.queue(default_concurrency_limit=8, api_open=False)

    # -- events ---------------------------------------------------------------------------------

    def _connect(self, p: SimpleNamespace) -> None:
        controls = [p.prompt, p.num, p.seed, p.steps, p.sampler, p.scale, p.negative]
        controls += [p.clip_guidance_scale, p.auto, p.low, p.high]
        editing = [self.source, self.mask, p.mode, p.amount]
        outputs = [p.status, p.stop, p.gallery, p.next, p.made, p.command, p.python]
        outputs += [p.metadata, p.download, self.result, self.chosen]
        # At each report of a run, Gradio reads again each component that has shown progress. The
        # editor, and the tabs around it, would send its image every time: only the status does.
        hidden: dict[str, Any] = {
            "show_progress": "hidden", "show_progress_on": p.status, "api_visibility": "private",
        }  # fmt: skip
        quick = hidden | {"queue": False}

        def run(trigger: Any, function: Any, inputs: list[Any], begun: Any = None) -> None:
            first = begun or gr.on(trigger, self.begin, None, [p.status, p.stop], **quick)
            first.then(
                function,
                inputs,
                outputs,
                concurrency_id="run",
                concurrency_limit=1,
                **hidden,
            )

        run([p.generate.click, p.prompt.submit], self.generate, controls)
        # The mask is read before the run, since inputs of a run are also read again.
        painted = p.apply.click(self.begin_edit, p.editor, [p.status, p.stop, self.mask], **quick)
        run(None, self.edit, controls + editing, painted)
        run(p.interpolate.click, self.interpolate, [*controls, p.interpolation_num, p.end])
        run(p.like.click, self.more_like_this, [*controls, self.result, self.chosen])
        p.stop.click(self.stop, None, [p.status, p.stop], **quick)
        p.dice.click(lambda: random.randrange(2**32), None, p.seed, **quick)
        p.mode.input(self.show_mode, p.mode, [p.mode, p.amount, p.apply], **quick)
        shown = [self.source, p.editor, p.status]
        p.upload.upload(self.load, p.upload, shown, **quick)
        p.editor.clear(lambda: None, None, self.source, **quick)
        chosen = [self.result, self.chosen]
        p.use.click(self.use, chosen, [*shown, p.tabs], **quick)
        p.gallery.select(self.choose, self.result, [self.chosen, p.metadata, p.download], **quick)
        self.blocks.unload(self.leave)

    def begin(self, request: gr.Request) -> tuple[Any, ...]:
        """Note that a visitor has asked for a run."""
        self.studio.allow(request.session_hash or "")
        return status("Waiting…"), gr.update(interactive=True)

    def begin_edit(self, editor: dict[str, Any] | None, request: gr.Request) -> tuple[Any, ...]:
        """Note that a visitor has asked for an edit, and read what is painted."""
        mask = painted_mask((editor or {}).get("layers", ()), self.studio.side)
        return *self.begin(request), mask

    def stop(self, request: gr.Request) -> tuple[Any, ...]:
        """Stop a visitor's run."""
        self.studio.stop(request.session_hash or "")
        return status("Stopping…"), gr.update(interactive=False)

    def leave(self, request: gr.Request) -> None:
        """Stop the run of a visitor who closed the page."""
        self.studio.forget(request.session_hash or "")

    def generate(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Text to image."""

        def call() -> actions.Call:
            controls, defaults, more = self._read(values)
            return actions.generate(controls, defaults, **more)

        yield from self._run(request, call)

    def edit(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Fill, change or vary the image of the editor."""
        *rest, source, mask, mode, amount = values

        def call() -> actions.Call:
            controls, defaults, more = self._read(rest)
            file = None if mask is None else keep(mask, self.studio.inputs, "mask")
            return actions.edit(controls, defaults, mode, source, file, amount, **more)

        yield from self._run(request, call)

    def interpolate(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Images on the path between two prompts."""
        *rest, num, end = values

        def call() -> actions.Call:
            controls, defaults, more = self._read(rest, num=num)
            return actions.interpolation(controls, defaults, end, **more)

        yield from self._run(request, call)

    def more_like_this(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Variations of the chosen result, by its own caption."""
        *rest, result, chosen = values
        prompt = actions.caption_of(result["metadata"][chosen])
        amount, file = MODES[actions.VARY][2], result["files"][chosen]

        def call() -> actions.Call:
            controls, defaults, more = self._read(rest, prompt=prompt, num=VARIATIONS)
            return actions.edit(controls, defaults, actions.VARY, file, None, amount, **more)

        yield from self._run(request, call)

    def show_mode(self, mode: str) -> tuple[Any, ...]:
        """Show what belongs to a mode of the editor."""
        info, label, amount = MODES[mode]
        slider = gr.update(visible=label is not None, label=label or "", value=amount)
        return gr.update(info=info), slider, mode

    def load(self, path: str) -> tuple[Any, ...]:
        """Load an uploaded image into the editor."""
        try:
            pixels = read_upload(path, self.studio.side)
            file = keep(pixels, self.studio.inputs, "input")
        except GlideError as error:
            return gr.skip(), gr.skip(), status(str(error), "wrong")
        side = self.studio.side
        note = f"{Path(path).name}: the middle square, at {side}×{side}."
        return file, _on_canvas(file), status(note)

    def use(self, result: dict[str, Any], chosen: int) -> tuple[Any, ...]:
        """Load the chosen result into the editor."""
        file = result["files"][chosen]
        note = status("The result is in the editor.")
        return file, _on_canvas(file), note, gr.Tabs(selected="edit")

    def choose(self, result: dict[str, Any] | None, event: gr.SelectData) -> tuple[Any, ...]:
        """Take note of the chosen image, and show its metadata."""
        if result is None:
            return gr.skip(), gr.skip(), gr.skip()
        return event.index, _json(result["metadata"][event.index]), result["served"][event.index]

    # -- runs -----------------------------------------------------------------------------------

    def _read(self, values: Any, **changed: Any) -> tuple[actions.Controls, Any, dict[str, Any]]:
        names = actions.Controls.__dataclass_fields__
        values_by_name = dict(zip(names, values, strict=True)) | changed
        # An emptied field of numbers is None.
        values_by_name |= {
            "num": int(values_by_name["num"] or 1),
            "seed": int(values_by_name["seed"] or 0),
        }
        controls = actions.Controls(**values_by_name)
        return controls, self.studio.pipe.settings, self.studio.more(controls.num)

    def _run(
        self, request: gr.Request, make: Callable[[], actions.Call]
    ) -> Iterator[tuple[Any, ...]]:
        """Run a call; each report is shown, and so is what goes wrong."""
        try:
            call = make()
            for update in self.studio.run(call, request.session_hash or ""):
                yield self._show(update, call)
        except GlideError as error:
            yield self._message(str(error), "wrong")
        except Exception as error:
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            what = f"{type(error).__name__}: {first}"
            yield self._message(f"the run failed, see the terminal: {what:.300}", "wrong")

    def _message(self, text: str, kind: str = "") -> tuple[Any, ...]:
        """Outputs that change the status alone."""
        return (status(text, kind), gr.update(interactive=False), *[gr.skip()] * 9)

    def _unread(self, call: actions.Call) -> str:
        """A note on words that the model does not read, if there are any."""
        parts = (part.text for prompt in call.prompts for part in read_prompt(prompt).parts)
        cut = max(map(self.studio.pipe.tokenizer.overflow, parts))
        return f" · the model does not read the last {cut} tokens of the prompt" if cut else ""

    def _show(self, update: Update, call: actions.Call) -> tuple[Any, ...]:
        """The outputs of a report."""
        images, seconds = update.images, f"{update.seconds:.1f} s"
        running = update.stage not in ("done", "stopped")
        line = {
            "compiling": "Compiling: the first run of a new combination of options takes longer.",
            "stopped": f"Stopped after {seconds}.",
        }.get(update.stage)
        if update.stage == "done" and images is not None:
            line = f"{images.summary()} · {seconds}{self._unread(call)}"
        elif images is not None and line is None:
            line = _progress(images, update.step)
        first = (status(line or "Waiting…", update.stage), gr.update(interactive=running))
        if images is None:
            return (*first, *[gr.skip()] * 9)
        columns = 1 if len(images) == 1 else 2 if len(images) <= 4 else 4
        gallery: dict[str, Any] = {"columns": columns, "selected_index": None}
        if update.stage != "done":
            # The old result is gone: nothing of it may be used as if it were shown.
            hidden = gr.update(visible=False)
            shown = gr.Gallery(list(images.images), **gallery)
            return (*first, shown, hidden, hidden, *[gr.skip()] * 4, None, 0)
        cache = self.parts.gallery.GRADIO_CACHE
        served = [save_file_to_cache(file, cache_dir=cache) for file in update.files]
        metadata = [images.metadata(i) for i in range(len(images))]
        loading, out = self.studio.loading, self.studio.out
        visible = gr.update(visible=True)
        return (
            *first,
            gr.Gallery(served, **gallery),
            visible,
            visible,
            call.command(loading, out),
            call.python(loading, out),
            _json(metadata[0]),
            served[0],
            {"files": list(update.files), "served": served, "metadata": metadata},
            0,
        )


def _progress(images: Images, step: int) -> str:
    enlarged = images.settings.get("upsampler")
    weights, settings = images.weights, images.settings
    if enlarged:
        weights, settings = enlarged["weights"], enlarged
    total = settings["evaluations"]
    if len(images) == 1:
        return f"{weights}: step {step} of {total}"
    return f"{weights}: step {step}, {total} a batch"


def _on_canvas(file: str) -> dict[str, Any]:
    """An image for the editor, with nothing painted."""
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))
    return {"background": pixels, "layers": [], "composite": None}


def _json(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, indent=2, ensure_ascii=False)


def build(studio: Studio) -> gr.Blocks:
    """Build the page of a studio."""
    return Page(studio).blocks
