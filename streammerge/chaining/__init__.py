"""Several recipes in one file, of which later ones merge the results of earlier ones.

    stages.py      the recipes of a file
    foreseeing.py  all of them planned before the first one runs
    between.py     the directory of results in between
    running.py     merged one after the other

All of them are planned before the first one runs: a result that is still to come is there as files of the
right headers and sizes, with nothing in them. The results in between lie in ``OUT.stages`` beside the
output, each complete or resumable by itself, until the last one is done; but those that are made
element by element are never written where that moves fewer bytes (:mod:`streammerge.plan.fusing`).
"""
