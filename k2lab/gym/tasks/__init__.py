"""Task slots: each a frozen dataclass with `tasks(records) -> list[Task]`.

Hold-out is the caller's duty: pass in records that no training stage has seen.
"""
