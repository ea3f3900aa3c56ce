"""The machine behind the page: one pipeline, one run at a time, previews, and a way to stop."""

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glide_jax.demo.actions import Call, loading_arguments
from glide_jax.errors import GlideError
from glide_jax.pipeline.images import Images
from glide_jax.pipeline.options import SampleModelOptions
from glide_jax.pipeline.pipeline import Pipeline, Preview

# Seconds without a step after which a run is probably compiling.
SLOW = 2.0
# Seconds between two previews, at least: each costs the browser some work.
PAUSE = 0.25


@dataclass(frozen=True)
class Update:
    """What a run reports.

    Attributes:
        stage: "waiting", "compiling", "running", "done" or "stopped".
        images: the latest estimates, or the result.
        step: network evaluations of this stage of the cascade so far.
        files: the files of the result.
        seconds: since the beginning of the run.
    """

    stage: str
    images: Images | None = None
    step: int = 0
    files: tuple[str, ...] = ()
    seconds: float = 0.0


class Stopped(Exception):
    """Ends a run from inside, between two network evaluations."""


@dataclass
class Studio:
    """A loaded pipeline and everything that the page's visitors share.

    Attributes:
        pipe: the pipeline.
        model: the options that it was loaded with.
        out: the folder of the results; the images and masks to edit are in its `inputs`.
        ready: set when the usual program is compiled.
        closed: set when nothing more is to be run.
    """

    pipe: Pipeline
    model: SampleModelOptions
    out: Path
    ready: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)
    _one: threading.Lock = field(default_factory=threading.Lock)
    _stops: dict[str, threading.Event] = field(default_factory=dict)

    @property
    def side(self) -> int:
        """The side of the results, in pixels."""
        last_stage = self.pipe.upsampler or self.pipe
        return last_stage.model.config.image_size

    @property
    def inputs(self) -> Path:
        """The folder of the images and masks that are edited."""
        return self.out / "inputs"

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of `glide_jax.load`."""
        return loading_arguments(self.model)

    def more(self, num: int) -> dict[str, Any]:
        """Return the arguments of each call that follow from the options and the machine.

        On a CPU one image at a time takes no longer than several, and their number then compiles
        nothing again.
        """
        arguments: dict[str, Any] = {}
        size = self.model.batch_size
        if size is None and num > 1 and jax.default_backend() == "cpu":
            size = 1
        if size is not None:
            arguments["batch_size"] = size
        upsampler = {"steps": self.model.upsampler_steps, "sampler": self.model.upsampler_sampler}
        upsampler = {name: value for name, value in upsampler.items() if value is not None}
        return arguments | ({"upsampler": upsampler} if upsampler else {})

    def warm(self) -> None:
        """Compile the usual programs: text to image, then filling a mask and variations.

        The first result appears sooner: the page can be opened, and used, meanwhile.
        """
        side = self.pipe.model.config.image_size
        image, mask = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8)
        mask[: side // 2] = 255
        arguments: Any = {"progress": False, "preview_every": 1, **self.more(1)}
        prompt = (*self.pipe.model.prompts, "")[0]
        try:
            with self._one:
                for _ in self.pipe.stream(prompt, **arguments):
                    if self.closed.is_set():
                        return
            self.ready.set()
            for more in (
                {"image": image, "mask": mask},
                {"guidance_scale": 1.0, "clip_guidance_scale": 0},
            ):
                for _ in self.pipe.stream(prompt, **arguments, **more):
                    if self.closed.is_set():
                        return
        except GlideError as error:
            print(f"note: cannot prepare the usual programs: {error}", file=sys.stderr)
        finally:
            self.ready.set()

    def allow(self, visitor: str) -> None:
        """Let a visitor's next run go on until `stop`."""
        self._stops[visitor] = threading.Event()

    def stop(self, visitor: str) -> None:
        """Stop a visitor's run, if there is one, before its next network evaluation."""
        if visitor in self._stops:
            self._stops[visitor].set()

    def forget(self, visitor: str) -> None:
        """Stop what a visitor who left has begun."""
        self.stop(visitor)
        self._stops.pop(visitor, None)

    def close(self) -> None:
        """Stop what runs, and wait a little for its end.

        A process that exits while it computes ends with a message of the C++ library.
        """
        self.closed.set()
        for visitor in list(self._stops):
            self.stop(visitor)
        if self._one.acquire(timeout=10):
            self._one.release()

    def run(self, call: Call, visitor: str = "") -> Iterator[Update]:
        """Run a call, and report its progress; the last report holds the result.

        Raises:
            UsageError, GlideError: those of the pipeline; or the result cannot be saved.
        """
        stop, begun = self._stops.setdefault(visitor, threading.Event()), time.monotonic()
        if not self.ready.is_set():
            yield Update("compiling")
            while not (self.ready.wait(0.1) or stop.is_set()):
                pass
        with self._one:
            update, files, shown = Update("stopped"), (), 0.0
            if not stop.is_set():
                for update in _in_thread(lambda preview: call.run(self.pipe, preview), stop):
                    now = time.monotonic()
                    if update.stage in ("running", "compiling") and now - shown > PAUSE:
                        shown = now
                        yield replace(update, seconds=now - begun)
            if update.stage == "done" and update.images is not None:
                files = tuple(map(str, update.images.save(self.out)[: len(update.images)]))
            yield replace(update, files=files, seconds=time.monotonic() - begun)


def _in_thread(begin: Callable[[Preview], Images], stop: threading.Event) -> Iterator[Update]:
    """Run `begin(preview)` in a thread; yield the newest preview whenever asked, then the end.

    "compiling" is reported where nothing comes for a while. The thread has ended when the iterator
    has, also when that is closed early.
    """
    reports: queue.SimpleQueue[Update | BaseException] = queue.SimpleQueue()
    latest, closed = Update("waiting"), threading.Event()

    def preview(images: Images) -> None:
        nonlocal latest
        upsampler = latest.images.settings.get("upsampler") if latest.images else None
        same_stage = bool(images.settings.get("upsampler")) == bool(upsampler)
        latest = Update("running", images, latest.step + 1 if same_stage else 1)
        reports.put(latest)
        if stop.is_set() or closed.is_set():
            raise Stopped

    def work() -> None:
        try:
            reports.put(Update("done", begin(preview), latest.step))
        except Stopped:
            reports.put(replace(latest, stage="stopped"))
        except BaseException as error:
            reports.put(error)

    def newest() -> Update | BaseException:
        try:
            report = reports.get(timeout=SLOW)
        except queue.Empty:
            return latest if latest.images else Update("compiling")
        while isinstance(report, Update) and report.stage == "running" and not reports.empty():
            report = reports.get()
        return report

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            report = newest()
            if isinstance(report, BaseException):
                raise report
            yield report
            if report.stage in ("done", "stopped"):
                return
    finally:
        closed.set()
        thread.join()
