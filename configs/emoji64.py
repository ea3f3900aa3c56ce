"""emoji64: the embedded text-to-image model.

Two trainings, one after the other. Size "things" learns 766 things in eleven styles, on a GPU.
Size "hundred", the one that ships and is meant where no size is said, goes on from there with a
hundred of them in four styles, in small steps, on a CPU.

Result:   64x64 emoji of a hundred things in 4 styles, the style chosen by the caption.
Data:     324 pictures of emoji64 (docs/data.md says how to make it), 4,909 for "things"; for 69 of
          the hundred things one or two styles are held out.
Hardware: "things": one GPU, 5 GB of its memory; "hundred": two CPU cores, 2 GB.
Time:     "things": nine minutes on one H200, reckoned from 11,400 pictures/s; "hundred":
          two hours on two cores of a 2 GHz AMD EPYC as two devices (docs/training.md), reckoned
          from 5.4 pictures/s.
Command:  python train.py --config configs/emoji64.py:things --data.source emoji64.npz \\
              --data.workers 4
          python train.py --config configs/emoji64.py --data.source emoji64.npz
"""

from dataclasses import replace
from pathlib import Path

from glide_jax.data.config import DataConfig
from glide_jax.models import presets
from glide_jax.training.config import OptimiserConfig, TrainConfig

SIZES = ("hundred", "things")
STYLES = ("Google Noto style", "Twitter flat style", "Fluent flat style", "EmojiOne style")


def concepts(size: str) -> tuple[str, ...]:
    """Names of the things that a size knows.

    "things" are drawn in at least three of STYLES: animals, plants, food, places, things and
    games under a name of one or two words; some faces and hearts.
    """
    path = Path(__file__).with_name(f"emoji64_{size}.txt")
    return tuple(path.read_text(encoding="utf-8").splitlines())


def get_config(size: str = "hundred") -> TrainConfig:
    config = TrainConfig(
        name="emoji64_things",
        model=presets.emoji64(),
        # At so few steps, predicting noise leaves the large shapes and colours untrained.
        prediction="v",
        data=DataConfig(
            source="emoji64",
            # "red apple" lies in test_concept, whose concepts this small model is not tested on.
            split="train+test_concept",
            concepts=concepts(size),
            captions=("{caption}", "{a_caption}", "{caption}, {style}", "{a_caption}, {style}"),
        ),
        optimiser=OptimiserConfig(learning_rate=1.5e-3, warmup=500, beta_2=0.99, ema=0.999),
        steps=23_000,
        batch_size=256,
        # From the start, rather than in a training of its own as in the paper.
        caption_dropout=0.1,
        save_every=1000,
        sample_every=1000,
        # Chosen by a sweep: docs/evaluation.md.
        sample_guidance_scale=1.5,
        sample_clip_scale=4.0,
        sample_prompts=(
            "a red apple",
            "a penguin, Twitter flat style",
            "a rocket",
            "a hamburger, Google Noto style",
            "a cactus",
            "an octopus, Fluent flat style",
        ),
    )
    if size == "things":
        return config
    return replace(
        config,
        name="emoji64",
        init_from="runs/emoji64_things",
        data=replace(config.data, styles=STYLES),
        # A CPU has time for few pictures: better many small steps than few exact ones.
        optimiser=replace(config.optimiser, learning_rate=5e-4, warmup=100, decay="cosine"),
        steps=5000,
        batch_size=8,
        save_every=200,
        sample_every=0,
    )
