"""The model card: its front matter is YAML, its commands fit the kind of model."""

from dataclasses import asdict, replace

import pytest

from glide_jax.models.presets import clip64
from glide_jax.weights.hub_names import HubName
from glide_jax.weights.model_card import Facts, model_card
from tests.support.commands import TINY

NAME = HubName("user/tiny", "side", "sub")


def card(variant: str = "base", **options) -> str:
    config = {
        "recipe": "tiny",
        "steps": 1000,
        "model": asdict(replace(TINY, variant=variant)),
        "noise_schedule": "cosine",
        "diffusion_steps": 1000,
        "prediction_type": "eps",
        "defaults": {"steps": 4},
        "prompts": ["a cat's\n  hat"],
    }
    facts = Facts(12345, ["float32"], {"data": "a|b"}, options.pop("began_with", ""))
    return model_card(NAME, config, facts, **options)


def front_matter(text: str) -> dict:
    yaml = pytest.importorskip("yaml")
    before, head, _ = text.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(head)


def test_the_front_matter():
    assert front_matter(card()) == {
        "license": "unknown",
        "library_name": "glide-jax",
        "pipeline_tag": "text-to-image",
        "tags": ["glide-jax", "jax", "flax", "glide", "diffusion", "text-to-image"],
    }
    assert front_matter(card(license="cc-by-4.0"))["license"] == "cc-by-4.0"


@pytest.mark.parametrize(
    ("began_with", "base_model"),
    [("hf://them/big@v1/a", "them/big"), ("openai/base", None), ("runs/mine", None)],
)
def test_only_a_repository_of_the_hub_is_a_base_model(began_with, base_model):
    assert front_matter(card(began_with=began_with)).get("base_model") == base_model


@pytest.mark.parametrize(
    ("variant", "task", "command", "call"),
    [
        ("base", "text-to-image", "--weights", '"'),
        ("inpaint", "text-to-image", "--weights", '"'),
        ("superres", "image-to-image", "--upsampler", 'upsampler="'),
        ("superres_inpaint", "image-to-image", "--upsampler", 'upsampler="'),
    ],
)
def test_the_commands_fit_the_model(variant, task, command, call):
    text = card(variant)
    assert front_matter(text)["pipeline_tag"] == task
    line = f"""\nglide-jax sample 'a cat'"'"'s hat' {command} hf://user/tiny@side/sub"""
    assert f"{line}\n" in text
    assert (f"{line} --image photo.png --mask mask.png\n" in text) == (variant == "inpaint")
    assert f'\npipe = glide.load({call}hf://user/tiny@side/sub")\n' in text
    assert '\npipe("a cat\'s hat", num=4).save("samples")\n' in text


def test_the_tables():
    text = card()
    assert "| recipe | `tiny` |\n| steps | 1,000 |\n| prediction | eps |\n" in text
    assert "| data | a\\|b |" in text
    assert "| steps | `4` |" in text
    assert "of 12,345 parameters" in text and "at 16x16 pixels" in text


def test_a_noised_clip():
    text = model_card(NAME, {"format": 1, "clip": asdict(clip64())}, Facts(1, ["bfloat16"]))
    assert front_matter(text)["pipeline_tag"] == "zero-shot-image-classification"
    assert "--clip-model hf://user/tiny@side/sub --clip-guidance-scale 3\n" in text
    assert "## Training" not in text and "Default settings" not in text
