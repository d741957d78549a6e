"""Optimizers: AdamW, and MuonClip (Muon plus QK-Clip) as Moonshot trains Kimi models with, and learning-rate schedules.

`muonclip.py` and `adamw.py` are the slots, `schedules/` holds the schedule slots; the tensors live in the files that start with
an underscore. A built optimizer (`_base.Optimizer`) owns the table of which parameter goes where, the masters, the state and
the clipping; the training loop calls `clip`, `step` and `zero_grad` and nothing else.
"""
