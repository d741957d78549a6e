"""Stages: one file each, the only place where rooms are wired together."""
