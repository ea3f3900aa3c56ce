"""The noise prediction of a step, and the innermost function that computes it.

`noise_predictor` evaluates the networks; every guidance wraps the function that it returns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glide_jax.diffusion.schedule import to_eps, to_x_0
from glide_jax.errors import UsageError


class Point(NamedTuple):
    """The position of one sampling step; scalars are float32 and traced.

    In training every image has its own: t is `(B,)`, alpha and sigma are `(B, 1, 1, 1)`.

    Attributes:
        t: timestep of the diffusion process the model was trained on; it may be fractional.
        alpha, sigma: `x_t = alpha x_0 + sigma eps`.
        next_alpha, next_sigma: the noise level that the step goes to.
        memory: what stateful guidance kept from the last step, by name.
    """

    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    next_alpha: jax.Array
    next_sigma: jax.Array
    memory: dict[str, jax.Array]

    def x_0_of(self, eps: jax.Array, x: jax.Array) -> jax.Array:
        """`x_0 = (x_t - sigma eps) / alpha`  (DDPM, eq. 15)."""
        return (x - self.sigma * eps) / self.alpha


class Prediction(NamedTuple):
    """The prediction for a noised image; every array is `(B, H, W, C)` float32.

    Attributes:
        eps, x_0: noise and clean image, always in agreement.
        variance_fraction: the learned variance of branch "caption", as a fraction between
            `beta_tilde` (0) and `beta` (1) on a log scale.
        guidance_gradient: sum of the gradients of log-probabilities by which guidances shift the
            step; zero without such a guidance.
        branches: eps of each evaluated branch, by name.
        memory: see `Point`.
    """

    eps: jax.Array
    x_0: jax.Array
    variance_fraction: jax.Array
    guidance_gradient: jax.Array
    branches: dict[str, jax.Array]
    memory: dict[str, jax.Array]

    def with_eps(self, eps: jax.Array, x: jax.Array, point: Point) -> "Prediction":
        """Replace the noise, and the clean image that follows from it (`Point.x_0_of`)."""
        return self._replace(eps=eps, x_0=point.x_0_of(eps, x))

    def with_x_0(self, x_0: jax.Array, x: jax.Array, point: Point) -> "Prediction":
        """Replace the clean image, and the noise: `eps = (x_t - alpha x_0) / sigma`."""
        return self._replace(x_0=x_0, eps=(x - point.alpha * x_0) / point.sigma)


Predict = Callable[[jax.Array, Point], Prediction]

# A parameter of a guidance: a scalar, or one value per image.
Number = float | Sequence[float] | np.ndarray | jax.Array


class Branch(NamedTuple):
    """One prediction of a network; all branches of a network are predicted in one evaluation.

    Attributes:
        name: key of its eps and of its conditioning; guidances that name the same branch share
            one prediction.
        network: name of the network that predicts it.
        prompt: its caption, or one parsed prompt part per image. None: the conditioning that the
            caller provides under `name` (in the pipeline, the caption of the image).
    """

    name: str
    network: str = "main"
    prompt: str | Sequence[Any] | None = None


CAPTION = Branch("caption")
NULL = Branch("null", prompt="")
WEAK = Branch("weak", network="weak")


@partial(
    jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["fn", "prediction_type"]
)
@dataclass(frozen=True, eq=False)
class Network:
    """A network with its weights: an argument of the sampler, never closed over.

    Attributes:
        fn: `(params, x, t, cond) -> (B, H, W, C or 2C)`: the prediction and, if the variance is
            learned, the variance output in [-1, 1]. It must be hashable: another `fn` compiles
            again. For `classifier_guidance` and `image_loss` the output is `(B,)`. With an
            attribute `out_channels`, the number of channels of the output, it need not be traced to
            see whether the variance is learned.
        params: its weights.
        prediction_type: meaning of the first C channels, "eps", "v" or "x_0".
    """

    fn: Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
    params: Any
    prediction_type: str = "eps"

    def __call__(self, x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        return self.fn(self.params, x, t, cond)


def is_network(node: Any) -> bool:
    """Whether a node of a tree is a network.

    Where arrays are split or converted, a network is a leaf: its weights have no axis of images.
    """
    return isinstance(node, Network)


def interleave(trees: Sequence[Any]) -> Any:
    """Stack K trees of `(B, ...)` as one of `(B * K, ...)`, image by image.

    If the batch is sharded over devices, concatenating branch by branch would move data between
    them; interleaving moves none.
    """
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:]), *trees
    )


def noise_predictor(
    networks: Mapping[str, Network], conds: Mapping[str, Any], branches: Sequence[Branch]
) -> Predict:
    """Return the innermost `Predict`: one batched forward pass per network, for all its branches.

    Args:
        networks: by name.
        conds: conditioning of each branch by its name, arrays batch first.
        branches: what to evaluate; "caption" is one of them.

    Raises:
        UsageError: a branch lacks its network or its conditioning.
    """
    for branch in branches:
        if branch.network not in networks:
            raise UsageError(f"branch {branch.name!r} needs a network {branch.network!r}: give one")
        if branch.name not in conds:
            raise UsageError(f"branch {branch.name!r} has no conditioning: give some in conds")

    def predict(x: jax.Array, point: Point) -> Prediction:
        batch, channels = x.shape[0], x.shape[-1]
        outputs: dict[str, jax.Array] = {}
        for name in dict.fromkeys(b.network for b in branches):
            own_branches = [b.name for b in branches if b.network == name]
            output = networks[name](
                interleave([x] * len(own_branches)),
                jnp.repeat(jnp.broadcast_to(point.t, (batch,)), len(own_branches)),
                interleave([conds[branch] for branch in own_branches]),
            )
            output = output.reshape(batch, len(own_branches), *output.shape[1:])
            outputs |= {branch: output[:, i] for i, branch in enumerate(own_branches)}
        eps = {
            b.name: to_eps(
                networks[b.network].prediction_type,
                outputs[b.name][..., :channels],
                x,
                point.alpha,
                point.sigma,
            )
            for b in branches
        }
        # The variance output lies in [-1, 1]  (Improved DDPM, eq. 15). `run_rows` uses the
        # fraction; `losses.vlb_term` trains it.
        variance_output = outputs[CAPTION.name][..., channels:]
        variance_fraction = (
            (variance_output + 1) / 2 if variance_output.shape[-1] else jnp.zeros_like(x)
        )
        x_0 = to_x_0(
            networks[CAPTION.network].prediction_type,
            outputs[CAPTION.name][..., :channels],
            x,
            point.alpha,
            point.sigma,
        )
        caption_eps = eps[CAPTION.name]
        return Prediction(caption_eps, x_0, variance_fraction, jnp.zeros_like(x), eps, point.memory)

    return predict
