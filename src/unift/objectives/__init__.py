"""Objectives: the weight of every token (1/Z), and how each stream pushes its log-prob. Functions of tensors; no model runs
here but for the noise on its inputs.
"""
