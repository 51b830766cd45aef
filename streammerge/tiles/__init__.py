"""What a method does to elements, as a short program over tiles, and the plain way to run one.

    program.py       the steps that there are, and what a program is made of
    writing.py       the sheet on which a method writes down what it does
    compiling.py     from expressions to steps: order, registers, steps that are done at once
    functions.py     exponential and logarithm in elementary operations, the same bits everywhere
    totalling.py     totals of rows, in an order that every machine keeps
    masks.py         random masks in tensor arithmetic, for devices without numpy
    interpreter.py   runs a program with the operations of torch, one step after the other

A tile is a row of consecutive elements, short enough that all rows of a program stay in the
first-level cache. A program says what happens to one tile: load it from every model, compute, and
store the result or add to a statistic. It holds no state but its registers, so that it does not
matter how a tensor is cut.
"""
