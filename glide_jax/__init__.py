"""glide-jax: text-guided diffusion for making and editing pictures."""
