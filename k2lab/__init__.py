"""K2 Lab: train, measure and use Kimi-family models, from a laptop to a cluster."""

__version__ = "0.1.0"
