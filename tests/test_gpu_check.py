"""scripts/gpu_check: what is planned, cut off, left out and kept; nothing here needs a device."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backend import MakeDevices
from models import BLOCK, recipe_of, write_model
from models import Models as MakeModels

pytest.importorskip("benchmarks", reason="needs the project's root on the path")

from benchmarks import foreseeing, gpu_check, gpu_setup, gpu_steps, gpu_tables, steps, wheels
from benchmarks.jobs import DECOMPOSING, METHODS, Job
from benchmarks.models import ROOT, Models
from benchmarks.steps import Limit, Log, Outcome, Record, Step, allowance, carry_out
from streammerge.engine.accelerator.opening import count_devices

NOTHING = Step("nothing", lambda _: Outcome(), 10)


def soon(seconds: float) -> Limit:
    return Limit(time.monotonic() + seconds)


@pytest.fixture
def place(tmp_path: Path) -> Any:
    work = tmp_path / "work"
    work.mkdir()
    with Log(tmp_path / "log.txt") as log:
        yield gpu_setup.Place(work, log, "cpu")


@pytest.fixture
def session(place: gpu_setup.Place) -> gpu_steps.Session:
    return gpu_steps.Session(place, "1.1B", "8B", "1GiB", "1GiB", cores=4, seconds=480)


@pytest.mark.parametrize(
    ("limit", "least", "keep", "left", "expected"),
    [
        (60, 5, 0, 100, 60),  # all that it may take
        (60, 5, 0, 30, 30),  # what is left
        (60, 5, 20, 30, 10),  # what is left but for those after it
        (60, 5, 0, 5, 5),  # just enough
        (60, 5, 0, 4, "takes 5 s or more, 4 s are left"),
        (60, 5, 20, 24, "takes 5 s or more, 4 s are left beside 20 s kept for later steps"),
        (60, 5, 20, 10, "takes 5 s or more, 0 s are left beside 20 s kept for later steps"),
    ],
)
def test_a_step_gets_what_is_left_up_to_its_limit(
    limit: float, least: float, keep: float, left: float, expected: float | str
) -> None:
    step = replace(NOTHING, limit_seconds=limit, least_seconds=least, keep_seconds=keep)

    assert allowance(step, left=left, passed=()) == expected


def test_a_step_is_left_out_without_what_it_needs() -> None:
    step = replace(NOTHING, needs=("models", "adapters"))

    assert allowance(step, left=100, passed={"models"}) == "needs what did not pass: adapters"
    assert allowance(step, left=100, passed={"models", "adapters"}) == 10


def test_what_fails_is_told_and_the_rest_is_done() -> None:
    def refuse(_: Limit) -> Outcome:
        raise ValueError("no such thing")

    def run_late(_: Limit) -> Outcome:
        raise subprocess.TimeoutExpired(["merge"], 7)

    records: list[Record] = []
    planned = [
        Step("raises", refuse, 10),
        Step("late", run_late, 10),
        Step("part", lambda _: Outcome({"half": 1}, "the other half is missing"), 10),
        replace(NOTHING, name="blocked", obstacle=lambda: "no room"),
        replace(NOTHING, name="needs it", needs=("part",)),
        replace(NOTHING, name="long", least_seconds=1000),
        Step("good", lambda _: Outcome({"seconds": 2}), 10),
        replace(NOTHING, name="after it", needs=("good",)),
    ]

    good = carry_out(iter(planned), limit=soon(100), tell=records.append)

    assert not good
    assert [(each.name, each.status, each.why, each.values) for each in records] == [
        ("raises", "failed", "ValueError: no such thing", {}),
        ("late", "failed", "took longer than 7 s", {}),
        ("part", "failed", "the other half is missing", {"half": 1}),
        ("blocked", "left out", "no room", {}),
        ("needs it", "left out", "needs what did not pass: part", {}),
        ("long", "left out", "takes 1000 s or more, 100 s are left", {}),
        ("good", "passed", None, {"seconds": 2}),
        ("after it", "passed", None, {}),
    ]


def test_steps_that_are_left_out_are_no_failure() -> None:
    records: list[Record] = []
    planned = [NOTHING, replace(NOTHING, name="long", least_seconds=1000)]

    assert carry_out(planned, limit=soon(100), tell=records.append)
    assert [each.status for each in records] == ["passed", "left out"]


def test_a_command_that_takes_too_long_is_killed_with_what_it_started(
    place: gpu_setup.Place, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    command = ["bash", "-c", f"echo begun; sleep 60 & echo $! > {child}; wait"]

    with pytest.raises(subprocess.TimeoutExpired):
        steps.call(command, cwd=ROOT, limit=soon(0.5), log=place.log)

    assert "begun" in (tmp_path / "log.txt").read_text()
    status = Path("/proc", child.read_text().strip(), "status")
    # Killed a moment ago, and not yet dead where processors are busy.
    ends = time.monotonic() + 30
    while is_alive(status) and time.monotonic() < ends:
        time.sleep(0.01)
    assert not is_alive(status)


def is_alive(status: Path) -> bool:
    """Return whether a process is there, and not dead and waited for by nobody."""
    try:
        return "\nState:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_end_of_a_long_output_is_kept_and_the_log_stays_small(
    place: gpu_setup.Place, tmp_path: Path
) -> None:
    program = "print('x' * 300_000); print('the end'); raise SystemExit(3)"
    for _ in range(30):
        with pytest.raises(subprocess.CalledProcessError) as caught:
            steps.call([sys.executable, "-c", program], cwd=ROOT, limit=soon(60), log=place.log)
        assert steps.describe_error(caught.value) == "exit code 3: the end"

    assert steps.LOG_NBYTES / 2 < (tmp_path / "log.txt").stat().st_size <= steps.LOG_NBYTES
    assert (tmp_path / "log.txt").read_text().endswith("what came later was dropped\n")


def test_the_most_telling_is_planned_first(session: gpu_steps.Session) -> None:
    names = [step.name for step in gpu_steps.plan_steps(session)]

    assert names[:16] == [
        "bus",
        *("models of 0.01B", "models of 1.1B", "models of 0.15B"),
        *("start", *gpu_steps.FIRST),
        *("mergekit, start", *(f"mergekit, {name}" for name in gpu_steps.FIRST)),
    ]
    methods = METHODS.keys() - set(DECOMPOSING)
    rest = methods - set(gpu_steps.FIRST)
    assert set(names[16 : 16 + len(rest)]) == rest
    assert names[16 + len(rest) :] == [
        *("workers, ties", "workers, linear", "adapters"),
        *("baking, adapters: 1", "baking, adapters: 4", "baking, DoRA", "foreseen"),
        *("tsv_m, 0.15B", "iso_c, 0.15B", "extract, rank 16"),
        *("models of 8B", "ties, 8B", "linear, 8B"),
    ]


def test_variants_leave_time_for_what_comes_after_them(session: gpu_steps.Session) -> None:
    planned = {step.name: step for step in gpu_steps.plan_steps(session)}

    assert planned["karcher"].keep_seconds == planned["mergekit, ties"].keep_seconds == 0.3 * 480
    assert planned["ties"].keep_seconds == planned["workers, ties"].keep_seconds == 0
    known = set(planned)
    assert all(set(step.needs) <= known for step in planned.values())


def test_large_models_are_left_out_where_they_do_not_fit(
    session: gpu_steps.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "room_at", lambda _: 65_000_000_000)
    assert gpu_steps.lack_of_room(session, "8B") == (
        "its files take 66 GB, there is room for 65 GB"
    )
    # The models that were merged before are removed for them.
    session.models["1.1B"] = Models("1.1B", Path("base"), ())
    assert gpu_steps.lack_of_room(session, "8B") is None


def test_each_contender_is_told_where_to_compute(
    session: gpu_steps.Session, tmp_path: Path
) -> None:
    job = Job(METHODS["ties"], small_models(tmp_path))
    session.place = replace(session.place, device="cuda:1")
    plain = gpu_steps.streammerge_contender(session.memory)
    on_device, on_cpu = gpu_steps.on_both(session, plain)
    commands = [
        each.command(job, tmp_path / "job.json", tmp_path / "out")
        for each in (on_device, on_cpu, gpu_steps.on_mergekit(session))
    ]

    assert (on_device.name, on_cpu.name) == ("device", "cpu")
    assert commands[0][-4:] == ["--device", "cuda:1", "--device-memory", "1GiB"]
    assert commands[1][-2:] == ["--device", "cpu"]
    assert commands[2][1:3] == ["-m", "mergekit.scripts.run_yaml"]
    assert commands[2][-1] == "--cuda"


def small_models(tmp_path: Path) -> Models:
    tensors = {"a": torch.zeros(1000).bfloat16()}
    paths = [write_model(tmp_path / f"model-{index}", tensors) for index in range(3)]
    return Models("0.01B", paths[0], tuple(paths[1:]))


def test_a_job_is_measured_whoever_fails_at_it(session: gpu_steps.Session, tmp_path: Path) -> None:
    session.seconds_per_byte = 1e-9
    job = Job(METHODS["ties"], small_models(tmp_path))
    both = gpu_steps.on_both(replace_device(session), gpu_steps.streammerge_contender("1GiB"))
    wrong = replace(both[0], name="wrong", command=lambda *_: [sys.executable, "-c", "1 / 0"])
    late = replace(both[0], name="late", command=lambda *_: ["sleep", "60"])

    outcome = gpu_steps.measure_job(session, job, [*both, wrong, wrong], soon(60))
    cut_off = gpu_steps.measure_job(session, job, [late, both[0]], soon(2.5))

    assert outcome.failure == "wrong: exit code 1: ZeroDivisionError: division by zero"
    found = outcome.values["contenders"]
    assert [len(found[name]["runs"]) for name in ("device", "cpu", "wrong")] == [1, 1, 1]
    assert outcome.values["same_bytes"] is None
    assert outcome.values["bus_seconds"] == pytest.approx(6000e-9)
    assert found["device"]["peak_device_nbytes"] == 0
    assert found["device"]["merge_seconds_least"] < found["device"]["wall_seconds_least"]
    assert cut_off.failure == (
        "late: took longer than the time limit; device: no time was left for it"
    )
    assert list(session.place.work.iterdir()) == []


def replace_device(session: gpu_steps.Session) -> gpu_steps.Session:
    session.place = replace(session.place, device="cpu")
    return session


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([{"a.safetensors": 1, "README.md": 1}, {"a.safetensors": 1, "README.md": 2}], True),
        ([{"a.safetensors": 1}, {"a.safetensors": 2}], False),
        ([{"a.safetensors": 1}, None], None),  # one failed
        ([{"a.safetensors": 1}], None),
    ],
)
def test_shards_of_device_and_cpu_are_compared(
    *, files: Sequence[dict[str, int] | None], expected: bool | None
) -> None:
    manifests = [None if each is None else {"files": each} for each in files]

    assert gpu_steps.same_bytes(manifests) is expected


REPORT = """<testsuites><testsuite tests="{tests}" failures="{failures}" errors="0" skipped="{skipped}"
time="2.5"><testcase classname="test_gpu" name="test_a">{case}</testcase></testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("counts", "case", "on_a_device", "failure"),
    [
        ((3, 0, 1), "", True, None),
        ((3, 1, 0), "<failure/>", True, "1 failed, the first is test_gpu::test_a"),
        ((3, 0, 3), "<skipped/>", True, "none of 3 tests ran"),
        ((3, 0, 3), "<skipped/>", False, None),
    ],
)
def test_tests_pass_if_none_failed_and_on_a_device_one_ran(
    *, counts: tuple[int, int, int], case: str, on_a_device: bool, failure: str | None
) -> None:
    tests, failures, skipped = counts
    text = REPORT.format(tests=tests, failures=failures, skipped=skipped, case=case)
    outcome = gpu_setup.judge_tests(text, on_a_device=on_a_device)

    assert outcome.failure == failure
    assert outcome.values["passed"] == tests - failures - skipped
    assert outcome.values["seconds"] == 2.5


