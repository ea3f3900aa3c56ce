"""Random weights and images that are the same everywhere: numpy's frozen generator."""

import numpy as np


def tensors_of(shapes: dict[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    """Return weights of a state dict by names and shapes, scaled so that every layer matters."""
    random = np.random.RandomState(seed)
    return {name: _tensor(name, tuple(shape), random) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...], random: np.random.RandomState) -> np.ndarray:
    if not shape:  # Counters of batch normalisation.
        return np.zeros((), np.int64)
    values = random.standard_normal(shape).astype(np.float32)
    last = name.split(".")[-1]
    if last == "running_var":
        return 0.5 + values**2
    if last == "gamma" or (last == "weight" and len(shape) == 1):
        return 1 + np.float32(0.1) * values
    if last == "weight" and "position" not in name:
        return values * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if last in ("in_proj_weight", "proj"):
        return values * np.float32(np.sqrt(2 / shape[-1]))
    return np.float32(0.3) * values


def random_images(count: int, height: int, width: int, seed: int) -> np.ndarray:
    """Return `(count, height, width, 3)` uint8: patches of colour under noise."""
    random = np.random.RandomState(seed)
    coarse = random.randint(0, 200, (count, 4, 4, 3))
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    patches = coarse[:, rows][:, :, columns]
    return (patches + random.randint(0, 56, patches.shape)).astype(np.uint8)


# Name -> seed of its weights, and its images.
CASES = {
    "inception": (1, random_images(2, 80, 330, seed=1)),
    "clip": (2, random_images(3, 40, 56, seed=2)),
    "transformers": (3, random_images(3, 96, 64, seed=3)),
    "dinov2": (4, random_images(2, 64, 64, seed=4)),
    "dinov2_registers": (5, random_images(2, 300, 240, seed=5)),
}
