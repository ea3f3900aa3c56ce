"""How good the pictures are: measures, and the figures in the documentation."""
