#!/bin/bash
# Checkpoints in one file, as ComfyUI keeps them, and pipelines of diffusers.
set -euo pipefail

# Two files of one kind become one: all of model, text encoder and VAE, under the names that they have.
streammerge merge --method linear checkpoints/first.safetensors:0.5 checkpoints/second.safetensors:0.5 \
  -o checkpoints/merged.safetensors

# A LoRA of kohya's scripts into such a file, at 0.8 of its strength.
streammerge bake checkpoints/first.safetensors loras/style.safetensors:0.8 checkpoints/baked.safetensors

# Pipelines of diffusers are merged as one model; parts that no source has are the base's.
streammerge merge --method task_arithmetic --base pipelines/base pipelines/tuned:0.5 -o pipelines/merged
