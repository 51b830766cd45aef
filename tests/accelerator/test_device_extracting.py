"""An extraction on a device writes the adapter of the CPU, within the memory that its plan states."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backend import MakeDevices
from models import Models, Tensors

import streammerge
from streammerge.cli.arguments import main
from streammerge.errors import DeviceError, DeviceLostError, MemoryBudgetError, NonFiniteError
from streammerge.extracting.plans import ExtractionPlan
from streammerge.plan import device_matrices

SHAPES = {
    "h.0.attn.c_attn.weight": (600, 520),  # stored the other way round, by random projection
    "h.0.attn.q.weight": (520, 1300),  # by random projection
    "h.0.mlp.up.weight": (130, 400),  # exactly, as all smaller ones
    "h.0.mlp.gate.weight": (40, 400),  # on the CPU
    "norm.weight": (600,),
}
ON_DEVICE = 3


@pytest.fixture(autouse=True)
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let smaller matrices go to a device: large ones take long on a core."""
    monkeypatch.setattr(device_matrices, "LEAST_SIDE", 128)


def draw(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def pair(models: Models) -> tuple[Path, Path]:
    made = tuple(models.write(draw(seed)) for seed in (1, 2))
    for path in made:
        (path / "config.json").write_text('{"model_type": "gpt2"}')
    return made[0], made[1]


def extract(pair: tuple[Path, Path], out: Path, **options: Any) -> tuple[bytes, Any]:
    manifest = streammerge.extract(*pair, out, rank=8, **options)
    return (out / "adapter_model.safetensors").read_bytes(), manifest


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"dtype": "bfloat16"}], ids=str)
def test_an_adapter_has_the_values_of_the_cpu(
    options: dict[str, Any], pair: tuple[Path, Path], devices: MakeDevices, tmp_path: Path
) -> None:
    """Equal here, where the fake device is the CPU; and what is missing of each norm is as stated."""
    expected, on_cpu = extract(pair, tmp_path / "cpu", **options)
    backend = devices()["cuda:0"]
    plans: list[ExtractionPlan] = []
    found, manifest = extract(
        pair, tmp_path / "device", device="cuda:0", on_plan=plans.append, **options
    )

    assert found == expected
    assert manifest.tensors == on_cpu.tensors
    assert manifest.run.device == "cuda:0"
    assert on_cpu.run.device == "cpu"
    # One more, which loads the library.
    assert sum(kind == "waiting" for kind, _ in backend.log) == ON_DEVICE + 1
    (plan,) = plans
    assert plan.device is not None
    assert plan.device.matrices == ON_DEVICE
    assert 0 < backend.peak <= plan.device.peak <= plan.device.budget
    assert manifest.run.measured_device_memory == backend.peak
    assert manifest.run.projected_device_memory == plan.device.peak
    assert backend.used == 0


def test_what_torch_takes_of_a_projection_leaves_room_for_the_libraries(
    pair: tuple[Path, Path], devices: MakeDevices, tmp_path: Path
) -> None:
    backend = devices()["cuda:0"]
    plans: list[ExtractionPlan] = []
    extract(pair, tmp_path / "out", device="cuda:0", on_plan=plans.append, modules=("*.q",))
    (plan,) = plans

    assert plan.device is not None
    assert plan.device.matrices == 1
    assert backend.peak <= plan.device.peak - device_matrices.LIBRARIES_BYTES


def test_several_devices_share_the_matrices(
    pair: tuple[Path, Path], devices: MakeDevices, tmp_path: Path
) -> None:
    expected, _ = extract(pair, tmp_path / "cpu")
    made = devices(meeting=threading.Barrier(2))
    found, manifest = extract(pair, tmp_path / "out", device="cuda:0,cuda:1")

    assert found == expected
    assert manifest.run.device == "cuda:0,cuda:1"
    assert all(backend.peak for backend in made.values())


