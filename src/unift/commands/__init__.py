"""The verbs of the command line, a file or folder each."""
