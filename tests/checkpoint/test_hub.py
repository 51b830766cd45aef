"""Names of the hub lead to the snapshots of its cache, as huggingface_hub itself would find them."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streammerge.checkpoint.hub import hub_cache, hub_revision, locate_model, parse_hub_name
from streammerge.checkpoint.hubfiles import choose_files
from streammerge.errors import CheckpointError, DependencyError

MAIN, TAGGED, OTHER = "a" * 40, "ab" + "c" * 38, "ab" + "d" * 38


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty cache, and a working directory in which nothing has a model's name."""
    for name in ("HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    # A test that reaches for the network is wrong.
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path / "cache"


def put(
    cache: Path, commit: str, *files: str, refs: tuple[str, ...] = (), name: str = "models--org--m"
) -> Path:
    """Make a snapshot as huggingface_hub does: links to blobs, and refs that name the commit."""
    root = cache / name
    snapshot = root / "snapshots" / commit
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for index, file in enumerate(files or ("model.safetensors",)):
        blob = root / "blobs" / f"{index:064x}"
        blob.write_bytes(b"")
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).symlink_to(blob)
    for ref in refs:
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return snapshot


def locate(name: str) -> Path:
    return locate_model(Path(name), download=False)


def refusal(name: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    return str(caught.value)


# --- the cache


@pytest.fixture
def three(cache: Path) -> dict[str, Path]:
    return {
        "main": put(cache, MAIN, refs=("main",)),
        "tagged": put(cache, TAGGED, refs=("v1.0", "refs/pr/7")),
        "other": put(cache, OTHER),
    }


NAMED = [
    ("org/m", "main"),
    ("org/m@main", "main"),
    ("org/m@v1.0", "tagged"),
    ("org/m@refs/pr/7", "tagged"),
    (f"org/m@{MAIN}", "main"),
    (f"org/m@{OTHER}", "other"),
]


@pytest.mark.parametrize(("name", "which"), [*NAMED, ("org/m@abdddd", "other")])
def test_a_name_leads_to_the_snapshot_of_its_revision(
    name: str, which: str, three: dict[str, Path]
) -> None:
    assert locate(name) == three[which]
    assert hub_revision(three[which]) == f"org/m@{three[which].name}"


@pytest.mark.parametrize(("name", "which"), NAMED)
def test_huggingface_hub_finds_the_same(
    name: str, which: str, three: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    hub = pytest.importorskip("huggingface_hub")
    repository, _, revision = name.partition("@")

    found = hub.snapshot_download(
        repository, revision=revision or None, cache_dir=cache, local_files_only=True
    )

    assert Path(found) == three[which] == locate(name)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"XDG_CACHE_HOME": "/x"},
        {"HF_HOME": "~/h", "XDG_CACHE_HOME": "/x"},
        {"HF_HUB_CACHE": "$HF_HOME/there", "HF_HOME": "/h"},
        {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"},
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    constants = pytest.importorskip("huggingface_hub.constants")
    source = Path(constants.__file__).read_text(encoding="utf-8")
    fresh: dict[str, Any] = {
        "__name__": "huggingface_hub.constants",
        "__package__": "huggingface_hub",
    }

    exec(compile(source, constants.__file__, "exec"), fresh)  # noqa: S102 - as a fresh process

    assert hub_cache(environment) == Path(fresh["HF_HUB_CACHE"])


def test_what_lies_there_by_its_path_is_meant(three: dict[str, Path]) -> None:
    Path("org/m").mkdir(parents=True)

    assert locate("org/m") == Path("org/m")
    assert locate("org/m@v1.0") == three["tagged"]


@pytest.mark.parametrize("name", ["org/m@nothing", "org/m@ab", "org/m@abcccd", "org/m@ababab"])
def test_a_revision_that_is_not_there_is_refused_with_the_command(
    name: str, three: dict[str, Path]
) -> None:
    message = refusal(name)

    assert f"hf download org/m --revision {name.partition('@')[2]}" in message
    assert "--download" in message
    assert all(path.name in message for path in three.values())


def test_a_model_that_is_not_there_is_refused_with_the_command(cache: Path) -> None:
    message = refusal("org/other")

    assert "No such file or directory" in message
    assert str(cache) in message
    assert "hf download org/other, or give --download" in message


@pytest.mark.parametrize(
    "name",
    ["/org/m", "./org", "m", "a/b/c", "org/m.safetensors", "org/index.json", "../m", "org/m@../x"],
)
def test_what_can_only_be_a_path_stays_one(name: str, three: dict[str, Path]) -> None:
    assert parse_hub_name(Path(name)) is None
    assert locate(name) == Path(name)


@pytest.mark.parametrize(
    ("files", "lacks"),
    [
        (("config.json", "tokenizer.json"), "without any weights"),
        (("model.safetensors.index.json", "a.safetensors"), "1 of the shards"),
    ],
)
def test_a_snapshot_without_all_files_says_so(
    files: tuple[str, ...], lacks: str, cache: Path
) -> None:
    """Programs fetch what they need: a tokenizer leaves a snapshot without weights."""
    snapshot = put(cache, MAIN, *files, refs=("main",))
    index = snapshot / "model.safetensors.index.json"
    if index.exists():
        names = {"a": "a.safetensors", "b": "b.safetensors"}
        index.write_text(json.dumps({"weight_map": names}))

    message = refusal("org/m")

    assert lacks in message
    assert "hf download org/m, or" in message


def test_a_snapshot_with_all_shards_is_whole(cache: Path) -> None:
    snapshot = put(cache, MAIN, "model.safetensors.index.json", "a.safetensors", refs=("main",))
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')

    assert locate("org/m") == snapshot


# --- folders of the cache, and home


def test_a_folder_of_the_cache_stands_for_the_main_branch(three: dict[str, Path]) -> None:
    assert locate(str(three["main"].parents[1])) == three["main"]


def test_a_folder_of_the_cache_stands_for_its_only_snapshot(cache: Path) -> None:
    only = put(cache, OTHER)

    assert locate(str(cache / "models--org--m")) == only


def test_a_folder_of_the_cache_with_several_snapshots_names_them(cache: Path) -> None:
    snapshots = [put(cache, OTHER), put(cache, TAGGED)]

    message = refusal(str(cache / "models--org--m"))

    assert "2 snapshots" in message
    assert all(str(snapshot) in message for snapshot in snapshots)


def test_a_tilde_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()

    assert locate("~/model") == tmp_path / "model"
    assert locate("~/none") == tmp_path / "none"


def test_a_home_that_nobody_has_is_refused() -> None:
    assert "no home directory" in refusal("~nobody-of-that-name/model")


def test_a_path_outside_a_cache_has_no_revision() -> None:
    assert hub_revision(Path("/models/snapshots/x")) is None
    assert hub_revision(Path("/models--org--m/blobs/x/y")) is None


# --- downloads


@pytest.fixture
def fake_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Put a huggingface_hub in place that publishes files and records what it is asked for."""

    def install(*files: str, error: Exception | None = None) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        class HfApi:
            def model_info(self, repository: str, *, revision: str | None) -> object:
                asked.append({"repository": repository, "revision": revision})
                if error is not None:
                    raise error
                siblings = [types.SimpleNamespace(rfilename=file) for file in files]
                return types.SimpleNamespace(siblings=siblings)

        def snapshot_download(**arguments: Any) -> str:
            asked.append(arguments)
            chosen = [file for file in files if file in arguments["allow_patterns"]]
            revision = arguments["revision"] or "main"
            return str(put(cache, MAIN, *chosen, refs=(revision,)))

        module = types.ModuleType("huggingface_hub")
        module.HfApi = HfApi  # type: ignore[attr-defined]
        module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        return asked

    return install


@pytest.mark.parametrize("name", ["org/m", "org/m@v2"])
def test_a_download_fetches_what_a_merge_needs(
    name: str, fake_hub: Callable[..., list[dict[str, Any]]], cache: Path
) -> None:
    asked = fake_hub("config.json", "model.safetensors", "pytorch_model.bin", "m-Q4.gguf")
    revision = name.partition("@")[2] or None

    path = locate_model(Path(name), download=True)

    assert path == cache / "models--org--m" / "snapshots" / MAIN
    assert asked == [
        {"repository": "org/m", "revision": revision},
        {
            "repo_id": "org/m",
            "revision": revision,
            "cache_dir": str(cache),
            "allow_patterns": ["config.json", "model.safetensors"],
        },
    ]
    # From now on it is there.
    assert locate(name) == path


def test_what_is_in_the_cache_is_not_asked_for(
    fake_hub: Callable[..., list[dict[str, Any]]], cache: Path
) -> None:
    asked = fake_hub("model.safetensors")
    snapshot = put(cache, OTHER, refs=("main",))

    assert locate_model(Path("org/m"), download=True) == snapshot
    assert asked == []


def test_what_is_incomplete_is_fetched(
    fake_hub: Callable[..., list[dict[str, Any]]], cache: Path
) -> None:
    asked = fake_hub("model.safetensors")
    put(cache, OTHER, "tokenizer.json", refs=("main",))

    assert locate_model(Path("org/m"), download=True).name == MAIN
    assert len(asked) == 2


def test_a_failed_download_says_why(fake_hub: Callable[..., list[dict[str, Any]]]) -> None:
    fake_hub(error=ConnectionError("no route"))

    with pytest.raises(CheckpointError) as caught:
        locate_model(Path("org/m"), download=True)

    assert "org/m: cannot be downloaded: ConnectionError: no route" in str(caught.value)
    assert "hf auth login" in str(caught.value)


def test_a_model_in_no_format_that_is_read_is_not_downloaded(
    fake_hub: Callable[..., list[dict[str, Any]]],
) -> None:
    asked = fake_hub("README.md", "m-Q4_K_M.gguf")

    with pytest.raises(CheckpointError) as caught:
        locate_model(Path("org/m"), download=True)

    assert "none of its 2 files holds weights" in str(caught.value)
    assert "m-Q4_K_M.gguf" in str(caught.value)
    assert len(asked) == 1


def test_without_the_library_a_download_names_the_extra(cache: Path) -> None:
    with pytest.raises(DependencyError) as caught:
        locate_model(Path("org/m"), download=True)

    assert "pip install 'streammerge[hub]'" in str(caught.value)


@pytest.mark.parametrize(
    ("published", "left_out"),
    [
        # Weights once, as safetensors
        (
            ["model.safetensors", "config.json", "tokenizer.model", "README.md", "modeling_x.py"],
            ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot"],
        ),
        (
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
            ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
        ),
        # or as torch files where there is nothing else
        (["pytorch_model.bin", "config.json"], ["model.onnx", "onnx/model.onnx_data"]),
        # Mistral
        (["model.safetensors", "params.json"], ["consolidated.safetensors"]),
        (["consolidated.safetensors", "params.json"], []),
        # Llama
        (["model.safetensors"], ["original/consolidated.00.pth", "original/params.json"]),
        # diffusers: each folder by itself
        (
            [
                "model_index.json",
                "unet/diffusion_pytorch_model.safetensors",
                "vae/diffusion_pytorch_model.bin",
                "scheduler/scheduler_config.json",
            ],
            [
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "unet/diffusion_pytorch_model.bin",
                "vae/diffusion_pytorch_model.fp16.bin",
                "preview.png",
            ],
        ),
        (["unet/diffusion_pytorch_model.fp16.safetensors"], []),
        # sentence-transformers
        (
            ["model.safetensors", "modules.json", "2_Dense/model.safetensors"],
            ["openvino/openvino_model.bin", "onnx/model.onnx", "2_Dense/pytorch_model.bin"],
        ),
        # adapters, and what a training leaves
        (
            ["adapter_model.safetensors", "adapter_config.json"],
            ["optimizer.pt", "rng_state_0.pth", "training_args.bin", "runs/x/events.1"],
        ),
        (["model.safetensors"], ["checkpoint-500/model.safetensors", ".gitattributes"]),
    ],
)
def test_weights_are_downloaded_once(published: list[str], left_out: list[str]) -> None:
    assert choose_files([*left_out, *published]) == sorted(published)
