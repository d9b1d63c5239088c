"""What people read of a run: model cards, the page, its charts. Computes nothing that is not in the run folder."""
