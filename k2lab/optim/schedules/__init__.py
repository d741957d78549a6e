"""Learning-rate schedules: pure functions of the step that return the share of the peak learning rate.

All count steps alike: `step` is the number of updates already done (the first update has step 0), `total_steps` the number of
updates of the whole run. A length is a number of steps (int) or a share of `total_steps` (float), so `1` is one step and `1.0`
the whole run. Warmup rises over its steps as 1/w, 2/w, ..., 1, so no update is wasted at rate 0; a decay leaves 1 on its first
step and reaches its floor at `step == total_steps`, after the last update.
"""
