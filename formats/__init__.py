"""Formats of other people's checkpoints."""
