"""The look of the page: its controls, in reading order."""

from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from glide_jax.demo.actions import FILL, IMG2IMG, VARY
from glide_jax.demo.studio import Studio
from glide_jax.diffusion.solvers import SOLVERS
from glide_jax.pipeline.settings import Settings

STYLE = Path(__file__).with_name("page.css")
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
# Fonts of the visitor's machine: nothing is loaded from elsewhere.
THEME = gr.themes.Base(
    primary_hue="indigo", neutral_hue="slate", radius_size="md", font=SANS, font_mono=MONO
)
# Magenta: rare in images.
BRUSH = "#d946ef"
LARGEST_NUM = 16
JOINING = (
    "AND and NOT join captions, each with an optional weight: "
    "*a red apple AND a tulip :0.5 NOT a rose*"
)
IDLE = "Images appear here."


def lay_out(studio: Studio) -> SimpleNamespace:
    """Create the components inside the current `gr.Blocks`, and return them by name."""
    components = SimpleNamespace()
    name = studio.pipe.model.name
    gr.HTML(
        f"<h1>glide-jax</h1><p>{name} · {studio.side}×{studio.side}</p>",
        elem_id="masthead",
        padding=False,
    )
    with gr.Row(elem_id="desk"):
        with gr.Column(scale=5, min_width=340, elem_id="left"):
            _left_column(components, studio)
        with gr.Column(scale=6, min_width=340, elem_id="right"):
            _results(components)
    return components


def _left_column(components: SimpleNamespace, studio: Studio) -> None:
    prompts = studio.pipe.model.prompts
    components.prompt = gr.Textbox(
        value=next(iter(prompts), ""),
        label="Prompt",
        info=JOINING,
        lines=2,
        max_lines=4,
        elem_id="prompt",
    )
    if prompts:
        gr.Examples(
            [[prompt] for prompt in prompts], components.prompt, label="", api_visibility="private",
            elem_id="examples",
        )  # fmt: skip
    with gr.Tabs(elem_id="tabs") as components.tabs:
        with gr.Tab("Create", id="create"):
            components.generate = _main_button("Generate", "generate")
        with gr.Tab("Edit", id="edit"):
            _editor(components, studio.side)
        with gr.Tab("Path", id="path"):
            components.end = gr.Textbox(
                value=prompts[1] if len(prompts) > 1 else "",
                label="To the prompt",
                info="The images lead from the prompt above to this one, both included.",
                elem_id="end",
            )
            components.interpolation_num = gr.Slider(
                2, LARGEST_NUM, 6, step=1, label="Images on the path"
            )
            components.interpolate = _main_button("Walk the path", "interpolate")
    _run(components)
    _guidance(components, studio)
    _sampling(components, studio.pipe.settings)


def _main_button(text: str, name: str) -> gr.Button:
    return gr.Button(text, variant="primary", elem_id=name)


