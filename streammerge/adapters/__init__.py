"""Low-rank adapters: what they are on disk, and what they come to when they are combined."""
