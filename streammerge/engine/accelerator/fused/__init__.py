"""Programs as kernels that Triton compiles: every step on a tile that stays in registers."""
