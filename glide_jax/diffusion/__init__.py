"""Diffusion: noise schedules, grids, samplers, guidance, the sampling loop and training losses."""
