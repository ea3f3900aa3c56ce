"""What a recipe needs on hardware that is not there."""

from glide_jax.training.config import RunConfig


def dry_run(config: RunConfig, hardware: str) -> str:
    """Compiles a recipe's step for `hardware` and reports."""
    raise NotImplementedError
