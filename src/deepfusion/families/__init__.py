"""Target MoE families: one file each, one registry. All that depends on a family's name belongs here."""
