"""A folder of tiny random weights, and a pipeline with them."""

import pytest

import glide_jax as glide
from tests.support.commands import make_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def pipe(weights):
    return glide.load(weights)
