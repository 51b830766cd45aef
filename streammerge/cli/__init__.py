"""The command line: arguments in, exit code out.

Arguments are parsed in :mod:`~streammerge.cli.arguments`; commands are in :mod:`~streammerge.cli.commands`, such
as look at models and write none in :mod:`~streammerge.cli.looking`, and those that answer from headers and the
machine alone in :mod:`~streammerge.cli.answering`. The work is in :mod:`streammerge.run` and beside it.
"""
