"""Checksums of saved weights."""

import json

import numpy as np
import pytest

from glide_jax.errors import GlideError
from glide_jax.weights.store import load_weights, save_weights


def test_an_altered_number_is_refused(tmp_path):
    save_weights(tmp_path, {}, {"a": np.ones(3, np.float32)})
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(GlideError) as caught:
        load_weights(tmp_path)
    advice = "is incomplete or damaged: download it or save the model again"
    assert str(caught.value) == f"{path} {advice}"


@pytest.mark.parametrize(("key", "refused"), [("noise_schedule", True), ("defaults", False)])
def test_another_network_in_the_config_is_refused_and_other_settings_are_not(
    tmp_path, key, refused
):
    config = {"noise_schedule": "cosine", "defaults": {"steps": 3}}
    save_weights(tmp_path, config, {"a": np.ones(3, np.float32)})
    (tmp_path / "config.json").write_text(json.dumps(config | {key: "linear"}))
    if not refused:
        assert load_weights(tmp_path)[0][key] == "linear"
        return
    with pytest.raises(GlideError, match="config.json describes another network than when model"):
        load_weights(tmp_path)


def test_a_file_without_checksum_is_read(tmp_path):
    save_weights(tmp_path, {}, {"a": np.ones(3, np.float32)})
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert set(header.pop("__metadata__")) == {"glide_jax.crc32"}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    assert load_weights(tmp_path)[1]["a"].tolist() == [1, 1, 1]
