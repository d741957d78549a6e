"""Text to tokens and back: Kimi's byte-level BPE and its special block, the chat format with tools and thinking, and the
Jinja template that makes other programs render the same tokens. No torch. Ordinary text never becomes a special token here.
"""
