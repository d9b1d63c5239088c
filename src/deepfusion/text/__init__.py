"""Text: rows of files become documents, splits, windows and tokens. Knows tokenizers, no models; nothing here is
learned.
"""
