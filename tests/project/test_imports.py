"""What importing the package costs, and what it must not need."""

from tests.support.commands import run

HEAVY = ("torch", "tensorflow", "transformers", "tensorflow_datasets", "orbax", "grain", "ftfy")


def test_the_package_imports_nothing_heavy():
    code = f"import glide_jax, sys; print([m for m in {HEAVY} if m in sys.modules])"
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_there():
    code = "import glide_jax as g; assert all(hasattr(g, n) for n in g.__all__); g.load; g.GLIDE"
    assert run("-c", code).returncode == 0