def test_tests_that_need_a_device_are_found_by_their_mark() -> None:
    assert ROOT / "tests/accelerator/test_gpu.py" in gpu_setup.find_tests()
    assert ROOT / "tests/test_ties.py" not in gpu_setup.find_tests()


def download(nbytes: int, called: list[list[str]], command: Sequence[str]) -> None:
    called.append(list(command))
    folder = Path(command[command.index("--dest") + 1])
    folder.mkdir(exist_ok=True)
    (folder / f"wheel_{len(called)}-1-py3-none-any.whl").write_bytes(b"x" * nbytes)


def test_wheels_are_packed_for_the_machine_that_lacks_them(tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "old-1-py3-none-any.whl").touch()
    called: list[list[str]] = []

    packed = wheels.pack(folder, call=partial(download, 10, called))

    assert packed == sorted(folder.iterdir())
    assert [path.name for path in packed] == [
        "wheel_1-1-py3-none-any.whl",
        "wheel_2-1-py3-none-any.whl",
    ]
    assert ["--no-deps" in command for command in called] == [False, True]
    for command in called:
        assert "--only-binary=:all:" in command
        assert command[command.index("--python-version") + 1] == "3.12"
    assert "mergekit==0.1.5" in called[1]


def test_wheels_that_are_too_large_are_refused_and_the_old_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "MOST_NBYTES", 3 * 2**19)
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "old-1-py3-none-any.whl").touch()

    with pytest.raises(SystemExit, match=r"take 2\.0 MiB, 2 MiB may be packed; the largest is whe"):
        wheels.pack(folder, call=partial(download, 2**20, []))

    assert [path.name for path in folder.iterdir()] == ["old-1-py3-none-any.whl"]
    assert list(tmp_path.iterdir()) == [folder]
    assert wheels.check_size({"a": 3 * 2**19}) is None
    assert wheels.check_size({"a": 3 * 2**19, "b": 1}) is not None


