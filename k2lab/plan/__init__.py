"""What a run will need before it runs: memory per GPU, tokens, flops, time and money, each number with its formula and
origin: given, computed, assumed, published or measured. Reads `core.PlanInput`s, a machine table and run events; no torch.

`machines.get(name)`, `report.plan(inputs, machine, measured=run_dir)`, `analysis.heads_analysis(spec, ...)`.
"""
