"""Reinforcement learning: what turns rollouts into training data. Advantages within a group, shaping of rewards and temperature,
and the feed that samples with the weights in training and hands packs to the one loop. What is done with them is an objective
(`engine/objectives/kimi.py`, `grpo.py`); how rollouts are made is `gym/rollouts.py`.
"""
