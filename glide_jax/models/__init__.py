"""The networks: from a noised image and its conditioning to a prediction and a variance."""
