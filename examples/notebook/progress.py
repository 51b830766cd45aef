# %% [markdown]
# Plan, merge with a bar, and look at the result. Cells as Jupyter, VS Code and jupytext read them.

# %%
"""A merge in a notebook, cell by cell."""

from __future__ import annotations

from tqdm.auto import tqdm

import streammerge as sm

# %% What would happen: headers only.
plan = sm.plan("recipe.yaml", memory="1GiB")
print(plan)

# %% The merge. Interrupting the kernel keeps what is done; running the cell again goes on with it.
with tqdm(unit="B", unit_scale=True) as bar:

    def show(event: sm.ProgressEvent) -> None:
        """Move the bar to where the work is."""
        bar.total = event.bytes_total
        bar.set_description(event.activity)
        bar.update(event.bytes_done - bar.n)

    manifest = sm.merge(plan, "merged", resume=True, on_progress=show)

# %% What was kept of each source, tensor by tensor.
for name, tensor in manifest.tensors.items():
    print(name, tensor.action, [round(density, 3) for density in tensor.density])
