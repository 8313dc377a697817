"""Survivors that move: after weights were removed, those that are left take over what the layer computed with them."""
