"""The manifest as a file says what it says in memory."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from streammerge.checkpoint.digests import FileDigest
from streammerge.checkpoint.manifest import (
    MANIFEST_VERSION,
    Manifest,
    RunRecord,
    TensorRecord,
    write_manifest,
)
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.types import ShardFile


@pytest.mark.parametrize("names", [(), ("one",), ('quote " and \\', "größer", "line\nbreak")])
def test_the_file_is_the_record_field_by_field(tmp_path: Path, names: tuple[str, ...]) -> None:
    """It is put together by hand, because encoding a copy of everything takes seconds."""
    run = RunRecord({"torch": "2"}, "cpu", 1.5, {"read": 0.25}, {"read": 7}, {}, 3, 4, 5, False)
    record = TensorRecord("merge", "BF16", 6, (0.5, 1 / 3), (None, 1e-9), (0.1, None), 2)
    manifest = Manifest(
        version=MANIFEST_VERSION,
        method="ties",
        semantics="peft",
        recipe="method: ties\n",
        recipe_digest="00",
        inputs=(ShardFile(Path("/models/base"), 8, 9, "ff"),),
        files={name: FileDigest(10, "aa", tree=True) for name in names},
        dropped=names,
        copied_from_base=(),
        tensors=dict.fromkeys(names, record),
        run=run,
    )

    write_manifest(manifest, tmp_path / MANIFEST_NAME)

    plain = json.dumps(asdict(manifest), default=os.fspath)
    found = json.loads((tmp_path / MANIFEST_NAME).read_bytes())
    del found["digest"]
    assert found == json.loads(plain)
