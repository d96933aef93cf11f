"""The README, the demo and the packages."""
