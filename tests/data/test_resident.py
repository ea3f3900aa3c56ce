"""Data on the device: the same records, captions and crops as through the loader."""

from dataclasses import replace

import numpy as np
import pytest

from glide_jax.data import resident
from glide_jax.data.batches import make_batches
from glide_jax.data.data_config import DataConfig
from glide_jax.data.records import Source
from glide_jax.data.resident import make_resident, take
from glide_jax.errors import UsageError
from glide_jax.models.tokenizers import GPT2Tokenizer

TEMPLATES = ("{caption}", "{a_caption}, {style}", "{style}")


def records(count: int, side: int = 8) -> Source:
    """Return records of noise; every third has two captions, every second names a side."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        caption = f"apple {i}" if i % 2 else f"arrow {i} to the left"
        made.append(
            {
                "image": rng.integers(0, 256, (side, side, 3), np.uint8),
                "caption": (caption, f"fruit {i}") if i % 3 == 0 else caption,
                "style": "flat style",
            }
        )
    return Source(made)


@pytest.mark.parametrize("crop", ["centre", "window"])
@pytest.mark.parametrize("group_by", ["", "style"])
def test_equals_the_loader(crop: str, group_by: str) -> None:
    config = DataConfig(
        caption_templates=TEMPLATES, crop=crop, flip=True, group_by=group_by, on_device="yes"
    )
    common = {
        "batch_size": 6,
        "tokenizer": GPT2Tokenizer(16),
        "size": 8 if crop == "centre" else 5,
        "seed": 3,
    }
    loader = make_batches(records(10), config, **common)
    resident = make_resident(records(10), config, steps_per_item=2, **common)
    assert resident is not None
    for _ in range(3):
        picks = next(resident)
        for call in range(2):
            expected = next(loader)
            got = take(resident.data, type(picks)(*(x[call] for x in picks)), common["size"])
            for name in ("image", "tokens", "caption_mask", "row"):
                np.testing.assert_array_equal(np.asarray(got[name]), expected[name])
        assert resident.get_state() == loader.get_state()
    loader.close()


def test_resumes_and_shares_like_the_loader() -> None:
    config = DataConfig(caption_templates=TEMPLATES, on_device="yes")
    common = {
        "batch_size": 4,
        "tokenizer": GPT2Tokenizer(16),
        "size": 8,
        "seed": 3,
        "steps_per_item": 1,
    }
    whole = make_resident(records(10), config, **common)
    next(whole)
    second = next(whole)
    parts = []
    for process in ((0, 2), (1, 2)):
        part = make_resident(records(10), config, process=process, **common)
        part.set_state({"position": 4})
        parts.append(next(part))
    for mine, *theirs in zip(second, *parts, strict=True):
        np.testing.assert_array_equal(mine, np.concatenate(theirs, axis=1))


def test_refuses_what_it_cannot_hold(monkeypatch, capsys) -> None:
    common = {
        "batch_size": 2,
        "tokenizer": GPT2Tokenizer(16),
        "size": 8,
        "seed": 0,
        "steps_per_item": 1,
    }
    with pytest.raises(UsageError, match="choose --data.crop"):
        make_resident(records(4), DataConfig(crop="random", on_device="yes"), **common)
    broken = Source([*records(3).records, {"image": np.zeros((4, 4)), "caption": "x"}])
    config = DataConfig(crop="window", on_device="yes")
    with pytest.raises(UsageError, match="--data.on-device no"):
        make_resident(broken, config, **common)
    assert make_resident(records(4), DataConfig(on_device="no"), **common) is None
    # Where nobody asked for it, a loader takes over, and says so.
    monkeypatch.setattr(resident, "fits", lambda *_: True)
    assert make_resident(broken, replace(config, on_device="auto"), **common) is None
    assert "note: a loader makes the batches" in capsys.readouterr().err
    monkeypatch.undo()
    # A CPU reads its own memory anyway.
    assert make_resident(records(4), DataConfig(), **common) is None
