"""Every example runs as it stands, on small models, and makes what it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documented import ROOT, SHAPES, command_on_path, write_documented_models
from models import MEMORY, load_model, write_model
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.checkpoint.outputform import MANIFEST_NAME

EXAMPLES = ROOT / "examples"
RUN_HERE = {
    "recipe.yaml",
    "slurm/merge.sbatch",
    "container/Dockerfile",
    "container/run.sh",
    "notebook/progress.py",
    "densities/loop.sh",
    "diffusion/merge.sh",
    "cron/merge.sh",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    shutil.copy(EXAMPLES / "recipe.yaml", tmp_path)
    return write_documented_models(tmp_path)


@pytest.fixture
def expected(place: Path) -> Path:
    """Return what the recipe of the examples makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        streammerge.merge("recipe.yaml", "expected", memory=MEMORY)
    return place / "expected"


def run(
    place: Path, *command: str, code: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=place,
        env=command_on_path(place, **variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def assert_same_file(one: Path, other: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_every_example_is_run_here_and_listed() -> None:
    files = {
        str(path.relative_to(EXAMPLES))
        for path in EXAMPLES.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    assert files == {*RUN_HERE, "README.md"}
    assert {
        name for name in RUN_HERE if f"`{name}`" not in (EXAMPLES / "README.md").read_text()
    } == set()


def test_an_array_of_slurm_merges_in_parts(place: Path, expected: Path) -> None:
    script = EXAMPLES / "slurm/merge.sbatch"
    count = re.findall(r"^#SBATCH --array=1-(\d+)$", script.read_text(), re.MULTILINE)[0]
    said = []

    # In any order, as Slurm runs them; one was interrupted and is run again.
    for task in [3, 1, 1, *(n for n in range(1, int(count) + 1) if n not in {1, 3})]:
        variables = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": count}
        said.append(run(place, "bash", str(script), **variables).stderr)

    assert_same_file(place / "merged", expected)
    assert streammerge.verify_files(place / "merged").damages == ()


def test_a_container_resumes_within_its_limit(place: Path, expected: Path) -> None:
    """With a docker that notes how it was called, and runs the command where it stands."""
    docker = place / "bin" / "docker"
    docker.parent.mkdir(exist_ok=True)
    docker.write_text(
        '#!/bin/bash\necho "$@" >>calls\nwhile [[ $1 != streammerge ]]; do shift; done\nexec "$@"\n'
    )
    docker.chmod(0o755)
    script = str(EXAMPLES / "container/run.sh")

    run(place, script)
    again = run(place, script)

    assert "is complete already" in again.stderr
    assert_same_file(place / "merged", expected)
    calls = (place / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert "--memory 1g --stop-timeout 60 --user " in calls[0]
    assert f"--volume {place}:/work --workdir /work streammerge merge" in calls[0]


def test_the_image_installs_what_a_merge_without_torch_needs() -> None:
    text = (EXAMPLES / "container/Dockerfile").read_text()
    text = re.sub(r"#.*\n", "", text).replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line]
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^before-test = .* --isolated install (.*)\"$", project, re.MULTILINE)

    assert needed is not None
    assert [name for name, _ in steps] == [
        *("FROM", "RUN", "COPY", "RUN", "FROM", "COPY", "RUN", "ENTRYPOINT"),
    ]
    assert json.loads(steps[-1][1]) == ["streammerge"]
    assert f"pip install --no-cache-dir {needed[1]}\n" in text


def test_a_notebook_shows_progress_and_what_was_kept(place: Path, expected: Path) -> None:
    done = run(place, sys.executable, str(EXAMPLES / "notebook/progress.py"))

    assert_same_file(place / "merged", expected)
    assert "merge: 100%" in done.stderr
    # A fifth of the elements, rounded down.
    kept = re.findall(
        r"^(\S+) merge \[(?:0\.2|0\.199), (?:0\.2|0\.199)\]$", done.stdout, re.MULTILINE
    )
    assert set(kept) == set(SHAPES)


def test_a_loop_over_densities_makes_what_the_grid_makes(place: Path) -> None:
    done = run(place, str(EXAMPLES / "densities/loop.sh"))

    assert done.stdout.count("all as they were written") == 3
    made = {density: place / f"merged-{density}" for density in ("0.1", "0.3", "0.9")}
    for density, out in made.items():
        assert_same_file(out, place / "merged-grid" / f"density={density}")
    assert len({(out / "model.safetensors").read_bytes() for out in made.values()}) == 3


def test_files_of_comfyui_and_pipelines_of_diffusers_merge(place: Path) -> None:
    prefix = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    for seed, name in enumerate(("first", "second")):
        generator = torch.Generator().manual_seed(seed)
        path = place / "checkpoints" / f"{name}.safetensors"
        write_model(path, {f"{prefix}.weight": torch.randn(8, 8, generator=generator)})
    lora = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    (place / "loras").mkdir()
    factors = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    tensors = {f"{lora}.{name}": factor for name, factor in factors.items()}
    tensors[f"{lora}.alpha"] = torch.tensor(2.0)
    save_file(tensors, place / "loras/style.safetensors")
    for name, value in (("base", 1.0), ("tuned", 3.0)):
        unet = place / "pipelines" / name / "unet"
        write_model(
            unet / "diffusion_pytorch_model.safetensors", {"a.weight": torch.full((4, 3), value)}
        )
        (unet / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
        index = {"_class_name": "Mine", "unet": ["diffusers", "UNet2DConditionModel"]}
        (place / "pipelines" / name / "model_index.json").write_text(json.dumps(index))

    run(place, str(EXAMPLES / "diffusion/merge.sh"))

    first, second, merged, baked = (
        load_file(place / "checkpoints" / f"{name}.safetensors")[f"{prefix}.weight"]
        for name in ("first", "second", "merged", "baked")
    )
    torch.testing.assert_close(merged, 0.5 * first + 0.5 * second)
    torch.testing.assert_close(baked, first + 0.8 * 2.0)
    pipeline = load_file(place / "pipelines/merged/unet/diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(pipeline["a.weight"], torch.full((4, 3), 2.0))


def test_a_job_of_cron_goes_on_until_it_is_done(place: Path, expected: Path) -> None:
    script = str(EXAMPLES / "cron/merge.sh")
    (place / "models/code/model.safetensors").rename(place / "kept")
    absent = run(place, script, code=1)
    (place / "kept").rename(place / "models/code/model.safetensors")
    done = run(place, script)
    again = run(place, script)

    assert "failed with exit code 1" in absent.stderr
    assert "all as they were written" in done.stdout
    assert "is complete already" in again.stderr
    assert_same_file(place / "merged", expected)
    assert load_model(place / "merged").keys() == SHAPES.keys()
    assert (place / "merged" / MANIFEST_NAME).exists()
