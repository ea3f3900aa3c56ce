"""The Python of the README and of guide/parts.md runs; the README's files and commands exist."""

import re
import shlex

from glide_jax.data.sources import open_source
from glide_jax.training.command_line import parse_recipe
from tests.support.commands import ROOT, make_images, run

README = (ROOT / "README.md").read_text()
PARTS = (ROOT / "docs" / "guide" / "parts.md").read_text()
# As few as the test needs: more would only take longer.
FEWER = {"num=4": "num=1", "steps=20": "steps=2"}


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_python_runs_as_written_but_for_the_numbers_of_images_and_steps():
    code = "\n".join(blocks("python"))
    for usual, few in FEWER.items():
        assert usual in code
        code = code.replace(usual, few)
    # The README's guidance is used too.
    code += 'pipe("a red apple", steps=2, guidance=[classifier_free(3.0), glide.clamp_x_0()])\n'
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


def test_the_parts_run_alone_as_written():
    result = run("-c", "\n".join(blocks("python", PARTS)))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "(1, 16, 16, 3) (1, 16, 16, 3)"


def test_every_file_it_names_exists():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    configs = re.findall(r"configs/\w+\.py", README)
    missing = [name for name in links + configs if not (ROOT / name).exists()]
    assert links and configs and not missing


def test_every_option_it_names_exists():
    shell = "\n".join(blocks("sh"))
    sample = run("sample.py", "--help").stdout
    lines = [line for line in shell.splitlines() if line.startswith("glide-jax sample")]
    options = {o for line in lines for o in re.findall(r" (--[\w-]+)", line)}
    assert options and all(option in sample for option in options), options


def test_its_training_on_your_own_data_reads_it(tmp_path):
    shell = "\n".join(blocks("sh")).replace("\\\n", " ")
    (line,) = (line for line in shell.splitlines() if "--data.source images" in line)
    folder = make_images(tmp_path / "images")
    line = line.replace("configs/", f"{ROOT}/configs/").replace(" images", f" {folder}")
    config, _ = parse_recipe(shlex.split(line)[2:], "")
    assert "caption" in open_source(config.data)[0]
    assert config.data.caption_templates == ("{caption}",)
