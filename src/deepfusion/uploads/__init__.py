"""The upload folder, all that leaves a device: its card, the checks of the server, and folders of models that others
made.
"""
