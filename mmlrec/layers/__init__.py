"""Building blocks of the networks. Import torch only."""
