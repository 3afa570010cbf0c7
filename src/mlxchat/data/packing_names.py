"""What ways of packing are called in the configuration; `stream_packing.py` makes the rows."""

DOCUMENT_PACKINGS = ("best_fit", "best_fit_whole", "stream")
CONVERSATION_PACKINGS = ("best_fit", "stream", "alone")
