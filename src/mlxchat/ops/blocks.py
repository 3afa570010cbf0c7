"""Sizes of blocks that bound memory, also for `planning`: imports no MLX."""

LOGITS = 1 << 26
"""Logits that are computed at a time, 256 MB in float32."""
CPU_LOGITS = 1 << 22
"""The same of `mlxchat.cpu`: few rows keep a chunk's logits in the cache …"""
CPU_LEAST_LOGITS_ROWS = 256
"""… but many spare BLAS from rearranging the head for each chunk."""
CPU_ATTENTION_TOKENS = 128
"""Queries of a block of attention of `mlxchat.cpu`."""
CPU_MOST_LANES = 16
"""More lanes would leave each of them too few rows."""
BATCH_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Rows of a KV cache: one of these, or a multiple of the last, so that few shapes are compiled."""
DECODED_ROWS = 32
"""Answers that are decoded at a time, at most."""
KV_TOKENS = 128
"""Tokens by which KV caches grow."""
PREFILL_TOKENS = 512
"""Tokens of a prompt that are read at a time."""
SENT_BYTES = 64 * 2**20
"""Bytes that travel between ranks at a time, at least one parameter; each lies there as it is and as a message."""
