"""Which tests ``--fast`` runs: one case of each that does not take long.

Every law is still asked for, which ``test_fast.py`` checks.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import pytest

TAKES_LONG = {
    "accelerator": "devices, of which there are few",
    "companions": "files beside the tensors",
    "extracting": "decompositions",
    "fuzz": "thousands of inputs",
    "report": "numbers about merges, not merges",
    "storage": "servers",
    "test_adding_a_method.py": "laws of more methods, in processes of their own",
    "test_any_program_gives_the_bits_of_the_interpreter": "hundreds of drawn programs",
    "test_benchmarks.py": "what measures",
    "test_combination_laws.py": "processes, for their memory",
    "test_combination_refusals.py": "processes, for their memory",
    "test_encoding.py": "drawn cases",
    "test_every_call.py": "every call in turn; test_every_exit.py is the shorter one",
    "test_examples.py": "processes",
    "test_factor_memory.py": "processes, for their memory",
    "test_fast.py": "collects all tests",
    "test_fusing.py": "merges of merges",
    "test_gpu_benchmark.py": "what measures",
    "test_hostile_adapters.py": "thousands of inputs",
    "test_hub_names.py": "processes",
    "test_installing.py": "environments",
    "test_instructions.py": "another program counts",
    "test_kill_loops.py": "processes, killed many times",
    "test_limits.py": "processes with limits",
    "test_mixtures.py": "processes",
    "test_on_dask.py": "workers",
    "test_parts.py": "processes",
    "test_planning.py": "plans of every kind",
    "test_planning_memory.py": "processes, for their memory",
    "test_readme.py": "processes",
    "test_real_checkpoint.py": "a model from a package",
    "test_requantising.py": "merges in float8",
    "test_resume.py": "processes, killed; test_every_exit.py is the shorter one",
    "test_rounds.py": "hundreds of drawn cases",
    "test_site.py": "the site",
    "test_source_laws.py": "laws of methods again, with adapters",
    "test_start_up.py": "processes, for their time",
    "test_streams.py": "processes",
    "test_sweeps_together.py": "processes",
    "test_tensors_in_parts_stay_within_the_plan": "processes, for their memory",
    "test_the_budget_that_a_refusal_names_is_enough": "processes, for their memory",
    "test_the_sources_compile_for_windows": "a compiler",
    "test_together.py": "processes, killed",
    "test_twins_agree_with_mergekit.py": "another library",
    "test_without_torch.py": "processes",
}
"""Folders, modules and tests that ``--fast`` leaves out, and what they are or take."""


def choose_fast(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """Return one case of each test that does not take long.

    Which one goes by the test's name, so that laws that are all tried on every method are tried on
    different ones.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        test = item.nodeid.split("[")[0]
        limited = item.get_closest_marker("cgroup") is not None
        if not limited and not TAKES_LONG.keys() & {*item.path.parts, test.rsplit("::", 1)[-1]}:
            cases.setdefault(test, []).append(item)
    return {some[zlib.crc32(name.encode()) % len(some)] for name, some in cases.items()}
