"""benchmarks/: what is run, read back and reported; nothing here asserts a time."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from models import write_model

pytest.importorskip("benchmarks", reason="needs the project's root on the path")

from benchmarks import adapters, baking, contenders, loras, measuring, memory, reporting, roofline
from benchmarks.compare import default_results_path, hide_paths, parse_arguments
from benchmarks.floor import run_floor
from benchmarks.jobs import (
    DECOMPOSING,
    METHODS,
    Job,
    choose_methods,
    mergekit_config,
    streammerge_recipe,
)
from benchmarks.models import ROOT, Models, tensor_nbytes
from benchmarks.plotting import render_svg
from streammerge.adapters.files.reading import read_adapter
from streammerge.methods import discover_methods

RUN = measuring.Run(
    wall_seconds=2.0,
    user_seconds=1.5,
    system_seconds=0.5,
    peak_private_nbytes=300 * 2**20,
    peak_resident_nbytes=400 * 2**20,
    disk_read_nbytes=10,
    disk_written_nbytes=10,
    failure=None,
)


def timed(*seconds, failure=None):
    runs = [replace(RUN, wall_seconds=each, failure=failure) for each in seconds]
    return reporting.summarize(runs, [None] * len(runs))


@pytest.fixture
def results():
    summaries = {
        "streammerge": timed(2.0, 4.0, 3.0),
        "mergekit": timed(60.0),
        "peft": timed(9.0, failure="killed"),
        "floor": timed(2.5),
    }
    reporting.add_ratios(summaries)
    shared = {"read_nbytes": 6_600_000_000, "written_nbytes": 2_200_000_000}
    return {
        "commit": "abc",
        "dirty": False,
        "size": "1.1B",
        "sources": 2,
        "rounds": 3,
        "dtype": "bfloat16",
        "machine": {"cores": 2, "cpu": "CPU", "memory_nbytes": 24 * 2**30},
        "disk_rates": {"read_bytes_per_second": 1e9, "write_bytes_per_second": 5e8},
        "versions": {"contenders": {"mergekit": "0.1.5"}},
        "methods": {
            "ties": {**shared, "sweeps": 1, "contenders": summaries},
            "ties-model-scope": {
                **shared,
                "sweeps": 2,
                "contenders": {"streammerge": timed(5.0) | {"time_relative_to": {}}},
            },
        },
    }


def test_a_summary_takes_medians_and_keeps_the_noise():
    summary = timed(2.0, 4.0, 3.0)

    assert summary["wall_seconds"] == 3.0
    assert (summary["wall_seconds_least"], summary["wall_seconds_most"]) == (2.0, 4.0)
    assert len(summary["runs"]) == 3


def test_ratios_leave_out_who_failed(results):
    ratios = results["methods"]["ties"]["contenders"]["streammerge"]["time_relative_to"]

    assert ratios == {"mergekit": 0.05, "floor": 1.2}


def test_performance_table(results):
    table, conditions = reporting.render_performance_table(results).split("\n\n")

    assert table.splitlines()[2:] == [
        "| `ties` | 3.0 s | 60.0 s | 20.0x | 1.20 | 300 MiB | 300 MiB |",
        "| `ties-model-scope` | 5.0 s | - | - | - | 300 MiB | - |",
    ]
    assert "1.1B parameters" in conditions
    assert "commit abc, mergekit 0.1.5" in conditions


def test_a_job_is_bounded_by_what_takes_longer_and_its_stages_are_told(results):
    stages = {"read": 4.0, "compute": 1.0, "write": 2.0, "readers idle": 9.0}
    ties = results["methods"]["ties"]
    measured = {
        name: reporting.summarize([replace(RUN, wall_seconds=seconds)], [stages])
        for name, seconds in (("streammerge", 3.0), ("floor", 2.5))
    }
    slow = ties | {"contenders": measured}
    results["methods"] = {"ties": slow, "alone": ties | {"contenders": {}}}

    header, _, row = roofline.render_roofline(results, markdown=True).splitlines()
    measured["streammerge"]["cpu_seconds"] = 12.0
    told = roofline.render_roofline(results).splitlines()

    assert header.startswith("| job | raw I/O | cores | bound by | time / bound | read | compute |")
    assert row == (
        "| `ties` | 2.5 s | 1.0 s | disk | 1.20 | 4.0 s, 1.65 GB/s | 1.0 s | 2.0 s, 1.10 GB/s |"
    )
    assert told[1].split()[:8] == ["ties", "2.5", "s", "6.0", "s", "cores", "0.50", "4.0"]
    assert len(told) == 2


def test_a_table_for_the_terminal_names_who_failed_and_why(results):
    table = reporting.render_method("ties", results["methods"]["ties"])

    assert "6.60 GB read, 2.20 GB written" in table
    assert "peft failed: killed" in table
    assert "in 2 sweeps" in reporting.render_method(
        "ties-model-scope", results["methods"]["ties-model-scope"]
    )


def test_arguments_have_defaults_that_depend_on_the_number_of_sources():
    assert parse_arguments([]).contenders == ["streammerge", "mergekit", "peft", "floor"]
    assert parse_arguments([]).methods == choose_methods(2)
    assert parse_arguments(["--sources", "4"]).methods == choose_methods(4)
    assert parse_arguments(["--sources", "8"]).contenders == ["streammerge", "floor"]
    with pytest.raises(SystemExit):
        parse_arguments(["--sources", "1"])


def test_a_results_file_is_named_after_what_it_holds(results):
    assert default_results_path(results).name == "1.1B-2src-abc.json"
    assert default_results_path(results | {"dirty": True}).name == "1.1B-2src-abc-dirty.json"


def test_failures_do_not_tell_where_files_are(tmp_path):
    message = f"cannot open {ROOT}/a and {tmp_path}/work/b"

    assert hide_paths(message, tmp_path / "work") == "cannot open ROOT/a and WORK/b"


@pytest.fixture
def job_models(tmp_path) -> Models:
    import torch

    tensors = {"h.0.w": torch.zeros(35_500).bfloat16(), "h.1.w": torch.ones(35_500).bfloat16()}
    paths = [write_model(tmp_path / f"model-{index}", tensors, shards=2) for index in range(3)]
    for path in paths:
        (path / "config.json").write_text('{"num_hidden_layers": 2}')
    return Models("0.15B", paths[0], tuple(paths[1:]))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_jobs_are_recipes_that_can_be_planned(job_models, method, tmp_path):
    import streammerge as sm

    job = Job(method, job_models)
    place = tmp_path / "recipe.json"
    place.write_text(streammerge_recipe(job))

    planned = sm.plan(place, memory="4GiB")

    assert [model.path for model in planned.models] == [str(path) for path in job.inputs]
    assert planned.layout.data_nbytes == job.nbytes_to_write
    assert job.nbytes_to_read == method.sweeps * len(job.inputs) * 142_000


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_jobs_ask_the_same_of_mergekit(job_models, method):
    job = Job(method, job_models)

    recipe = json.loads(streammerge_recipe(job))
    config = json.loads(mergekit_config(job))
    if method.as_it_is:
        assert recipe == config
        return

    assert ("base" in recipe) == ("base_model" in config) == method.has_base
    assert len(recipe["sources"]) == len(config["models"]) == len(job.sources)
    if method.has_weights:
        assert sum(source["weight"] for source in recipe["sources"]) == pytest.approx(1)


def test_every_method_is_measured():
    measured = {method.streammerge for method in METHODS.values()}
    assert measured == set(discover_methods()), "METHODS in benchmarks/jobs.py has a row for each"


def test_with_many_sources_what_takes_fewer_is_not_measured_once_more():
    assert set(choose_methods(2)) == set(METHODS) - set(DECOMPOSING)
    assert "ties" in choose_methods(4)
    assert not {"slerp", "nuslerp"} & set(choose_methods(4))


def test_every_contender_gets_a_command(job_models, tmp_path):
    job = Job(METHODS["ties"], job_models)
    chosen = contenders.choose_contenders(contenders.NAMES, ["4GiB", "512MiB"], tmp_path)

    assert [contender.name for contender in chosen] == [
        "streammerge",
        "streammerge 512MiB",
        "mergekit",
        "peft",
        "floor",
    ]
    for contender in chosen:
        command = contender.command(job, tmp_path / "job.json", tmp_path / "out")
        assert str(tmp_path / "out") in command


def test_tensor_bytes_of_a_model_are_counted_and_a_short_shard_is_noticed(job_models):
    shard = next(job_models.base.glob("*.safetensors"))

    assert tensor_nbytes(job_models.base) == 142_000

    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not as long as its header says"):
        tensor_nbytes(job_models.base)


def test_the_floor_reads_and_writes_every_byte(tmp_path):
    inputs = [tmp_path / "a", tmp_path / "b"]
    inputs[0].write_bytes(bytes(9 * 2**20 + 1))
    inputs[1].write_bytes(bytes(5))

    floor = run_floor(
        [inputs[:1], inputs[1:]], tmp_path / "out", write_nbytes=3_000_001, files=2, sweeps=2
    )

    assert floor.read_nbytes == 2 * (9 * 2**20 + 6)
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) == 3_000_001
    assert floor.written_nbytes == 3_000_001


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_run_is_measured_with_its_children(tmp_path):
    child = "import time; held = bytearray(50_000_000); time.sleep(0.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"

    run = measuring.measure(
        [sys.executable, "-c", parent], cwd=tmp_path, environment={}, timeout_seconds=60
    )

    assert run.failure is None
    assert run.peak_resident_nbytes >= run.peak_private_nbytes > 50_000_000


@pytest.mark.parametrize(
    ("program", "timeout_seconds", "failure"),
    [
        ("import sys; sys.exit('no such thing')", 60, "exit code 1: no such thing"),
        ("import os; os.kill(os.getpid(), 9)", 60, "killed, as the system does"),
        ("import time; time.sleep(60)", 0.2, "took longer than the time limit"),
    ],
)
def test_a_failure_is_part_of_the_answer(tmp_path, program, timeout_seconds, failure):
    run = measuring.measure(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        environment={},
        timeout_seconds=timeout_seconds,
    )

    assert run.failure.startswith(failure)


def test_memory_points_vary_one_thing_at_a_time():
    points = memory.plan_points(["8B", "0.15B"], [4, 2])

    assert points == [("0.15B", 2), ("0.15B", 4), ("8B", 2)]


def test_the_picture_shows_every_point():
    picture = render_svg([("1 & 2", 300.0), ("3", 310.0)], limit=512, title="MiB")

    root = ET.fromstring(picture)  # noqa: S314 - made here
    assert [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")] == [
        "MiB",
        "budget 512",
        "300",
        "1 & 2",
        "310",
        "3",
    ]


def test_the_adapters_of_the_benchmark_are_read_and_combined(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "SHAPES", {"self_attn.q_proj": (12, 8), "mlp.up_proj": (16, 8)})
    job = adapters.Job("cat", 2, tuple(adapters.SHAPES))

    path = loras.make_lora(tmp_path / "a", job.shapes, rank=2, seed=0)

    assert {module.rank for module in read_adapter(path).modules} == {2}
    assert len(read_adapter(path).modules) == 4
    assert job.name == "cat, all-linear, 2 layer(s)"


def test_the_table_of_adapters_has_a_row_for_each_job():
    ours = {"median_seconds": 2.0, "peak_private_nbytes": 200 << 20}
    theirs = {"median_seconds": 9.0, "peak_private_nbytes": 400 << 20}

    lines = adapters.render(
        {"cat": {"streammerge": ours, "peft": theirs}, "svd": {"streammerge": ours}}
    )

    assert lines[1].split() == ["cat", "2.0", "200", "9.0", "400", "4.5"]
    assert lines[2].split() == ["svd", "2.0", "200", "-", "-", "-"]


@pytest.fixture
def bakings(tmp_path) -> list[baking.Baking]:
    import torch

    tensors = {
        "model.embed_tokens.weight": torch.ones(5, 8).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.ones(6, 8).bfloat16(),
        "model.layers.0.input_layernorm.weight": torch.ones(8).bfloat16(),
    }
    base = write_model(tmp_path / "models" / "base", tensors)
    loras.main(base.parent, base, 2, 2)
    made = tuple(base.parent / f"lora-2-{seed}" for seed in range(2))
    return [baking.Baking(base, made[:count], 1000) for count in (1, 2)]


def test_the_adapters_of_baking_cover_the_linear_layers_of_the_base(bakings):
    one, two = bakings

    modules = [read_adapter(path).modules for path in two.adapters]

    assert [[module.weight_name for module in each] for each in modules] == [
        ["model.layers.0.mlp.up_proj.weight"]
    ] * 2
    assert (one.name, two.name) == ("1 adapter", "2 adapters")
    assert one.nbytes_to_write == 2 * (40 + 48 + 8)
    assert two.nbytes_to_read - one.nbytes_to_read == 4 * 2 * (6 + 8)


def test_the_ways_of_baking_are_recipes_that_can_be_planned(bakings, tmp_path):
    import streammerge as sm

    two = bakings[1]
    for contender in baking.choose_contenders("600MiB"):
        description = tmp_path / "job.json"
        command = contender.command(two, description, tmp_path / "out")
        assert str(tmp_path / "out") in command
        assert contender.does(two)
        if contender.name in baking.WAYS:
            planned = sm.plan(description, memory="4GiB")
            assert planned.layout.data_nbytes == two.nbytes_to_write


def test_ways_that_differ_for_several_adapters_alone_do_not_bake_one(bakings):
    able = [each.name for each in baking.choose_contenders("600MiB") if each.does(bakings[0])]

    assert able == ["streammerge", "peft", "floor"]


def test_the_table_of_baking_compares_with_peft_what_peft_does(results):
    summaries = {
        "streammerge": timed(3.0),
        "streammerge, ties": timed(6.0),
        "peft": timed(12.0),
        "floor": timed(2.0),
    }
    subject = "rank-64 adapters"
    versions = {"contenders": {}, "project": {"peft": "0.21.2"}}
    methods = {"4 adapters": {"contenders": summaries}}

    table, conditions = reporting.render_baking_table(
        results | {"methods": methods, "subject": subject, "versions": versions}
    ).split("\n\n")

    assert table.splitlines()[2:] == [
        "| 4 adapters | 3.0 s | 12.0 s | 4.0x | 1.50 | 300 MiB | 300 MiB |",
        "| 4 adapters, `ties` | 6.0 s | - | - | 3.00 | 300 MiB | - |",
    ]
    assert "rank-64 adapters, cold" in conditions
    assert "commit abc, peft 0.21.2" in conditions


def test_a_merge_through_stores_is_measured_beside_boto3(tmp_path, capsys):
    pytest.importorskip("boto3")
    pytest.importorskip("localbucket")
    from benchmarks import stores

    place = tmp_path / "results.json"
    arguments = ["--size", "tiny", "--rounds", "1", "--work", str(tmp_path)]
    assert stores.main([*arguments, "--results", str(place)]) == 0

    results = json.loads(place.read_text())
    runs = results["contenders"]
    assert set(runs) == {"streammerge", "boto3 one-by-one", "boto3 at-once"}
    assert all(each[0]["wall_seconds"] > 0 for each in runs.values())
    assert results["read_nbytes"] == 2 * results["written_nbytes"]
    assert "times this" in capsys.readouterr().out
    # Models, downloads and results are gone.
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
