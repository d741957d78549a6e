"""Processes: device choice, process group and the few collectives that the loop needs; one process is the plain case."""
