"""The model card of a folder of weights: a README.md that the Hugging Face Hub shows."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glide_jax.models.presets import CLIPConfig, ModelConfig, model_config
from glide_jax.weights.hub_names import HubName, on_hub, read_hub_name

LIBRARY = "glide-jax"
# The value of the Hub for weights of which no licence is stated.
UNKNOWN = "unknown"
_TASKS = {  # variant: sentence, task of the Hub, more tags
    "base": ("makes images from a caption", "text-to-image", ["text-to-image"]),
    "inpaint": (
        "makes images from a caption and fills masked regions",
        "text-to-image",
        ["text-to-image", "inpainting"],
    ),
    "superres": ("enlarges images, with their caption", "image-to-image", ["super-resolution"]),
    "superres_inpaint": (
        "enlarges images whose masked region was filled",
        "image-to-image",
        ["super-resolution", "inpainting"],
    ),
}
_CLIP = (
    "compares captions with images of every noise level",
    "zero-shot-image-classification",
    ["clip"],
)


@dataclass(frozen=True)
class Facts:
    """What is known of weights besides their `config.json`.

    Attributes:
        parameters: number of values in the arrays.
        dtypes: dtypes of the arrays.
        training: lines of the table on the training, name -> text.
        began_with: the weights that the training began with; "": random or unknown weights.
    """

    parameters: int
    dtypes: Sequence[str]
    training: Mapping[str, str] = field(default_factory=dict)
    began_with: str = ""


def model_card(
    name: HubName, config: Mapping[str, Any], facts: Facts, license: str = UNKNOWN
) -> str:
    """Return the text of the README.md of a repository.

    Args:
        name: where the folder will be.
        config: the `config.json` of the weights.
        facts: what else is known.
        license: an identifier of the Hub, such as "mit".
    """
    sizes = CLIPConfig(**config["clip"]) if "clip" in config else model_config(config["model"])
    does, task, tags = _CLIP if isinstance(sizes, CLIPConfig) else _TASKS[sizes.variant]
    head: dict[str, Any] = {
        "license": license,
        "library_name": LIBRARY,
        "pipeline_tag": task,
        "tags": [
            LIBRARY,
            "jax",
            "flax",
            *([] if "clip" in tags else ["glide", "diffusion"]),
            *tags,
        ],
    }
    if on_hub(facts.began_with):
        head["base_model"] = read_hub_name(facts.began_with).repo
    kind = "noised CLIP" if isinstance(sizes, CLIPConfig) else "GLIDE model"
    title = (name.path or name.repo).rpartition("/")[2]
    parts = [
        _front_matter(head),
        f"# {title}",
        f"A {kind} of {facts.parameters:,} parameters that {does}, at "
        f"{sizes.image_size}x{sizes.image_size} pixels. It is for glide-jax, the method of GLIDE "
        "(arXiv 2112.10741) in JAX.",
        "## Use",
        "Install glide-jax with its extra `hub` (`pip install '.[hub]'` in a checkout), then:",
        _use(str(name), sizes, config.get("prompts") or ()),
    ]
    training = _training(config, facts)
    if training:
        parts += ["## Training", _table(training)]
    if config.get("defaults"):
        parts += [
            "## Default settings of sampling",
            _table({key: f"`{value}`" for key, value in config["defaults"].items()}),
        ]
    parts += [
        "## Files",
        f"`model.safetensors` holds the arrays ({', '.join(facts.dtypes)}), `config.json` the "
        "sizes of the network. No code comes with them.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(head: Mapping[str, Any]) -> str:
    """Return YAML; each text is in JSON's quotes, which YAML reads."""
    lines = ["---"]
    for key, value in head.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join([*lines, "---"])


def _training(config: Mapping[str, Any], facts: Facts) -> dict[str, str]:
    entries = {"recipe": f"`{config['recipe']}`"} if config.get("recipe") else {}
    if "steps" in config:
        entries["steps"] = f"{config['steps']:,}"
    if "prediction_type" in config:
        entries["prediction"] = config["prediction_type"]
        entries["noise schedule"] = f"{config['noise_schedule']}, {config['diffusion_steps']} steps"
    return entries | dict(facts.training)


def _use(name: str, sizes: ModelConfig | CLIPConfig, prompts: Sequence[str]) -> str:
    """Return the commands that use the weights."""
    prompt = " ".join((prompts[0] if prompts else "a red apple").split())
    if isinstance(sizes, CLIPConfig):
        options, load = f"--clip-model {name} --clip-guidance-scale 3", f'clip_model="{name}"'
        call = "clip_guidance_scale=3"
    elif sizes.upsamples:
        options, load, call = f"--upsampler {name}", f'upsampler="{name}"', "num=4"
    else:
        options, load, call = f"--weights {name}", f'"{name}"', "num=4"
    lines = ["```sh", f"glide-jax sample {shlex.quote(prompt)} {options}"]
    if isinstance(sizes, ModelConfig) and sizes.variant == "inpaint":
        edit = "--image photo.png --mask mask.png"
        lines.append(f"glide-jax sample {shlex.quote(prompt)} {options} {edit}")
    lines += [
        "```",
        "",
        "```python",
        "import glide_jax as glide",
        "",
        f"pipe = glide.load({load})",
        f'pipe({json.dumps(prompt, ensure_ascii=False)}, {call}).save("samples")',
        "```",
    ]
    return "\n".join(lines)


def _table(rows: Mapping[str, str]) -> str:
    def cell(text: str) -> str:
        return " ".join(str(text).split()).replace("|", "\\|")

    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {cell(v)} |" for k, v in rows.items())])
