"""The page with a brush: text to image and editing in a browser."""
