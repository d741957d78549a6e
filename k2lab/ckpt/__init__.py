"""Checkpoints inside an unfinished stage: model, optimizer and cursor in safetensors and JSON, atomic, keep-last-n."""
