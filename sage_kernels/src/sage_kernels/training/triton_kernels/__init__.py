"""Triton programs of trainable attention."""
