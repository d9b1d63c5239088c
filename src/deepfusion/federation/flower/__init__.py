"""Flower, and nothing else of the program imports it: messages, the two apps, the SuperLink, runs in one process."""
