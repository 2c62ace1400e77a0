"""How weights come and go: reading, loading, converting, naming."""
