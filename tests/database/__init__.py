"""Tests with PostgreSQL."""
