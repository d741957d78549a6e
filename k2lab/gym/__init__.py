"""What a model is asked and how an answer is judged: tasks, rewards, and the check that a task can be won honestly.

A `task.Task` is plain data: messages, the right answer, the names of its rewards and its limits. Rewards (`rewards/`) are small
pure functions of (task, response); task slots (`tasks/`) make tasks from records that their caller passes in.
"""
