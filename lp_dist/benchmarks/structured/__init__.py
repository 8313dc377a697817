"""What fewer channels or heads cost and gain."""
