"""Fused losses for training language models."""

from ava_ext._library import build_info

__all__ = ["build_info"]
