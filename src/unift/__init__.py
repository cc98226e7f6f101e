"""unift: Unified Fine-Tuning (arXiv 2505.16984). One dial from SFT to RFT, and the methods around it."""

__version__ = "0.1.0"
