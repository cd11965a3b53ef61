"""The book's science: data sets, training, runs, tables and figures.

It stands on ``mapkg``, which knows none of it; the notebooks stand on both.
"""
