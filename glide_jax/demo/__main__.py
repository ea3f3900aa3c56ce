"""`python -m glide_jax.demo`, the same as `glide-jax demo`."""

import sys

from glide_jax.demo.launch import main

if __name__ == "__main__":
    main(sys.argv[1:])
