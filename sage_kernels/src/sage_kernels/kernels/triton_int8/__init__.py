"""Triton programs of the INT8 rungs. Imported by calls that run them: Triton may be missing, and is slow to load."""
