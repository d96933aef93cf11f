"""Tests with PostgreSQL and a real server."""
