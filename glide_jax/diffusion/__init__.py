"""Diffusion: noise schedules, samplers, guidance, the sampling loop and training losses."""
