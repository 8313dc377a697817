"""What a run or a model comes to: on paper beforehand, in the terminal, as JSON and as a page."""
