"""Checkpoints on disk: released folders in bf16, FP8 blocks or INT4 groups, proven whole before anything is read, converted and
compared tensor by tensor; torch.distributed.checkpoint, PEFT and GGUF folders; and the checkpoints inside an unfinished stage
(atomic, keep-last-n)."""
