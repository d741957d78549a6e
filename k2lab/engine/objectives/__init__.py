"""Objectives: what is summed. One slot file each; pretraining, SFT and later stages differ only in feed and objective."""
