"""Train the starter models on a CPU: CLIP and judge, autoencoder, generator with its IP-Adapter; export them."""
