"""The guest that tests migrate: a kernel, busybox and one worker that would notice if its memory changed."""
