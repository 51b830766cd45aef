"""Low-rank adapters: as files have them, in their place in a base, and combined without one."""
