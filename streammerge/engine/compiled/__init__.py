"""The compiled way of a CPU stage, for tensors in usual types.

    opening.py     the stage of a worker on the CPU: this one, or the plain one
    stage.py       the stage of one worker
    operands.py    pieces as the machine sees them: addresses and types
    bench.py       what a worker has for it: encoded programs, jobs, memory
    merging.py     blocks of a piece to blocks of the output
    measuring.py   samples, answers to questions, statistics of small tensors
    refusing.py    what is wrong with a block that the machine refuses

The machine refuses a block in which a value that it loads is not finite, or a result does not fit its
type, and nothing else: that is an error.
"""
