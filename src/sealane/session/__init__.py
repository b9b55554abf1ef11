"""State machines without I/O: the preface, the channel, the hand-over."""
