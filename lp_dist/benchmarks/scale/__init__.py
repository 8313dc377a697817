"""What `attach`, steps and updates cost one rank of hundreds, which a fake process group simulates."""
