"""A device's side: signed requests, resumable upload, joining. Needs no model framework to move files."""