def _editor(components: SimpleNamespace, side: int) -> None:
    components.upload = gr.UploadButton("Load an image", size="sm", elem_id="upload")
    components.editor = gr.ImageEditor(
        type="numpy",
        image_mode="RGBA",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        buttons=[],
        brush=gr.Brush(default_size=side // 14, colors=[BRUSH], color_mode="fixed"),
        eraser=gr.Eraser(default_size=side // 14),
        canvas_size=(side, side),
        fixed_canvas=True,
        show_label=False,
        placeholder="Load an image, or use a result as input",
        height=380,
        elem_id="editor",
    )
    components.mode = gr.Radio(
        [FILL, IMG2IMG, VARY],
        value=FILL,
        label="What to do",
        info="Paint over what is to be filled. Everything else is kept to the byte.",
        elem_id="mode",
    )
    components.amount = gr.Slider(
        0.05, 1, 0.6, step=0.05, label="Strength", visible=False, elem_id="amount"
    )
    components.apply = _main_button(FILL, "apply")


def _run(components: SimpleNamespace) -> None:
    with gr.Row(elem_id="run"):
        components.num = gr.Slider(
            1, LARGEST_NUM, 1, step=1, label="Images", min_width=150, elem_id="num"
        )
        components.seed = gr.Number(0, label="Seed", precision=0, min_width=110, elem_id="seed")
        components.dice = gr.Button(
            "Random", size="sm", variant="secondary", scale=0, min_width=80, elem_id="dice"
        )


def _sampling(components: SimpleNamespace, defaults: Settings) -> None:
    with gr.Accordion("Sampler", open=False, elem_id="sampling"), gr.Row():
        components.sampler = gr.Dropdown(
            list(SOLVERS), value=defaults.sampler, label="Sampler", min_width=120
        )
        if isinstance(defaults.steps, int):
            most = max(100, defaults.steps)
            components.steps = gr.Slider(
                1, most, defaults.steps, step=1, label="Steps", min_width=150, elem_id="steps"
            )
        else:
            # A respacing of OpenAI's code, such as fast27.
            components.steps = gr.Textbox(
                defaults.steps, label="Steps", min_width=120, elem_id="steps"
            )


def _guidance(components: SimpleNamespace, studio: Studio) -> None:
    defaults: Any = studio.pipe.settings
    with gr.Accordion("Guidance", open=False, elem_id="guidance"):
        components.scale = gr.Slider(
            1,
            max(10, defaults.guidance_scale),
            defaults.guidance_scale,
            step=0.1,
            label="Classifier-free scale",
            info="1 is off; more follows the prompt more closely, with less variety.",
            elem_id="scale",
        )
        components.negative = gr.Textbox(
            defaults.negative_prompt,
            label="Negative prompt",
            info="Guide away from this, rather than from the empty prompt.",
            elem_id="negative",
        )
        components.clip_guidance_scale = gr.Slider(
            0,
            10,
            defaults.clip_guidance_scale,
            step=0.5,
            label="CLIP scale",
            info="0 is off; more follows the prompt more closely.",
            visible=studio.pipe.clip is not None,
            elem_id="clip",
        )
        components.auto = gr.Slider(
            1,
            5,
            defaults.autoguidance_scale,
            step=0.1,
            label="Autoguidance scale",
            info="1 is off; more goes further away from the weak model.",
            visible=studio.pipe.weak_stage is not None,
        )
        low, high = defaults.guidance_interval or (None, None)
        with gr.Row():
            components.low = gr.Number(
                low, label="From noise level", placeholder="0", minimum=0, min_width=120
            )
            components.high = gr.Number(
                high, label="To noise level", placeholder="no limit", minimum=0, min_width=120
            )


def _results(components: SimpleNamespace) -> None:
    with gr.Row(elem_id="line"):
        components.status = gr.HTML(status(IDLE), elem_id="status", padding=False)
        components.stop = gr.Button(
            "Stop", size="sm", interactive=False, scale=0, min_width=72, elem_id="stop"
        )
    components.gallery = gr.Gallery(
        show_label=False,
        format="png",
        columns=1,
        object_fit="contain",
        height="auto",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_id="gallery",
    )
    with gr.Row(elem_id="next", visible=False) as components.next:
        components.use = gr.Button("Use as input", size="sm", min_width=120, elem_id="use")
        components.like = gr.Button("More like this", size="sm", min_width=120, elem_id="like")
        components.download = gr.DownloadButton(
            "Download", size="sm", min_width=100, elem_id="download"
        )
    with gr.Accordion(
        "How it was made", open=False, visible=False, elem_id="made"
    ) as components.made:
        components.command = gr.Code(
            label="Command line", language="shell", interactive=False, wrap_lines=True,
            show_line_numbers=False, lines=1, buttons=["copy"], elem_id="command",
        )  # fmt: skip
        components.python = gr.Code(
            label="Python", language="python", interactive=False, wrap_lines=True,
            show_line_numbers=False, lines=1, buttons=["copy"], elem_id="python",
        )  # fmt: skip
        components.metadata = gr.Code(
            label="Metadata", language="json", interactive=False, wrap_lines=True,
            show_line_numbers=False, lines=1, buttons=["copy"], elem_id="metadata",
        )  # fmt: skip


def status(text: str, kind: str = "") -> str:
    """Return a status line as HTML; `text` is escaped."""
    return f'<p class="{kind}" role="status">{escape(text)}</p>'
