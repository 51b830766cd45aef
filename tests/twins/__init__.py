"""The slow, obvious versions of all merge methods: plain numpy in float64, on whole arrays.

Nothing here imports streammerge, so an error in the engine cannot be an error in what it is
compared with. Functions take ``(base, sources, *, parameters)`` and return a float64 array of the
sources' shape; those that look at whole models take models, mappings of names to arrays.

    shapes          what all of them share: task vectors, models as one long array
    sums            linear, average, task_arithmetic, passthrough
    spherical       slerp, nuslerp, multislerp, karcher, model_stock
    selecting       nearswap, ram, ramplus_tl, arcee_fusion
    sparsifying     what trims and drops task vectors, and what makes up for it
    families        ties, dare, breadcrumbs, della, magnitude_prune out of those parts
    paper_ties      TIES as its authors' notebook does it, over whole models
    sce             select, calculate, erase
    localising      TALL masks, consensus, EMR's unified task vector, MagMax
    competition     PCB-Merging
    matrices        TSV-M, Iso-C, Iso-CTS
"""
