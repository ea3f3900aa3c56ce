"""The emoji data set: its source packages, rasteriser and files."""
