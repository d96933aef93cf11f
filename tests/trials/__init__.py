"""Random requests, streams and WebSockets, in memory and in virtual time."""
