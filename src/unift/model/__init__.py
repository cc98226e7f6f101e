"""The language model: loaded and saved, its attention over shared prefixes, and the log-probs of packed groups."""
