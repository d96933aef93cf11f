"""Random requests and streams, in memory and in virtual time."""
