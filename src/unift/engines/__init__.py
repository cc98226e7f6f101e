"""Where completions come from. ``native`` samples in the process of the trainer."""
