"""Sources of captioned images, and the input pipeline that makes batches of them."""
