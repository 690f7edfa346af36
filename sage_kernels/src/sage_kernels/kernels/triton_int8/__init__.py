"""Triton programs of the INT8 rungs. Imported only by a call that runs them: Triton may be missing, and is slow to load."""
