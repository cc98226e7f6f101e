"""unift: Unified Fine-Tuning (arXiv 2505.16984). One dial from SFT to RFT, and the methods around it."""

from unift._version import __version__ as __version__
