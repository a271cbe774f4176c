"""How a loaded pipeline of diffusers generates a batch of unrelated images."""
