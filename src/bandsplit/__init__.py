"""Bandsplit: train image classifiers on the spectral sub-bands of JPEG images."""

__version__ = "0.1.0"
