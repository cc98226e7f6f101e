"""Credit: what every completion and every token is worth. Scored groups in, items out, ready to be packed."""
