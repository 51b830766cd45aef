"""Parts of a merge on the workers of an engine that people already operate; a file for each engine."""
