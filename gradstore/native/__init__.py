"""Compiled code: one library, from the C++ in ``src/``, and its one loader; the calls stand with what they serve."""
