"""Does the work: threads, buffers, devices, progress. No merge mathematics."""
