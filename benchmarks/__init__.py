"""What a request costs, and what a disconnect saves: one file for each question."""
