"""Problems with their worked solutions: read from files or made by a task, checked, tokenised once. No model, no torch."""
