"""Measures streammerge against other mergers and against the disk; see ``python -m benchmarks.compare``.

python -m benchmarks.compare             speed and memory, side by side with other mergers
python -m benchmarks.adapters            adapters combined without a base, side by side with PEFT
python -m benchmarks.baking              adapters merged into a base, side by side with PEFT
python -m benchmarks.memory              peak memory over model size and number of sources
python -m benchmarks.scale --directory DIR    planner, driver and end of a merge of a trillion parameters
python -m benchmarks.clusters --work DIR      two workers of an engine against one process of two cores
python -m benchmarks.gpu                 merges on a GPU, side by side with the CPU and mergekit
scripts/gpu_check run OUT                tests and measurements on a GPU in minutes, without a network
python -m benchmarks.startup             how long commands and imports take to start
python -m benchmarks.instructions        how many instructions the kernels take, by count and not by time
python -m pytest benchmarks/test_kernels.py    the kernels on pieces in memory
"""
