"""Train a network, two experts and two LoRAs, merge them with streammerge, and see what each can do.

The base has seen handwritten digits only briefly. One expert goes on with 0 to 4 alone, the other
with 5 to 9 alone, and each forgets the other half. The LoRAs do the same without changing the base.
Merges should know all ten: the experts, merged into one network; the LoRAs, combined into one
adapter; and the LoRAs, merged into the base. The script fails if a merge does not beat the base and
everything that was trained on one half, on the whole.

Everything is written to quickstart-output/: checkpoints as Hugging Face lays them out, in several
shards, adapters as PEFT saves them, the recipes, to be changed and merged again, and a page about each
merge: streammerge_report.html.
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
from peft import LoraConfig, PeftModel, get_peft_model
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
LORA_STEPS = 200
"""Training steps of a LoRA on its half."""
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["2"]}
"""A LoRA of the layer between the hidden ones: what both halves share, and where changes add up."""
SEED = 0

SOURCES = """\
sources:
  - path: {output}/{kind}-0-4
    weight: 1.0
  - path: {output}/{kind}-5-9
    weight: 1.0
"""
BASE = """\
base: {output}/base
output: {{dtype: float32, max_shard_size: 200kB}}
"""
RECIPES = {
    "ties": "method: ties\n" + BASE + SOURCES + "parameters: {{density: 0.8}}\n",
    "dare_ties": "method: dare_ties\n" + BASE + SOURCES + "parameters: {{density: 0.8}}\nseed: 0\n",
    "lora": "# Without a base, adapters make an adapter.\nmethod: cat\n" + SOURCES,
    "lora-in-base": "method: task_arithmetic\n" + BASE + SOURCES,
}
"""Recipes of the merges, by name: of the experts, and of the LoRAs."""

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

    print("Training a base, two experts and two LoRAs ...")
    base = make_network()
    train(base, train_images, train_labels, steps=BASE_STEPS, learning_rate=1e-3)
    save_checkpoint(OUTPUT / "base", base)
    networks = {"base": base}
    for task in ("0-4", "5-9"):
        mine = TASKS[task](train_labels)
        networks |= train_on_half(task, base, train_images[mine], train_labels[mine])
    for name, recipe in RECIPES.items():
        merged = OUTPUT / f"merged-{name}"
        exit_code = merge(name, recipe, merged)
        if exit_code:
            print(f"quickstart: this merge failed with exit code {exit_code}", file=sys.stderr)
            return 1
        networks[merged.name] = load_result(merged, base)

    accuracies = {
        name: {task: accuracy(network, test_images, test_labels, task) for task in TASKS}
        for name, network in networks.items()
    }
    print_table(accuracies)
    return check_merges(accuracies)


def train_on_half(
    task: str, base: nn.Module, images: Tensor, labels: Tensor
) -> dict[str, nn.Module]:
    """Train an expert and a LoRA on the digits of a task, save both, and return them by name."""
    expert = copy.deepcopy(base)
    # A smaller rate than the base's: experts that stay close to it merge better.
    train(expert, images, labels, steps=EXPERT_STEPS, learning_rate=3e-4)
    save_checkpoint(OUTPUT / f"expert-{task}", expert)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(**LORA))
    train(lora, images, labels, steps=LORA_STEPS, learning_rate=2e-3)
    shutil.rmtree(OUTPUT / f"lora-{task}", ignore_errors=True)
    lora.save_pretrained(OUTPUT / f"lora-{task}")
    return {f"expert-{task}": expert, f"lora-{task}": lora}


def merge(name: str, recipe: str, merged: Path) -> int:
    """Write a recipe, merge as it says, and return the exit code."""
    place = OUTPUT / f"{name}.yaml"
    kind = "lora" if name.startswith("lora") else "expert"
    place.write_text(recipe.format(output=OUTPUT, kind=kind), encoding="utf-8")
    arguments = ["merge", str(place), str(merged), "--memory", "1GiB", "--overwrite"]
    if BASE in recipe:
        # What the models differ in, as a page to look at.
        arguments.append("--report")
    print(f"\n$ streammerge {shlex.join(arguments)}", flush=True)
    return subprocess.run([STREAMMERGE, *arguments], check=False).returncode


def load_result(directory: Path, base: nn.Module) -> nn.Module:
    """Return a merged network; for an adapter, the base with it, as PEFT loads it."""
    if (directory / "adapter_config.json").exists():
        return PeftModel.from_pretrained(copy.deepcopy(base), directory)
    return load_checkpoint(directory)


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
    """Return 0 if every merge beats all that went into merges on the whole, else say which."""
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
    print(f"Every merge beats the base, the experts and the LoRAs on all digits. Files: {OUTPUT}/")
    page = ROOT / OUTPUT / "merged-ties" / "streammerge_report.html"
    print(f"What the experts differ in, and what their merge kept of each: {page}")
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
