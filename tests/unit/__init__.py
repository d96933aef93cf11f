"""One behaviour of the package at a time, in memory."""
