"""Speed and memory against named peers, in one run; see the module of each."""
