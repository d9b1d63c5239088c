"""Devices on other machines hand in their models once: Flower carries the messages, a resumable HTTPS upload the
weights.
"""
