"""How raw data become processed folders, and what is wrong with them."""
