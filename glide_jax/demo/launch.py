"""The command `glide-jax demo`: loads weights and serves the page."""

import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, arg

from glide_jax.demo.studio import Studio
from glide_jax.devices.runtime import enable_compilation_cache
from glide_jax.errors import GlideError, UsageError, one_line_errors
from glide_jax.folders import check_writable
from glide_jax.pipeline.loading import load
from glide_jax.pipeline.options import NO_DEFAULT_SHOWN, SampleModelOptions

DESCRIPTION = """Open a page to generate and edit images in a browser.

It needs gradio: pip install '.[demo]'. The page works without a network connection, and only this
machine can open it unless --share or --host says otherwise."""
LOCAL = "127.0.0.1"
# Larger uploads are refused by the page.
LARGEST_UPLOAD = "50mb"


@dataclass(frozen=True)
class DemoOptions:
    """What the page runs, and who can open it.

    Attributes:
        out: Folder for the images. No image in it is overwritten. The input images and masks are
            saved in its subfolder inputs.
        port: Port of the page. Default: the first free one from 7860.
        host: Address to listen on. 0.0.0.0 lets other machines of the network open the page.
        share: Ask Gradio for a public link, valid for up to a week (needs a network connection).
            Anyone who has the link can generate images on this machine.
        open: Open the page in this machine's browser.
    """

    out: Annotated[Path, arg(aliases=["-o"])] = Path("samples")
    port: Annotated[int | None, NO_DEFAULT_SHOWN] = None
    host: str = LOCAL
    share: bool = False
    open: bool = False
    model: OmitArgPrefixes[SampleModelOptions] = field(default_factory=SampleModelOptions)


def read_demo_options(arguments: Sequence[str]) -> DemoOptions:
    """Return the options of a command line."""
    config = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(
        DemoOptions,
        prog="glide-jax demo",
        description=DESCRIPTION,
        args=list(arguments),
        config=config,
    )


def open_studio(options: DemoOptions) -> Studio:
    """Load the weights of the options.

    Raises:
        UsageError: the weights generate nothing from text alone, or see `load`.
        GlideError: the folder of the results cannot be written.
    """
    model = options.model
    check_writable(options.out)
    pipe = load(**model.load_arguments())
    if pipe.model.config.upsamples:
        raise UsageError(f"{model.weights} is an upsampler: give the weights of a base model")
    return Studio(pipe, model, options.out.expanduser())


def serve(options: DemoOptions) -> None:
    """Serve the page until it is interrupted.

    Raises:
        UsageError: gradio is not installed; or see `open_studio`.
        GlideError: the port is taken, or the link cannot be made.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UsageError("the page needs gradio: pip install '.[demo]'")
    # Before gradio is imported. Its files go to a folder of this process, which is removed.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    with tempfile.TemporaryDirectory(prefix="glide_jax_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        studio = open_studio(options)
        warm = threading.Thread(target=studio.warm, daemon=True)
        warm.start()
        try:
            _serve(studio, options)
        finally:
            studio.close()
            warm.join()


def _serve(studio: Studio, options: DemoOptions) -> None:
    # Here, since nothing else needs gradio, and after the compiler has begun to work.
    from glide_jax.demo.page import LAUNCH, build

    page = build(studio)
    try:
        page.launch(
            server_name=options.host,
            server_port=options.port,
            # None: Gradio makes a link in Colab, where nothing else can be opened.
            share=options.share or None,
            inbrowser=options.open,
            max_file_size=LARGEST_UPLOAD,
            prevent_thread_lock=True,
            **LAUNCH,
        )
    except OSError as error:
        where = options.host + (f", port {options.port}" if options.port else "")
        raise GlideError(f"cannot serve the page on {where}: {error}") from None
    if options.share and not page.share_url:
        page.close()
        raise GlideError("there is no public link: it needs a network connection")
    print(f"open {page.share_url or page.local_url} in a browser; Ctrl+C stops the page")
    sys.stdout.flush()
    page.block_thread()


def main(arguments: Sequence[str]) -> None:
    """Run `glide-jax demo`."""
    options = read_demo_options(arguments)
    with one_line_errors("stopped"):
        enable_compilation_cache()
        serve(options)
