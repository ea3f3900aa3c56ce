"""What a run of `train.py` has on record for a model card."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from glide_jax.training.config import RunConfig, TrainConfig, read_config
from glide_jax.weights.hub_names import on_hub


def run_facts(run: Path, step: int) -> dict[str, str]:
    """Return the lines of a table on a run, name -> text, in the order in which they are shown.

    Of local paths only the last part is in it: a card is public.

    Args:
        run: the folder of the run.
        step: the step of the weights; what was logged after it does not count.

    Raises:
        GlideError: the recipe cannot be read.
    """
    config = read_config(run / "config.json")
    optimiser = config.optimiser
    facts = {
        "planned steps": f"{config.steps:,}" if step < config.steps else "",
        "batch size": f"{config.batch_size:,}",
        "data": f"`{shown(config.data.source)}`" if config.data.source else "",
        "split": f"`{config.data.split}`" if config.data.split else "",
        "began with": f"`{shown(config.starts_from)}`" if config.starts_from else "random weights",
        "objective": config.objective if isinstance(config, TrainConfig) else "contrastive",
        "optimiser": f"{optimiser.kind}, learning rate {optimiser.learning_rate:g}, "
        f"{optimiser.lr_decay}",
        "EMA": f"{optimiser.ema:g}",
        "dtype of the trunk": config.dtype,
        "seed": str(config.seed),
    }
    return {name: text for name, text in (facts | _logged(run, config, step)).items() if text}


def shown(source: str) -> str:
    """Return a source as a public text has it: of a path on this machine, the last part."""
    if on_hub(source) or "://" in source:
        return source
    local = source.startswith(("/", "~", ".")) or "\\" in source or Path(source).exists()
    return Path(source).name if local else source


def _logged(run: Path, config: RunConfig, step: int) -> dict[str, str]:
    """Return the last held-out loss and the time, where there are logs."""
    loss: tuple[int, float] | None = None
    seconds = 0.0
    for file in sorted((run / "logs").glob("*tfevents*")):
        times = []
        for event in events(file):
            if event.step > step:
                continue
            times.append(event.wall_time)
            for value in event.summary.value:
                if value.tag == "held_out/loss" and (loss is None or event.step >= loss[0]):
                    loss = event.step, value.simple_value
        seconds += times[-1] - times[0] if times else 0.0
    facts = {}
    if loss is not None:
        facts["held-out loss"] = f"{loss[1]:.5g} (step {loss[0]:,}, `{config.validation_split}`)"
    if seconds:
        facts["time by the log"] = f"{seconds / 60:.1f} minutes, with compilation"
    return facts


def events(file: Path) -> Iterator[Any]:
    """Yield the events of a file of TensorBoard's, up to a damaged or unfinished one.

    A record: 8 bytes little-endian with its size, 4 of a checksum, the event, 4 of a checksum.
    """
    with file.open("rb") as stream:
        while len(head := stream.read(12)) == 12:
            (size,) = struct.unpack("<Q", head[:8])
            data = stream.read(size) if size < 1 << 30 else b""
            if len(data) < size or len(stream.read(4)) < 4:
                return
            event = Event()
            try:
                event.ParseFromString(data)
            except DecodeError:
                return
            yield event
