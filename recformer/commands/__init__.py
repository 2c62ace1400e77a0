"""The commands of `recformer`, one file each."""
