"""Training: the loop, a step of it, the update of the weights, and what a run remembers."""
