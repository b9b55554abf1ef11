"""Measurements through public surfaces: each bench compares with peers in one run and reports ratios of medians."""
