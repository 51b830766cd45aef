"""Train a network and two experts, merge the experts with streammerge, and see what each can do.

The base has seen handwritten digits only briefly. One expert goes on with 0 to 4 alone, the other
with 5 to 9 alone, and each forgets the other half. Their merges should know all ten: the script
fails if a merge does not beat the base and both experts on the whole.

Everything is written to quickstart-output/: checkpoints as Hugging Face lays them out, in several
shards, and the recipes, to be changed and merged again.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("quickstart-output")
"""Relative to the project's root, where the commands run; recipes name their inputs so too."""
STREAMMERGE = Path(sys.executable).with_name("streammerge")
WIDTHS = (64, 256, 256, 10)
"""Pixels, two hidden layers, digits."""
BASE_STEPS = 15
"""Training steps of the base; few, so that it leaves something to learn."""
EXPERT_STEPS = 200
"""Training steps of an expert on its half; enough to forget the other half."""
SEED = 0

RECIPE = """\
method: {method}
base: {output}/base
sources:
  - path: {output}/expert-0-4
    weight: 1.0
  - path: {output}/expert-5-9
    weight: 1.0
parameters: {parameters}
seed: 0
output: {{dtype: float32, max_shard_size: 200kB}}
"""
RECIPES = {
    "ties": "{density: 0.8}",
    "dare_ties": "{density: 0.8}",
}
"""Merge method and its parameters."""

Task = Callable[[Tensor], Tensor]
"""Which of the given labels belong to a task, as a mask."""
TASKS: dict[str, Task] = {
    "0-4": lambda labels: labels < 5,
    "5-9": lambda labels: labels >= 5,
    "all": lambda labels: labels >= 0,
}


def main() -> int:
    """Run the whole quickstart and return the exit code."""
    # One thread is fastest for a network this small, and gives one result on any number of cores.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(mode=True)
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = (
        torch.from_numpy(part)
        for part in train_test_split(
            (images / 16).astype("float32"), labels, test_size=0.3, random_state=SEED
        )
    )

    print("Training a base and two experts ...")
    base = make_network()
    train(base, train_images, train_labels, steps=BASE_STEPS, learning_rate=1e-3)
    networks = {"base": base}
    for task in ("0-4", "5-9"):
        mine = TASKS[task](train_labels)
        expert = copy.deepcopy(base)
        # A smaller rate than the base's: experts that stay close to it merge better.
        train(
            expert, train_images[mine], train_labels[mine], steps=EXPERT_STEPS, learning_rate=3e-4
        )
        networks[f"expert-{task}"] = expert
    for name, network in networks.items():
        save_checkpoint(OUTPUT / name, network)

    for method, parameters in RECIPES.items():
        recipe, merged = OUTPUT / f"{method}.yaml", OUTPUT / f"merged-{method}"
        recipe.write_text(
            RECIPE.format(method=method, output=OUTPUT, parameters=parameters), encoding="utf-8"
        )
        arguments = ["merge", str(recipe), str(merged), "--memory", "1GiB", "--overwrite"]
        print(f"\n$ streammerge {shlex.join(arguments)}", flush=True)
        exit_code = subprocess.run([STREAMMERGE, *arguments], check=False).returncode
        if exit_code:
            print(f"quickstart: this merge failed with exit code {exit_code}", file=sys.stderr)
            return 1
        networks[merged.name] = load_checkpoint(merged)

    accuracies = {
        name: {task: accuracy(network, test_images, test_labels, task) for task in TASKS}
        for name, network in networks.items()
    }
    print_table(accuracies)
    return check_merges(accuracies)


def train(
    network: nn.Module, images: Tensor, labels: Tensor, *, steps: int, learning_rate: float
) -> None:
    """Train a network on these images, in place."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()


def make_network() -> nn.Module:
    """Return an untrained classifier of 8 x 8 images."""
    modules: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(WIDTHS):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def save_checkpoint(directory: Path, network: nn.Module) -> None:
    """Write a checkpoint with one shard for each layer, an index and a config."""
    # Another run may have left another set of shards.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in network.state_dict().items():
        layers.setdefault(name.partition(".")[0], {})[name] = tensor
    weight_map: dict[str, str] = {}
    nbytes = 0
    for number, tensors in enumerate(layers.values(), start=1):
        shard = f"model-{number:05d}-of-{len(layers):05d}.safetensors"
        save_file(tensors, directory / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))
        nbytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
    write_json(directory / "config.json", {"model_type": "digits-mlp", "widths": WIDTHS})


def write_json(path: Path, document: dict[str, object]) -> None:
    """Write a document as readable JSON."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(directory: Path) -> nn.Module:
    """Return the network in a checkpoint, found by its index as other libraries find it."""
    index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        tensors.update(load_file(directory / shard))
    network = make_network()
    network.load_state_dict(tensors)
    return network


@torch.inference_mode()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor, task: str) -> float:
    """Return the fraction of a task's images that the network names right."""
    mine = TASKS[task](labels)
    return float((network(images[mine]).argmax(dim=1) == labels[mine]).float().mean())


def print_table(accuracies: dict[str, dict[str, float]]) -> None:
    """Print one row for each network and one column for each task."""
    print("\nAccuracy on images that none of them was trained on:\n")
    print(f"{'':18}" + "".join(f"{task:>9}" for task in TASKS))
    for name, row in accuracies.items():
        print(f"{name:18}" + "".join(f"{row[task]:9.1%}" for task in TASKS))
    print()


def check_merges(accuracies: dict[str, dict[str, float]]) -> int:
    """Return 0 if every merge beats the base and both experts on the whole, else say which."""
    whole = {name: row["all"] for name, row in accuracies.items()}
    inputs = {name: value for name, value in whole.items() if not name.startswith("merged-")}
    best = max(inputs, key=lambda name: inputs[name])
    failures = [name for name in whole if name not in inputs and whole[name] <= whole[best]]
    for name in failures:
        print(
            f"quickstart: {name} has {whole[name]:.1%} on all digits, {best} has {whole[best]:.1%};"
            " the merge should be better",
            file=sys.stderr,
        )
    if failures:
        return 1
    print(f"Both merges beat the base and both experts on all digits. All files: {OUTPUT}/")
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