def test_the_command_takes_a_device_and_says_so(
    pair: tuple[Path, Path],
    devices: MakeDevices,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    devices()
    command = ["extract", *map(str, pair), str(tmp_path / "out"), "--rank", "8"]

    assert main([*command, "--device", "cuda:0", "--device-memory", "2GiB"]) == 0
    said = capsys.readouterr().err
    assert "device       cuda:0: 3 matrices, with up to " in said
    assert " of 2.0 GiB on each" in said
    run = json.loads((tmp_path / "out" / "streammerge_manifest.json").read_text())["run"]
    assert run["device"] == "cuda:0"
    assert main(["verify", str(tmp_path / "out"), "--quiet"]) == 0
    for words, message in (
        (["--device", "cuda:7"], "there is no cuda:7"),
        (["--device", "gpu"], 'expected "auto", "cpu"'),
        (["--device-memory", "1GiB"], "device_memory: the device is the cpu"),
    ):
        assert main([*command, "--overwrite", *words]) == 2
        assert message in capsys.readouterr().err


def test_without_a_word_the_device_is_the_cpu(
    pair: tuple[Path, Path], devices: MakeDevices, tmp_path: Path
) -> None:
    backend = devices()["cuda:0"]
    _, manifest = extract(pair, tmp_path / "out")

    assert manifest.run.device == "cpu"
    assert not backend.log


def test_too_little_device_memory_is_refused_with_what_would_do(
    pair: tuple[Path, Path], devices: MakeDevices, tmp_path: Path
) -> None:
    devices()
    with pytest.raises(
        MemoryBudgetError, match=r"h\.0\.attn\.q\.weight \[520, 1300\] takes .* of cuda:0"
    ) as caught:
        extract(pair, tmp_path / "out", device="cuda:0", device_memory="90MiB")
    least = str(caught.value).split("give --device-memory ")[1].split()[0]
    below = f"{int(least.removesuffix('MiB')) - 1}MiB"
    with pytest.raises(MemoryBudgetError, match="--device-memory is"):
        extract(pair, tmp_path / "out", device="cuda:0", device_memory=below)
    assert not (tmp_path / "out").exists()

    extract(pair, tmp_path / "out", device="cuda:0", device_memory=least)


def test_a_device_that_is_full_is_refused(
    pair: tuple[Path, Path], devices: MakeDevices, tmp_path: Path
) -> None:
    devices(capacity=2**20)
    with pytest.raises(MemoryBudgetError, match=r"only 1\.0 MiB are free there"):
        extract(pair, tmp_path / "out", device="cuda:0")


def test_faults_end_as_in_a_merge(
    pair: tuple[Path, Path], devices: MakeDevices, tmp_path: Path
) -> None:
    """But for what to do then: an extraction has nothing to resume."""
    expected, _ = extract(pair, tmp_path / "cpu")
    backend = devices()["cuda:0"]

    def spoil(plan: ExtractionPlan) -> None:
        assert plan.device is not None
        backend.unused = backend.capacity - 2**20

    found, _ = extract(pair, tmp_path / "again", device="cuda:0", on_plan=spoil)
    assert found == expected
    assert backend.refusals == 1

    def shrink(plan: ExtractionPlan) -> None:
        backend.capacity = 2**20

    with pytest.raises(MemoryBudgetError, match=r"ran out of memory twice.*extract again"):
        extract(pair, tmp_path / "full", device="cuda:0", on_plan=shrink)
    backend = devices()["cuda:0"]
    backend.lost_after = 2
    with pytest.raises(DeviceLostError, match=r"cuda:0 failed: CUDA error.*extract again"):
        extract(pair, tmp_path / "lost", device="cuda:0")
    assert not (tmp_path / "full").exists()
    assert not (tmp_path / "lost").exists()


def test_a_factor_beyond_its_type_is_named_as_on_the_cpu(
    models: Models, devices: MakeDevices, tmp_path: Path
) -> None:
    base = draw(1)
    name = "h.0.attn.q.weight"
    pair = models.write(base), models.write(base | {name: base[name] * 1e13})
    devices()
    messages = []
    for device in ("cpu", "cuda:0"):
        with pytest.raises(NonFiniteError, match="beyond the range of F16") as caught:
            extract(pair, tmp_path / device, device=device, dtype="float16")
        messages.append(str(caught.value))

    assert messages[0] == messages[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="use --device cpu"):
        streammerge.extract(
            tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1, device="cuda:0"
        )
