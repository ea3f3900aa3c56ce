"""Names of weights on the Hub: their parts, and what is no such name."""

from pathlib import Path

import pytest

from glide_jax.errors import UsageError
from glide_jax.weights.hub_names import FORM, HubName, on_hub, read_hub_name


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf://user/name", ("user/name", "", "", "")),
        ("hf://user/my.model-2/", ("user/my.model-2", "", "", "")),
        ("hf://user/name@v1", ("user/name", "v1", "", "")),
        ("hf://user/name@v1.0/a/b", ("user/name", "v1.0", "a/b", "")),
        ("hf://user/name@refs/pr/1/a", ("user/name", "refs/pr/1", "a", "")),
        ("hf://user/name@my%2Fbranch/a", ("user/name", "my/branch", "a", "")),
        ("hf://user/name/base.pt", ("user/name", "", "base.pt", "")),
        ("hf://user/name/a/ckpt.pt:ema", ("user/name", "", "a/ckpt.pt", "ema")),
        (Path("hf://user/name@v1"), ("user/name", "v1", "", "")),
    ],
)
def test_the_parts_of_a_name(name, parts):
    assert on_hub(name)
    found = read_hub_name(name)
    assert found == HubName(*parts)
    assert read_hub_name(str(found)) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://user", f"'hf://user' does not name a repository of the Hub: write {FORM}"),
        ("hf:user/name", "'hf:user/name' does not name a repository"),
        ("hf:///user/name", "does not name a repository"),
        ("hf://", "does not name a repository"),
        ("HF://user/name", "does not name a repository"),
        ("hf://user//name", "does not name a repository"),
        ("hf://a b/name", "'a b' cannot be a name on the Hub"),
        ("hf://user/.name", "'.name' cannot be a name on the Hub"),
        ("hf://user/na--me", "'na--me' cannot be a name on the Hub"),
        ("hf://user/name@", "has no revision after the @: name a branch, a tag or a commit"),
        ("hf://user/name@..%2F..%2Fx", "has no revision after the @"),
        ("hf://user/name/a@v1", "has its revision at the end: write hf://user/name@v1/a"),
        ("hf://user/name/../x", "'../x' cannot be a folder of a repository"),
        ("hf://user/name/a//x", "'a//x' cannot be a folder of a repository"),
        ("hf://datasets/user/name", "names datasets of the Hub, which hold no weights"),
        ("https://huggingface.co/u/n/tree/main", "is the address of a page: write hf://u/n"),
    ],
)
def test_what_is_no_name_is_one_line(name, message):
    assert on_hub(name)
    with pytest.raises(UsageError) as error:
        read_hub_name(name)
    assert message in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("name", ["emoji64", "openai/base", "runs/hf", "hf/a", Path("a/hf:b")])
def test_other_weights_are_not_on_the_hub(name):
    assert not on_hub(name)
