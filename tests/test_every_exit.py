"""A small merge, ended at each of its calls to the file system in turn, and then resumed.

The process is gone in the middle, as after SIGKILL, before the call is made. Whatever the call was,
what is called the output is complete, an earlier merge is not lost, and a resume gives the right bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import MEMORY, recipe_of, write_model

import streammerge
from streammerge.statistics import BLOCK

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are made by forking"),
]

EXITING = """
import io, itertools, json, os, shutil, sys, threading
from pathlib import Path
import streammerge
from streammerge.checkpoint import outputfile, places
from streammerge.errors import OutputExistsError

job = json.loads(sys.argv[1])
out = Path(job["out"])
one_file = out.suffix == ".safetensors"
manifest = out.with_suffix(".manifest.json") if one_file else out / "streammerge_manifest.json"

def tensors_of(path):
    # The name of the one file is that of the output, the others' are the same.
    files = [path] if path.suffix == ".safetensors" else sorted(path.rglob("*.safetensors"))
    return [p.read_bytes() for p in files]

reference = tensors_of(Path(job["reference"]))
outputfile.SYNC_BYTES = job["sync_bytes"]
if job["inside"]:
    places._can_be_renamed = lambda directory: directory != out
plan = streammerge.plan(job["recipe"], memory=job["memory"], workers=1)
earlier = streammerge.plan(job["earlier"], memory=job["memory"], workers=1)

CALLS = "open preadv pwrite write fsync fdatasync ftruncate lseek posix_fallocate posix_fadvise"
CALLS += " mkdir rename replace unlink rmdir scandir"

def in_child(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def exit_at(number):
    count = itertools.count()
    exiting = os._exit
    def wrap(call):
        def counted(*arguments, **options):
            if next(count) == number:
                exiting(99)
            return call(*arguments, **options)
        return counted
    for name in CALLS.split():
        setattr(os, name, wrap(getattr(os, name)))
    io.open = wrap(io.open)

def is_complete():
    return out.exists() if one_file else manifest.exists()

def check_complete(directory):
    damages = [d for d in streammerge.verify_files(directory).damages if d.kind != "extra"]
    assert not damages, (directory, damages)

def prepare():
    # Another kind of thing may be there: nothing, an unfinished merge, or an earlier one.
    for path in (out, out.with_name(out.name + ".partial"), out.with_name(out.name + ".replaced")):
        shutil.rmtree(path, ignore_errors=True)
    if one_file:
        for path in (out, manifest, out.with_suffix(".recipe.yaml")):
            path.unlink(missing_ok=True)
    if job["inside"]:
        out.mkdir()
    if job["start"] == "unfinished":
        begun = []
        def run():
            exit_at(job["begun"])
            streammerge.merge(plan, out)
        assert in_child(run) == 99
    if job["start"] == "overwriting":
        assert in_child(lambda: streammerge.merge(earlier, out)) == 0

def disturbed(number):
    exit_at(number)
    options = {"overwrite": True} if job["start"] == "overwriting" else {"resume": True}
    streammerge.merge(plan, out, **options)

def look():
    replaced = (out if job["inside"] else out.parent) / (out.name + ".replaced")
    if not job["inside"] and out.exists():
        assert is_complete(), sorted(out.iterdir())
    if is_complete():
        check_complete(out)
    elif job["start"] == "overwriting":
        there = out.parent if one_file else out
        names = {p.name for p in [*there.glob("*"), *replaced.glob("*")]}
        # Nothing of the earlier merge is gone, wherever it is.
        whole = {manifest.name, job["holds"] or out.name}
        assert whole <= names, names

def resumed():
    try:
        streammerge.merge(plan, out, resume=True)
    except OutputExistsError:
        # It had not begun: the earlier merge is still there, and is not replaced unasked.
        assert job["start"] == "overwriting"
        streammerge.merge(plan, out, overwrite=True)
    assert tensors_of(out) == reference
    assert not streammerge.verify_files(out).damages
    beside = out if job["inside"] else out.parent
    left = [p.name for p in beside.iterdir() if p.name.endswith((".partial", ".replaced"))]
    assert not left, left

ends = 0
for number in itertools.count(job["first"], job["step"]):
    prepare()
    code = in_child(lambda: disturbed(number))
    if code == 0:
        break
    assert code == 99, (number, code)
    ends += 1
    assert in_child(look) == 0, number
    assert in_child(resumed) == 0, number
print(ends)
"""


@pytest.mark.parametrize("start", ["nothing", "unfinished", "overwriting"])
@pytest.mark.parametrize("place", ["beside", "inside", "one file", "in parts"])
def test_a_merge_that_ends_at_any_call_is_resumed_to_the_right_bytes(
    start: str, place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    every = request.config.getoption("--runslow")
    generator = torch.Generator().manual_seed(3)
    names = {"a": BLOCK * 2 + 5, "b": 40, "c": BLOCK}

    def draw() -> dict[str, torch.Tensor]:
        return {k: torch.randn(n, generator=generator) for k, n in names.items()}

    part = "unet" if place == "in parts" else ""
    inputs = [tmp_path / f"in-{i}" for i in range(3)]
    for path in inputs:
        write_model(path / part, draw())
        if part:
            (path / "model_index.json").write_text(json.dumps({part: ["diffusers", "UNet"]}))
    base, *sources = inputs
    (base / part / "config.json").write_text("{}")
    parameters = {"density": 0.4}
    recipe = recipe_of("ties", base, sources, parameters=parameters)
    suffix = ".safetensors" if place == "one file" else ""
    if not suffix:
        recipe["output"] = {"max_shard_size": "1MB"}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))

    streammerge.merge(recipe, tmp_path / f"reference{suffix}", memory=MEMORY)
    job = {
        "out": str(tmp_path / f"out{suffix}"),
        "reference": str(tmp_path / f"reference{suffix}"),
        "recipe": recipe,
        "earlier": recipe_of("linear", None, [base, *sources]),
        "memory": MEMORY,
        "sync_bytes": BLOCK,
        "inside": place == "inside",
        "holds": "" if suffix else part or "model.safetensors",
        "start": start,
        "begun": 45,
        "first": 0 if every else 3,
        "step": 1 if every else 11,
    }

    ran = subprocess.run(
        [sys.executable, "-c", EXITING, json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert not ran.stderr, ran.stderr
    assert ran.returncode == 0
    assert int(ran.stdout) >= (60 if every else 3)
