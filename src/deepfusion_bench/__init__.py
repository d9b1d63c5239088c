"""Tables that compare DeepFusion with its baselines, made by runs that anybody can repeat."""
