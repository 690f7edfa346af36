"""Experiments on training with 8-bit attention: a small language model, its texts, its runs, and their report."""
