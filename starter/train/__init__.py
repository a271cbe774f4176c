"""Train the starter models on a CPU: CLIP and judge, autoencoder, generator; export them."""
