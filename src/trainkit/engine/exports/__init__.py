"""The formats of `trainkit export`: how a model is written, checked, described and loaded again.

`engine/export` is the place to start reading: it writes a file in these steps.
"""