def test_without_wheels_the_command_that_packs_them_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make them with scripts/gpu_check pack"):
        wheels.find_wheels(tmp_path / "none")


def test_wheels_are_installed_with_pip_and_without(tmp_path: Path) -> None:
    wheel = tmp_path / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small.py", "")
        archive.writestr(
            "small-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1"
        )
        archive.writestr("small-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr("small-1.dist-info/RECORD", "small.py,,\n")
    found = wheels.find_wheels(tmp_path)

    subprocess.run(wheels.install_command(found, tmp_path / "pip"), check=True)
    wheels.unpack(found, tmp_path / "alone")

    assert (tmp_path / "pip" / "small.py").exists()
    assert (tmp_path / "alone" / "small.py").exists()


@pytest.mark.skipif(count_devices() > 0, reason="there is a CUDA device here")
def test_without_a_device_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["run", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("cuda:0 cannot be used: ")
    assert said[1] == "--device cpu lets the CPU stand in for it"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_results_are_on_the_disk_after_every_step(
    *,
    fails: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"

    def look(_: Limit) -> Outcome:
        seen = json.loads((out / "results.json").read_text())
        return Outcome({"seen": [step["name"] for step in seen["steps"]]})

    def end(_: Limit) -> Outcome:
        return Outcome({}, f"not in {ROOT}/file" if fails else None)

    planned = [NOTHING, Step("end", end, 10), Step("look", look, 10)]
    device = {"device": "cpu x86_64", "device_memory_nbytes": 0, "cuda": None}
    monkeypatch.setattr(gpu_check, "measure_bus", lambda *_, **__: device)
    monkeypatch.setattr(gpu_check, "iter_steps", lambda *_: iter(planned))
    monkeypatch.setattr(gpu_check, "MEMORY_DIRECTORY", tmp_path)

    code = gpu_check.main(["run", str(out), "--device", "cpu", "--commit", "abc123"])

    results = json.loads((out / "results.json").read_text())
    assert code == (1 if fails else 0)
    assert [step["status"] for step in results["steps"]] == [
        *("passed", "failed" if fails else "passed", "passed")
    ]
    assert results["steps"][1]["why"] == ("not in ROOT/file" if fails else None)
    assert results["steps"][2]["values"] == {"seen": ["nothing", "end"]}
    assert gpu_check.results_name(results) == "gpu-cpu-x86_64-abc123.json"
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "results.json"]
    assert list(tmp_path.iterdir()) == [out]
    assert "| look | passed |" in capsys.readouterr().out


def took(seconds: float) -> dict[str, Any]:
    return {"failure": None, "wall_seconds_least": seconds}


def test_times_are_set_beside_the_bus_the_cpu_and_mergekit() -> None:
    ties = {
        "device": took(3.0) | {"peak_device_nbytes": 2**30},
        "cpu": took(6.0),
    }
    failed = {"device": {"failure": "killed"}, "cpu": took(6.0)}
    lines = gpu_tables.render_times(
        [
            {"name": "start", "values": {"contenders": {"device": took(2.0)}}},
            {
                "name": "ties",
                "values": {"contenders": ties, "bus_seconds": 0.5, "same_bytes": True},
            },
            {"name": "linear", "values": {"contenders": failed, "bus_seconds": 0.5}},
            {"name": "mergekit, ties", "values": {"contenders": {"mergekit": took(30.0)}}},
        ]
    ).splitlines()

    assert lines[2:] == [
        "| `start` | 2.00 s | - | - | - | - | - | - | - | - | - |",
        "| `ties` | 3.00 s | 6.00 s | 30.00 s | 0.50 s | 6.00 | 2.00 | 2.00 | 10.00 | 1.00 GiB | yes |",
        "| `linear` | - | 6.00 s | - | 0.50 s | - | - | - | - | - | - |",
    ]


def test_what_was_foreseen_is_set_beside_what_merges_took() -> None:
    steps = [
        {"name": "ties", "values": {"contenders": {"device": took(3.0), "cpu": took(6.0)}}},
        {"name": "linear", "values": {"contenders": {"device": {"failure": "killed"}}}},
    ]
    merges = {
        "ties": {
            "device": {"total": 2.5, "limit": "bus"},
            "cpu": {"total": 7.0, "limit": "computing"},
            "taken": True,
        },
        "linear": {"cpu": {"total": 1.0, "limit": "reading"}},
        "baking, DoRA": {"why_not": "it is not there"},
    }

    assert gpu_tables.render_foreseen(merges, steps).splitlines()[2:] == [
        "| `ties` | 3.00 s | 2.50 s (bus) | 6.00 s | 7.00 s (computing) | the device |",
        "| `linear` | - | - | - | 1.00 s (reading) | - |",
        "| `baking, DoRA` | - | - | - | - | it is not there |",
    ]


def test_merges_are_foreseen_by_the_planner_s_own_estimate(
    devices: MakeDevices, models: MakeModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    devices()
    paths = [models.write({"w": torch.randn(2, BLOCK)}) for _ in range(3)]
    for method, parameters in (("ties", {"density": 0.2}), ("iso_c", {})):
        recipe = recipe_of(method, paths[0], paths[1:], parameters=parameters)
        (tmp_path / f"{method}.json").write_text(json.dumps(recipe))
    recipes = [str(tmp_path / f"{method}.json") for method in ("ties", "iso_c")]
    budgets = ["--memory", "4GiB", "--device-memory", "1GiB"]

    assert foreseeing.main([*recipes, "--device", "cuda:0", *budgets]) == 0
    there = json.loads(capsys.readouterr().out)
    assert foreseeing.main([recipes[0], "--device", "cpu", *budgets]) == 0
    here = json.loads(capsys.readouterr().out)

    assert there["merges"]["iso_c"] == {"why_not": "nothing of this merge is for it"}
    ties = there["merges"]["ties"]
    assert ties["device"]["bus"] == pytest.approx(4 * 8 * BLOCK / there["device_rates"]["bus"])
    assert ties["cpu"]["total"] == ties["cpu"][ties["cpu"]["limit"]]
    assert ties["taken"] is False
    assert here["device_rates"] is None
    assert here["merges"]["ties"].keys() == {"rates", "cpu"}


def test_results_are_shown_as_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = {"status": "passed", "seconds": 1.0, "why": None}
    results = {
        "device": {"device": "NVIDIA H200", "device_memory_nbytes": 140 * 2**30},
        "stands_in": False,
        "size": "1.1B",
        "commit": "abc",
        "dirty": False,
        "steps": [
            step | {"name": "bus", "values": {"bytes_per_second": 50e9}},
            step | {"name": "workers", "values": {"contenders": {"1": took(8.0), "16": took(1.0)}}},
            step | {"name": "8B", "status": "left out", "why": "a | b", "values": {}},
        ],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))

    assert gpu_check.main(["show", str(tmp_path / "results.json")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1.1B parameters, 2 sources, NVIDIA H200, 140 GiB; bus 50.0 GB/s; commit abc.",
        "",
        "| job | 1 | 16 |",
        "| --- | ---: | ---: |",
        "| `workers` | 8.00 s | 1.00 s |",
        "",
        "| step | result | seconds | why |",
        "| --- | --- | ---: | --- |",
        "| bus | passed | 1.0 |  |",
        "| workers | passed | 1.0 |  |",
        "| 8B | left out | - | a / b |",
    ]
