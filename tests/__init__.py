"""The tests; README.md says where each kind of test is."""
