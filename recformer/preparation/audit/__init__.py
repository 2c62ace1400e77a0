"""What in a processed folder can spoil an evaluation."""
