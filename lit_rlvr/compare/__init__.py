"""``lit-rlvr compare``: arms and seeds from one YAML file, and a table that says what the differences are worth.

:mod:`~lit_rlvr.compare.spec` reads the file, :mod:`~lit_rlvr.compare.runs` knows what is done,
:mod:`~lit_rlvr.compare.pool` runs the rest, :mod:`~lit_rlvr.compare.measures` reads what came out,
:mod:`~lit_rlvr.compare.statistics` and :mod:`~lit_rlvr.compare.table` compare it. None of them imports torch: every run
is a ``lit-rlvr fit`` in a process of its own.
"""
