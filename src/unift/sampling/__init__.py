"""Sampling: prompts with hints in, groups of scored completions out."""
