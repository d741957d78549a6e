"""Settings for the whole suite, made before torch is imported."""

import os

# Waiting OpenMP threads that spin make tests crawl on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
