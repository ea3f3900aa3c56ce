"""The networks: from a noised image and its conditioning to noise and variance."""
