"""The settings of a run: their sections and words, how layers become one config, what is checked, what a method needs.

Plain data and pure functions; nothing here loads rows or a model, and nothing imports torch.
"""
