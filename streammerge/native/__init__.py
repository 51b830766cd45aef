"""Compiled twins of the loops that a merge spends its time in; everything works without them.

    block.h      tiles and element types
    philox.h     random lanes
    machine.c    any program over tiles, in one sweep, step by step; machine.h says how it is called
      arithmetic.h functions.h majority.h placed.h totals.h asking.h    its steps, by kind
    ranks.c      where each value stands among the magnitudes of its row
    digits.h     the k-th largest of some magnitudes
    machine.py   programs and jobs as the machine reads them
    guard.c      copies from a mapping whose file may end early
    library.py   finds the kernels, and calls them

torch and numpy do one operation at a time on a whole block, some thirty of them per merge, each at
the speed of the memory. Here a tile of 512 elements goes through all of them in the first-level cache.
They are compiled when the package is installed, if there is a compiler, and give the same bits.
"""
