#!/bin/bash
# Several densities of one recipe. The first way reads the models once for all that fit the memory at the same
# time; the second one reads them for each, and is for machines where one at a time is all there is room for.
set -euo pipefail

# merged-grid/density=0.1, merged-grid/density=0.3, merged-grid/density=0.9
cat recipe.yaml - >grid.yaml <<'EOF'
grid:
  parameters.density: [0.1, 0.3, 0.9]
EOF
streammerge merge grid.yaml merged-grid --resume

for density in 0.1 0.3 0.9; do
  streammerge merge --method ties --base models/base models/math:0.6 models/code:0.4 \
    -p "density=$density" -o "merged-$density" --resume --quiet
  streammerge verify "merged-$density"
  # Evaluate it here; what is not needed any more can go before the next one is made.
done
