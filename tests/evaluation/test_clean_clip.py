"""The CLIP of images without noise: equal to a computation by hand, in all formats."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from glide_jax.commands.evaluate import read
from glide_jax.errors import GlideError
from glide_jax.evaluation.extractors.clean_clip import open_clean_clip
from glide_jax.models.tokenizers import CLIPTokenizer
from glide_jax.weights import write_torch_file
from tests.support.extractor_weights import random_images

# Width of both encoders, side of images and patches, tokens of a caption, features.
WIDTH, SIDE, PATCH, CONTEXT, OUTPUT = 64, 32, 16, 12, 24
LONG = "Two dogs, running fast over a very long and far too green meadow"
CAPTIONS = ["a red apple", LONG, "ü", "one two", "blue", "a b c d e"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make(seed=0):
    """Random weights under transformers' names."""
    random = np.random.RandomState(seed)

    def array(*shape):
        return (random.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)

    t = {"logit_scale": np.array(math.log(20), np.float32)}
    for side, norms in (("text", ("final_layer_norm",)),
                        ("vision", ("pre_layrnorm", "post_layernorm"))):  # fmt: skip
        for norm in norms:
            t[f"{side}_model.{norm}.weight"] = 1 + array(WIDTH)
            t[f"{side}_model.{norm}.bias"] = array(WIDTH)
        t[f"{side}_projection.weight" if side == "text" else "visual_projection.weight"] = array(
            OUTPUT, WIDTH
        )
        for i in range(2):
            block = f"{side}_model.encoder.layers.{i}"
            for norm in ("layer_norm1", "layer_norm2"):
                t[f"{block}.{norm}.weight"], t[f"{block}.{norm}.bias"] = (
                    1 + array(WIDTH),
                    array(WIDTH),
                )
            for name, shape in (
                *((f"self_attn.{p}_proj", (WIDTH, WIDTH)) for p in ("q", "k", "v", "out")),
                ("mlp.fc1", (4 * WIDTH, WIDTH)), ("mlp.fc2", (WIDTH, 4 * WIDTH)),
            ):  # fmt: skip
                t[f"{block}.{name}.weight"], t[f"{block}.{name}.bias"] = (
                    2 * array(*shape),
                    array(shape[0]),
                )
    t["text_model.embeddings.token_embedding.weight"] = 8 * array(49408, WIDTH)
    t["text_model.embeddings.position_embedding.weight"] = array(CONTEXT, WIDTH)
    t["vision_model.embeddings.class_embedding"] = array(WIDTH)
    t["vision_model.embeddings.position_embedding.weight"] = array(1 + (SIDE // PATCH) ** 2, WIDTH)
    t["vision_model.embeddings.patch_embedding.weight"] = array(WIDTH, 3, PATCH, PATCH)
    return t


T = make()


def to_openai(t):
    """The same weights under the names of openai/CLIP."""
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
             "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip
    found = {
        "logit_scale": t["logit_scale"],
        "token_embedding.weight": t["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": t["text_model.embeddings.position_embedding.weight"],
        "text_projection": t["text_projection.weight"].T,
        "visual.proj": t["visual_projection.weight"].T,
        "visual.class_embedding": t["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": t["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": t["vision_model.embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = t[f"text_model.final_layer_norm.{kind}"]
        found[f"visual.ln_pre.{kind}"] = t[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = t[f"vision_model.post_layernorm.{kind}"]
        for ours, theirs in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
            for i in range(2):
                old, new = f"{ours}.encoder.layers.{i}", f"{theirs}.resblocks.{i}"
                for a, b in inner.items():
                    found[f"{new}.{b}.{kind}"] = t[f"{old}.{a}.{kind}"]
                found[f"{new}.attn.in_proj_{kind}"] = np.concatenate(
                    [t[f"{old}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                )
    return found


def by_hand(images, captions, heads=1, exact=False):
    """Cosines of images with captions, in float64."""
    t = {name: array.astype(np.float64) for name, array in T.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def dense(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def gelu(x):
        if exact:
            return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
        return x / (1 + np.exp(-1.702 * x))

    def encoder(x, side, causal):
        for i in range(2):
            name = f"{side}_model.encoder.layers.{i}"
            y = norm(x, f"{name}.layer_norm1")
            q, k, v = (dense(y, f"{name}.self_attn.{p}_proj") for p in "qkv")
            rows, parts = len(x), []
            for h in range(heads):
                at = slice(h * WIDTH // heads, (h + 1) * WIDTH // heads)
                logits = q[:, at] @ k[:, at].T / math.sqrt(WIDTH // heads)
                logits += np.triu(np.full((rows, rows), -np.inf), 1) if causal else 0
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                parts.append(weights / weights.sum(-1, keepdims=True) @ v[:, at])
            x = x + dense(np.concatenate(parts, -1), f"{name}.self_attn.out_proj")
            y = gelu(dense(norm(x, f"{name}.layer_norm2"), f"{name}.mlp.fc1"))
            x = x + dense(y, f"{name}.mlp.fc2")
        return x

    def image(pixels):
        x = (pixels / 255 - MEAN) / STD
        kernel = t["vision_model.embeddings.patch_embedding.weight"].transpose(0, 2, 3, 1)
        corners = [(i, j) for i in range(0, SIDE, PATCH) for j in range(0, SIDE, PATCH)]
        x = np.stack([
            np.einsum("ohwc,hwc->o", kernel, x[i : i + PATCH, j : j + PATCH]) for i, j in corners
        ])  # fmt: skip
        x = np.concatenate([t["vision_model.embeddings.class_embedding"][None], x])
        x = x + t["vision_model.embeddings.position_embedding.weight"]
        x = encoder(norm(x, "vision_model.pre_layrnorm"), "vision", causal=False)
        return norm(x[0], "vision_model.post_layernorm") @ t["visual_projection.weight"].T

    def text(caption):
        ids = CLIPTokenizer(CONTEXT).encode(caption)[: CONTEXT - 2]
        ids = [49406, *ids, 49407]
        x = t["text_model.embeddings.token_embedding.weight"][ids]
        x = x + t["text_model.embeddings.position_embedding.weight"][: len(ids)]
        x = norm(encoder(x, "text", causal=True), "text_model.final_layer_norm")
        return x[-1] @ t["text_projection.weight"].T

    a, b = np.stack([*map(image, images)]), np.stack([*map(text, captions)])
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return (a * b).sum(1)


IMAGES = random_images(6, SIDE, SIDE, seed=4)


def folder_of(path, **described):
    path.mkdir()
    save_file(T, path / "model.safetensors")
    if described:
        (path / "config.json").write_text(
            json.dumps({"vision_config": described, "text_config": described})
        )
    return path


def cosines(clip):
    features = clip.image(IMAGES)
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    return (features * clip.texts(CAPTIONS)).sum(1)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({}, {}),
        ({"hidden_act": "quick_gelu", "num_attention_heads": 2}, {"heads": 2}),
        ({"hidden_act": "gelu", "num_attention_heads": 4}, {"heads": 4, "exact": True}),
    ],
)
def test_cosines_are_those_computed_by_hand(tmp_path, described, expected):
    clip = open_clean_clip(folder_of(tmp_path / "clip", **described))
    assert clip.scale == pytest.approx(20, rel=1e-6)
    assert cosines(clip) == pytest.approx(by_hand(IMAGES, CAPTIONS, **expected), abs=2e-5)


def test_openai_names_give_the_same(tmp_path):
    write_torch_file(tmp_path / "clip.pt", to_openai(T))
    clip = open_clean_clip(tmp_path / "clip.pt")
    assert cosines(clip) == pytest.approx(by_hand(IMAGES, CAPTIONS), abs=2e-5)


def test_the_score_of_a_folder_under_its_three_definitions(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "c.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    folder_of(tmp_path / "clip")
    words = (
        "--generated",
        "images",
        "--captions",
        "c.txt",
        "--clip-score-model",
        "clip",
        "--out",
        "o.json",
    )
    words = [word if word.startswith("--") else str(tmp_path / word) for word in words]
    read(["fid", *words]).run()
    found = json.loads((tmp_path / "o.json").read_text())["clip_score"]
    expected = by_hand(IMAGES, CAPTIONS)
    assert (expected < 0).any() and (expected > 0).any()  # the definitions differ
    positive = np.maximum(expected, 0).mean()
    assert found["cosine"] == pytest.approx(expected.mean(), abs=2e-5)
    assert found["clip_score"] == pytest.approx(20 * expected.mean(), abs=4e-4)
    assert found["clip_score_100"] == pytest.approx(100 * positive, abs=2e-3)
    assert found["clip_s"] == pytest.approx(2.5 * positive, abs=5e-5)
    assert capsys.readouterr().out.splitlines()[0] == (
        f"CLIP score: {found['clip_score']:.4f}; 100 max(cos, 0): {found['clip_score_100']:.4f}; "
        f"CLIP-S: {found['clip_s']:.4f} (CLIP ViT-64/16, 32 pixels)"
    )
    with pytest.raises(
        GlideError, match="--clip-score-model is for the CLIP score: give --captions"
    ):
        read(["fid", *words[:2], *words[4:], "--features", "scorer", "--real", "r"]).run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("text_")],
         "has CLIP ViT-64/16, 32 pixels and no text encoder: "
          "give a whole CLIP to --clip-score-model"),
        (lambda t: t.pop("logit_scale"), "lacks logit_scale: give a whole CLIP"),
        (lambda t: t.pop("text_projection.weight"), "lacks text_projection.weight"),
        (lambda t: t.update({"text_model.embeddings.token_embedding.weight": np.zeros((9, 64))}),
         "has 9 token ids and a text width of 64: only CLIPs with OpenAI's 49,408 ids are read"),
        (lambda t: t.update({"text_projection.weight": np.zeros((5, 64), "f4")}),
         "image and text features differ in length"),
    ],
)  # fmt: skip
def test_what_is_no_whole_clip_is_refused(tmp_path, change, message):
    t = dict(T)
    change(t)
    save_file(t, tmp_path / "model.safetensors")
    with pytest.raises(GlideError, match=message):
        open_clean_clip(tmp_path)


def test_an_unknown_activation_is_refused(tmp_path):
    with pytest.raises(GlideError, match="has the activation relu, which no known CLIP has"):
        open_clean_clip(folder_of(tmp_path / "clip", hidden_act="relu"))
