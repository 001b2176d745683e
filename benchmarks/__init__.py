"""Measurements too long for the tests, side by side with the peers: ``make bench``."""
