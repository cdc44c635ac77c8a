"""One process tree from one machine to another: tracking, copying, storing and restoring its memory."""
