"""`attach()`: what is planned for an optimizer, agreed over the ranks, and applied."""
