"""transformers before version 5, which ties weights by other rules, in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

_REQUIREMENTS = (
    "transformers==4.57.3",
    "huggingface_hub<1",
    "tokenizers>=0.22,<=0.23.0",
    "requests",
)
_COMPUTE = """
import sys, torch, transformers
from tests.test_ties import logits
assert transformers.__version__.startswith("4.57"), transformers.__version__
path, out = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(path)
model = getattr(transformers, config.architectures[0]).from_pretrained(path)
torch.save(logits(model), out)
"""


def install_old_transformers(target: Path) -> Path:
    """Install into a directory, to shadow the installed transformers; skip where that fails."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target)]
    # Without what they depend on, which is installed, but for what the newer ones no longer need.
    plain = [each for each in _REQUIREMENTS if each != "requests"]
    for requirements, options in ((plain, ["--no-deps"]), (["requests"], [])):
        done = subprocess.run([*command, *options, *requirements], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot be installed here: {done.stderr.decode()[-300:]}")
    return target


def compute_with_old_transformers(packages: Path, model: Path) -> Tensor:
    """Return the logits that a model has there."""
    out = model.parent / "old.pt"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(packages), str(Path.cwd())])}
    subprocess.run([sys.executable, "-c", _COMPUTE, model, out], check=True, env=environment)
    return torch.load(out)
