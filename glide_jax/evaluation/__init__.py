"""Measures of generated images, and the figures in the documentation."""
