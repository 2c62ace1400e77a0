"""Raw data become processed folders, which are audited."""
