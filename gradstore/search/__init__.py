"""Similarity search over stores: the exact scan, the certified index, and FAISS."""
