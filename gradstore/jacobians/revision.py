"""The revision of everything in this room that decides the bits of a Jacobian."""

REVISION = 4
"""Higher by one with every change after which a gradient may have other bits: a route, its order of summation.

Stores put it down for each shard, so that rows of two revisions, which differ by rounding, are not mixed unnoticed.
"""
