#!/bin/bash
# Merges in a container that may have 1 GiB of memory; the merge finds the limit by itself.
# Start it again whatever happened: --resume goes on where it stopped, and a merge that is complete stays as it is.
set -euo pipefail

exec docker run --rm --memory 1g --stop-timeout 60 --user "$(id -u):$(id -g)" \
  --volume "$PWD:/work" --workdir /work streammerge merge recipe.yaml merged --resume
