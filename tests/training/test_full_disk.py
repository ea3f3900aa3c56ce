"""A disk that fills during each kind of write: `tests.tools.full_disk`, shortened."""

import json

import pytest

import tests.tools.full_disk as tool
from glide_jax.errors import GlideError
from glide_jax.folders import write_atomically
from glide_jax.training.writers import TensorBoard


@pytest.mark.parametrize("kind", tool.WRITES)
def test_a_write_to_a_full_disk_is_one_line_and_loses_nothing(kind):
    assert tool.fill_all((0.0, 0.6), (kind,))[kind].startswith("error: ")


def test_an_error_of_a_write_names_the_file_not_its_temporary_one(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken") as caught:
        write_atomically(tmp_path / "taken", b"a")
    assert caught.value.filename == str(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_log_that_cannot_be_written_ends_at_once(tmp_path):
    log = TensorBoard(tmp_path / "logs")
    with tool.full_after(tmp_path, 0, own_disk=False), pytest.raises(GlideError) as caught:
        for step in range(10_000):
            log.scalars({"loss": 1.0}, step)
    assert str(caught.value).startswith(f"cannot write the log {tmp_path / 'logs'}: ")
    log.close()


@pytest.mark.slow
def test_a_run_resumes_when_there_is_space_again():
    with tool.small_disk(1) as (_, own):
        if not own:
            pytest.skip("only root may mount a small disk")
    lines = tool.fill_run((20_000, 3_000_000))
    assert all("No space left" in line for line in lines), json.dumps(lines)
